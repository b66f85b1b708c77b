"""The paged kernels of TPUs and GPUs, interpreted, equal the plain form; which one is used, and why not another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.config import UserError
from bmjax.model.attention import cached, paged
from bmjax.model.attention.cached import Slots
from bmjax.model.config import ModelConfig
from bmjax.parallel.mesh import make_mesh

CONFIG = ModelConfig(
    vocab_size=97, hidden_size=512, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128,
    max_length=256,
)  # fmt: skip
B, S = 4, 256
LENGTHS = [1, 70, 200, 256]


def inputs(head_dim: int, dtype: str):
    """q, slots and what the plain form computes from them: the last token of each row as this call's."""
    rng = np.random.default_rng(0)
    K, N = 2, 6

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    slots, q = Slots(normal(K, B, S, head_dim), normal(K, B, S, head_dim)), normal(B, 1, N, head_dim)
    lengths = jnp.array(LENGTHS, jnp.int32)
    last = Slots(*(jnp.stack([x[:, b, n - 1] for b, n in enumerate(LENGTHS)], axis=1)[:, :, None] for x in slots[:2]))
    want = cached.next_tokens(q, slots, last, lengths - 1, jnp.int32(0), None, columns=False)
    return q, slots, lengths, want


def test_the_gpu_kernel_is_the_plain_form():
    q, slots, lengths, want = inputs(32, "float32")
    with jax.set_mesh(make_mesh({"tensor": 2, "data": 4})):
        out = jax.jit(lambda *arrays: paged.next_tokens("gpu", *arrays))(q, slots, lengths)
    np.testing.assert_allclose(out, want, atol=2e-6)


def test_the_gpu_kernel_reads_int8():
    q, slots, lengths, _ = inputs(32, "float32")
    k, v = (x.transpose(1, 2, 0, 3) for x in slots[:2])
    small = cached.pack(k, v, jnp.float32, quantized=True, columns=False)
    rounded = Slots(small.k * small.k_scales, small.v * small.v_scales)
    np.testing.assert_allclose(
        paged.next_tokens("gpu", q, small, lengths), paged.next_tokens("gpu", q, rounded, lengths), atol=2e-6
    )


def test_the_tpu_kernel_is_the_plain_form():
    from jax.experimental.pallas import tpu

    q, slots, lengths, want = inputs(128, "bfloat16")
    with tpu.force_tpu_interpret_mode():
        out = paged.next_tokens("tpu", q, slots, lengths)
    np.testing.assert_allclose(out.astype(np.float32), want.astype(np.float32), atol=0.02)


@pytest.mark.parametrize(("name", "changes", "dtype", "quantized", "reason"), [
    ("tpu", {"head_dim": 64}, "bfloat16", False, "needs heads of a multiple of 128, not 64"),
    ("tpu", {}, "float32", False, "rounds keys and values to bfloat16, and the model computes in float32"),
    ("tpu", {}, "bfloat16", True, "makes a float32 of every int8's scale"),
    ("gpu", {"head_dim": 24}, "bfloat16", False, "needs heads of a power of two from 16 on, not 24"),
    ("gpu", {"windows": (None, 8)}, "bfloat16", False, "knows no sliding window"),
])  # fmt: skip
def test_a_kernel_says_why_it_cannot(name, changes, dtype, quantized, reason):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match=f"attention: the {name} kernel {reason}.*; use auto or xla"):
        paged.choose(name, config, dtype, quantized)


def test_the_kernel_is_the_devices_or_the_reason_is_told(monkeypatch):
    assert paged.choose("auto", CONFIG, "bfloat16", False) == ("xla", None)
    assert paged.choose("gpu", CONFIG, "bfloat16", False) == ("gpu", None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    # A kernel that does not compile, as here where there is no GPU, is no reason to fail.
    kernel, reason = paged.choose("auto", CONFIG, "bfloat16", False)
    assert kernel == "xla" and reason.startswith("the gpu kernel does not compile here")
    kernel, reason = paged.choose("auto", dataclasses.replace(CONFIG, windows=(8, 8)), "bfloat16", False)
    assert (kernel, reason) == ("xla", "the gpu kernel knows no sliding window")
    assert paged.choose("xla", CONFIG, "bfloat16", False) == ("xla", None)
