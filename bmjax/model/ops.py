"""The matrix product and SwiGLU with backward passes of their own, and where documents start in packed rows.

The values and gradients are the ordinary ones. Left to itself, XLA on a CPU transposes the larger operand of a
weight's gradient, fused with everything that computes it, element by strided element.
"""

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_vjp
def matmul(x_BTD: Array, w_DF: Array) -> Array:
    """Compute x @ w, [B, T, F]."""
    return x_BTD @ w_DF


def _matmul_backward(saved, dy_BTF: Array):
    x_BTD, w_DF = saved
    dx_BTD = jnp.einsum("btf,df->btd", dy_BTF, w_DF)
    # The left operand is the one that gets transposed: let it be the narrower.
    if w_DF.shape[0] <= w_DF.shape[1]:
        dw_DF = jnp.einsum("btd,btf->df", x_BTD, dy_BTF, preferred_element_type=jnp.float32)
        return dx_BTD, dw_DF.astype(w_DF.dtype)
    # Rounded before it is transposed: a CPU has no product of bfloat16 into transposed float32.
    dw_FD = jnp.einsum("btf,btd->fd", dy_BTF, x_BTD, preferred_element_type=jnp.float32)
    return dx_BTD, dw_FD.astype(w_DF.dtype).T


matmul.defvjp(lambda x_BTD, w_DF: (x_BTD @ w_DF, (x_BTD, w_DF)), _matmul_backward)


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """Compute silu(gate) * up (arXiv 2002.05202), elementwise."""
    return gate * jax.nn.sigmoid(gate) * up


def _swiglu_backward(saved, dh: Array):
    gate, up = saved
    s = jax.nn.sigmoid(gate)
    d_gate = dh * up * s * (1 + gate * (1 - s))
    d_up = dh * gate * s
    return jax.lax.optimization_barrier((d_gate, d_up))  # computed once, not inside each product that reads them


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


def document_changes(segment_ids_BT: Array) -> Array:
    """Return which tokens are the first of a document, bool [B, T]: the segment id changes there along the row."""
    changed = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)), constant_values=True)


def document_starts(segment_ids_BT: Array) -> Array:
    """Return the position in the row where the document of every token starts, int32 [B, T]."""
    index = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None, :]
    return jax.lax.cummax(jnp.where(document_changes(segment_ids_BT), index, 0), axis=1)
