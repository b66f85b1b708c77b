"""Parity with transformers' Qwen2ForCausalLM in float32: logits 2e-4 absolute, loss 1e-5, gradients 1e-4 relative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bmjax.model import qwen2, spec
from bmjax.model.batch import Batch
from bmjax.parallel.mesh import make_mesh, sharding
from tests.model.reference import CONFIGS, build, from_state

LENGTHS = [23, 40, 11]


def documents(config, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, config.vocab_size, n) for n in LENGTHS]


def padded(docs, length, left=False):
    tokens, segments = np.zeros((len(docs), length), np.int32), np.zeros((len(docs), length), np.int32)
    for row, doc in enumerate(docs):
        where = slice(length - len(doc), length) if left else slice(0, len(doc))
        tokens[row, where], segments[row, where] = doc, 1
    return tokens, segments


def packed(docs, length):
    tokens, segments = np.zeros((1, length), np.int32), np.zeros((1, length), np.int32)
    start = 0
    for number, doc in enumerate(docs, 1):
        tokens[0, start : start + len(doc)], segments[0, start : start + len(doc)] = doc, number
        start += len(doc)
    return tokens, segments


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_padded_and_packed_rows(name):
    hf, config, params = build(name)
    docs = documents(config)
    with torch.no_grad():
        expected = [hf(torch.tensor(doc)[None]).logits[0].numpy() for doc in docs]
    logits = jax.jit(lambda t, s: qwen2.logits(qwen2.Qwen2(config), params, t, s))

    tokens, segments = packed(docs, 80)
    got = np.asarray(logits(tokens, segments))
    start = 0
    for want in expected:
        np.testing.assert_allclose(got[0, start : start + len(want)], want, atol=2e-4, rtol=0)
        start += len(want)

    for left in (False, True):
        tokens, segments = padded(docs, 48, left)
        got = np.asarray(logits(tokens, segments))
        with torch.no_grad():
            mask = torch.tensor(segments)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            batch = hf(torch.tensor(tokens), attention_mask=mask, position_ids=positions).logits.numpy()
        np.testing.assert_allclose(got[segments == 1], batch[segments == 1], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", [pytest.param("padded", marks=pytest.mark.slow), "packed"])
def test_loss_and_gradients(name, form):
    hf, config, params = build(name, seed=3)
    docs = documents(config, seed=4)
    rng = np.random.default_rng(5)
    masks = [rng.random(len(doc)) < 0.6 for doc in docs]

    total, count = 0.0, 0
    for doc, mask in zip(docs, masks, strict=True):
        labels = torch.tensor(np.where(mask, doc, -100))[None]
        n = int(mask[1:].sum())
        total = total + hf(torch.tensor(doc)[None], labels=labels).loss * n
        count += n
    (total / count).backward()
    expected = {key: value.grad.numpy() for key, value in hf.named_parameters()}

    lay = {"padded": padded, "packed": packed}[form]
    tokens, segments = lay(docs, 80)
    loss_mask = lay([m.astype(np.int32) for m in masks], 80)[0]

    def mean(params):
        nats, n = qwen2.loss_sum(qwen2.Qwen2(config), params, Batch(tokens, segments, loss_mask))
        return nats / n, n

    (loss, n), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    assert int(n) == count
    assert abs(float(loss) - float(total.detach()) / count) < 1e-5
    wanted = from_state(config, expected)
    for row in spec.table(config):
        got, want = np.asarray(spec.get(grads, row.path)), np.asarray(spec.get(wanted, row.path))
        assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want) + 1e-7, row.name


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8},
        {"fsdp": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"context": 8},
    ],
)
@pytest.mark.parametrize("name", ["gqa_untied", pytest.param("window_all_tied", marks=pytest.mark.slow)])
def test_eight_devices_give_the_numbers_of_a_single_one(name, sizes):
    _, config, params = build(name)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (8, 64)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (8, 64)), axis=1).astype(np.int32)
    mask = rng.integers(0, 2, (8, 64)).astype(np.int32)

    def mean(params, batch):
        nats, n = qwen2.loss_sum(qwen2.Qwen2(config), params, batch)
        return nats / n

    step = jax.jit(jax.value_and_grad(mean))
    loss, grads = step(params, Batch(tokens, segments, mask))
    mesh = make_mesh(sizes)
    placed = spec.unflatten(
        [
            (r.path, jax.device_put(spec.get(params, r.path), sharding(mesh, r.axes, r.shape)))
            for r in spec.table(config)
        ]
    )
    batch = jax.device_put(Batch(tokens, segments, mask), sharding(mesh, ("batch", "length"), tokens.shape))
    with jax.set_mesh(mesh):
        sharded_loss, sharded_grads = jax.jit(jax.value_and_grad(mean))(placed, batch)
    assert abs(float(loss) - float(sharded_loss)) < 1e-5
    for row in spec.table(config):
        a, b = np.asarray(spec.get(grads, row.path)), np.asarray(spec.get(sharded_grads, row.path))
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=row.name)


@pytest.mark.parametrize("options", [{"remat": "full"}, {"unroll": 3}, {"remat": "full", "unroll": 2}])
def test_remat_and_unrolling_change_nothing(options):
    _, config, params = build("yarn_window")
    tokens, segments = packed(documents(config), 80)

    def loss(params, **options):
        return qwen2.loss_sum(qwen2.Qwen2(config, **options), params, Batch(tokens, segments, segments > 0))[0]

    value = jax.jit(jax.value_and_grad(loss), static_argnames=("remat", "unroll"))
    plain, grads = value(params)
    other, others = value(params, **options)
    np.testing.assert_allclose(plain, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), grads, others)


def test_positions_restart_with_every_document():
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0]])
    assert qwen2.default_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]


def test_init_draws_every_leaf_with_its_sharding():
    config = build("mha_tied")[1]
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    alone, placed = qwen2.init(config, 7), qwen2.init(config, 7, mesh)
    for row in spec.table(config):
        a, b = spec.get(alone, row.path), spec.get(placed, row.path)
        assert a.shape == b.shape == row.shape
        np.testing.assert_array_equal(a, b)
        assert b.sharding == sharding(mesh, row.axes, row.shape)
    std = float(jnp.std(alone["layers"]["mlp"]["up"]["kernel"]))
    assert abs(std / config.initializer_range - 1) < 0.05
