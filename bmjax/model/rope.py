"""Rotary position embeddings (RoFormer, arXiv 2104.09864) with YaRN scaling (arXiv 2309.00071)."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from bmjax.model.config import Rope


def _inverse_frequencies(rope: Rope, head_dim: int, max_length: int) -> tuple[np.ndarray, float]:
    """Return inverse frequencies, float32 [H/2], and the factor on cos and sin.

    YaRN blends interpolated and extrapolated frequencies by a linear ramp between the dimensions that turn
    `beta_fast` and `beta_slow` times over the original length (section 3.2), and scales attention by
    0.1 ln(factor) + 1 (section 3.4), computed in float32 as the reference implementation does.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    wavelengths = np.float32(rope.theta) ** exponents
    if rope.kind == "default":
        return 1.0 / wavelengths, 1.0
    if rope.kind == "linear":
        return (1.0 / wavelengths) / np.float32(rope.factor), 1.0
    original = rope.original_length or max_length

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    extrapolated, interpolated = 1.0 / wavelengths, 1.0 / (np.float32(rope.factor) * wavelengths)
    frequencies = interpolated * ramp + extrapolated * (1.0 - ramp)
    factor = mscale(rope.mscale) / mscale(rope.mscale_all_dim) if rope.mscale and rope.mscale_all_dim else mscale(1.0)
    return frequencies.astype(np.float32), factor if rope.attention_factor is None else rope.attention_factor


def tables(rope: Rope, head_dim: int, max_length: int, positions_BT: Array) -> tuple[Array, Array]:
    """Return cos and sin, float32 [B, T, 1, H/2], of every token's position (bf16 would round 257 to 256)."""
    frequencies, factor = _inverse_frequencies(rope, head_dim, max_length)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x_BTNH: Array, cos: Array, sin: Array) -> Array:
    """Rotate the halves of each head by the tables; the dtype of `x` stays."""
    left, right = jnp.split(x_BTNH, 2, axis=-1)
    cos, sin = cos.astype(x_BTNH.dtype), sin.astype(x_BTNH.dtype)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
