"""The kernels of GPUs equal the dense formula: values and gradients, packed, grouped heads; on a GPU only:

JAX_PLATFORMS=cuda python -m pytest tests/model/attention/test_gpu.py
"""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.branch.settings import TrainSettings
from bmjax.branch.train import check
from bmjax.config import UserError
from bmjax.model import qwen2
from bmjax.model.attention import gpu
from bmjax.model.attention.dispatch import backend, causal_attention
from bmjax.model.attention.options import AttentionOptions
from bmjax.model.batch import Batch
from bmjax.model.ops import document_changes
from bmjax.parallel.mesh import make_mesh
from tests.model.attention.reference import dense, packed, value_and_gradients
from tests.model.reference import build

ON_GPU = jax.default_backend() == "gpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU")
needs_tokamax = pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed")
BACKENDS = ["cudnn", pytest.param("tokamax", marks=needs_tokamax), "xla"]
NAMES = ("out", "dq", "dk", "dv")


def most_documents(segments) -> int:
    return int(np.asarray(document_changes(jnp.asarray(segments))).sum(axis=1).max())


def rounded(inputs):
    """The same inputs in bfloat16."""
    q, k, v, segments, weight = inputs
    return *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), segments, weight


def distance(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def assert_near_dense(options, inputs):
    """In bfloat16, within 1 % of the float32 formula of the same inputs."""
    inputs = rounded(inputs)
    got = value_and_gradients(lambda *x: causal_attention(*x, None, options).astype(jnp.float32))(*inputs)
    exact = (*(x.astype(jnp.float32) for x in inputs[:3]), *inputs[3:])
    with jax.default_matmul_precision("highest"):
        want = value_and_gradients(dense)(*exact)
    for a, b, name in zip(got, want, NAMES, strict=True):
        assert distance(a, b) < 1e-2, name


@needs_gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "length", "size", "documents"),
    [((8, 8), 1024, 128, 7), ((16, 2), 2048, 64, 3), ((16, 2), 1088, 128, 1), ((5, 1), 1024, 128, 20)],
)
def test_kernels(name, heads, length, size, documents):
    inputs = packed(2, length, *heads, size, documents=documents)
    assert_near_dense(AttentionOptions(name, documents=most_documents(inputs[3])), inputs)


@needs_gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_one_document_of_whole_rows(name):
    q, k, v, segments, weight = packed(2, 1024, 8, 2, 128, seed=1)
    assert_near_dense(AttentionOptions(name, documents=1), (q, k, v, np.ones_like(segments), weight))


@needs_gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_kernels_on_a_mesh(name):
    inputs = packed(2, 1024, 8, 2, 128, seed=2)
    with jax.set_mesh(make_mesh({"fsdp": -1})):
        assert_near_dense(AttentionOptions(name, documents=16), inputs)


@needs_gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_packed_equals_alone(name):
    """Whatever lies around a document, its values are the same to the bit, and its gradients but for their order."""
    q, k, v, segments, weight = rounded(packed(1, 2048, 8, 2, 128, seed=3))
    options = AttentionOptions(name, documents=most_documents(segments))
    run = value_and_gradients(lambda *x: causal_attention(*x, None, options).astype(jnp.float32))
    whole = run(q, k, v, segments, weight)
    for document in np.unique(segments):
        mine = segments == document
        noise = np.random.default_rng(4).normal(size=q.shape)
        mixed = [
            jnp.where(mine[..., None, None], x, jnp.asarray(noise[:, :, : x.shape[2]], x.dtype)) for x in (q, k, v)
        ]
        for a, b, which in zip(run(*mixed, segments, weight), whole, NAMES, strict=True):
            if which == "out":
                np.testing.assert_array_equal(np.asarray(a)[mine], np.asarray(b)[mine])
            else:
                assert distance(np.asarray(a, np.float32)[mine], np.asarray(b, np.float32)[mine]) < 5e-3, which


@needs_gpu
@pytest.mark.parametrize("remat", ["full", "save_attention", "minimal", "none"])
def test_a_model_by_cudnn(remat):
    """Loss and gradients of a whole model, as by plain XLA."""
    _, config, params = build("gqa_untied")
    rng = np.random.default_rng(5)
    tokens = rng.integers(2, 97, (2, 128)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (2, 128)), axis=1).astype(np.int32)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)

    def total(options, params):
        batch = Batch(tokens, segments, np.ones_like(tokens))
        model = qwen2.Qwen2(config, jnp.bfloat16, remat, attention_options=options)
        return qwen2.loss_sum(model, params, batch)[0]

    (loss, grads), (want_loss, want) = (
        jax.jit(jax.value_and_grad(partial(total, options)))(params)
        for options in (AttentionOptions("cudnn", documents=3), AttentionOptions("xla"))
    )
    assert abs(float(loss) / float(want_loss) - 1) < 5e-3
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        assert distance(a, b) < 5e-2


@needs_gpu
def test_auto():
    q = jax.ShapeDtypeStruct((1, 1024, 8, 128), jnp.bfloat16)
    assert backend(AttentionOptions(documents=4), q, False) == ("cudnn" if gpu.cudnn_runs_here() else "xla")


def test_extents():
    """Documents as cuDNN takes them: starts and lengths, -1 for those that are not there; ids in any order."""
    segments = np.array([[1] * 3 + [2] * 4 + [0], [1] * 8, [5, 5, 4, 4, 3, 3, 2, 2]], np.int32)
    starts, lengths = gpu.extents(segments, 4)
    np.testing.assert_array_equal(starts, [[0, 3, 7, -1], [0, -1, -1, -1], [0, 2, 4, 6]])
    np.testing.assert_array_equal(lengths, [[3, 4, 1, -1], [8, -1, -1, -1], [2, 2, 2, 2]])


@pytest.mark.parametrize(("change", "message"), [
    ({"dtype": jnp.float32}, "bfloat16 or float16, not float32"),
    ({"size": 4}, "heads of a multiple of 8 up to 128, not 4"),
    ({"documents": 0}, "the most documents of a row"),
    ({"window": 5}, "no sliding window"),
])  # fmt: skip
def test_cudnn_says_why_it_cannot(change, message):
    case = {"dtype": jnp.bfloat16, "size": 64, "documents": 2, "window": None} | change
    x = jnp.zeros((1, 32, 2, case["size"]), case["dtype"])
    segments = jnp.ones((1, 32), jnp.int32)
    with pytest.raises(UserError, match=message):
        causal_attention(x, x, x, segments, case["window"], AttentionOptions("cudnn", documents=case["documents"]))


@pytest.mark.parametrize("remat", ["full", "save_attention", "minimal"])
def test_cudnn_runs_once_where_its_result_is_kept(remat, monkeypatch):
    """Its kernel has no name that a policy could find; traced only, for no GPU is needed for that."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91_900)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(kernels, "is_cuda_compute_capability_equal", lambda capability: False)
    _, config, params = build("gqa_untied")
    tokens = np.ones((1, 64), np.int32)

    def total(params):
        options = AttentionOptions("cudnn", documents=3)
        batch = Batch(tokens, tokens, tokens)
        model = qwen2.Qwen2(config, jnp.bfloat16, remat, attention_options=options)
        return qwen2.loss_sum(model, params, batch)[0]

    text = str(jax.make_jaxpr(jax.grad(total))(params))
    assert text.count("dot_product_attention_fwd_wrapper") == (2 if remat == "full" else 1)


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
@pytest.mark.parametrize(("name", "device"), [("cudnn", "GPU"), ("tokamax", "GPU"), ("splash", "TPU")])
def test_a_training_says_where_kernels_run(name, device):
    settings = TrainSettings(student="-", data="-", output="-", steps=1, seq_len=64, batch=8, attention=name)
    with pytest.raises(UserError, match=f"attention: {name} runs on {device}s, and there are none; use auto or xla"):
        check(settings, build("gqa_untied")[1])
