"""Reinforced agent merging: what one model alone changed is kept whole, what several changed is averaged."""

from typing import Annotated

from bmjax.merge.lazy import Array, jnp
from bmjax.merge.methods.kernels import Block, Masks, add, add_kept, deltas
from bmjax.merge.methods.method import About, Merged, Tensor, method

Threshold = Annotated[float, About("a change up to this size is none", least=0)]


@method("ram", base="required", branches=(1, None))
def ram(t: Tensor, *, epsilon: Threshold = 1e-5) -> Merged:
    """base + the mean of an entry's changes over the models that changed it by more than epsilon, arXiv 2601.13572."""
    return t.map(_merge, epsilon, [1.0] * t.branches)


@method("ramplus_tl", base="required", branches=(1, None))
def ramplus_tl(
    t: Tensor,
    *,
    r: Annotated[float, About("how much a model's own entries are raised", least=0)] = 0.1,
    alpha: Annotated[float, About("the most that the ratio of shared to own entries counts", least=0)] = 0.2,
    epsilon: Threshold = 1e-5,
) -> Merged:
    """RAM+ (tensor level), arXiv 2601.13572: as ram, but an entry that one model alone changed gets its change times
    1 + r * clip(shared / own, 0, alpha), from how many of the model's changed entries are shared and its own."""
    counts = t.sums(_changed, epsilon)
    pairs = zip(counts[0::2], counts[1::2], strict=True)
    ratios = [shared / max(unshared, epsilon) if shared else 0.0 for shared, unshared in pairs]
    return t.map(_merge, epsilon, [1.0 + r * min(ratio, alpha) for ratio in ratios])


def _masks(x: Block, epsilon: Array) -> tuple[Masks, Array]:
    masks = [jnp.abs(delta) > epsilon for delta in deltas(x)]
    return masks, add([kept.astype(jnp.int32) for kept in masks])


def _changed(x: Block, epsilon: Array) -> list[Array]:
    """Return of every model the mask of what it changed with others, and of what it alone did."""
    masks, copies = _masks(x, epsilon)
    return [mask for kept in masks for mask in (kept & (copies > 1), kept & (copies == 1))]


def _merge(x: Block, epsilon: Array, raised: Array) -> tuple[Array, Masks]:
    masks, copies = _masks(x, epsilon)
    raised_changes = [jnp.where(copies == 1, f * d, d) for f, d in zip(raised, deltas(x), strict=True)]
    return x.base + add_kept(masks, raised_changes) / jnp.maximum(copies, 1), masks
