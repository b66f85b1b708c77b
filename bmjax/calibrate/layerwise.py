"""Learns coefficients layer by layer (ProDistill, arXiv 2502.12706): each layer's output is to be the branches' own.

For layer l, with h_b the states of branch b on rows of its own domain, and h those of the merged model on the same
rows, the coefficients minimize the sum over domains and tokens of |layer(W, h) - layer(W_b, h_b)|^2, where W = base +
sum_b coefficient_b * contribution_b. Both sides go on with states of their own ("dual inputs"): the merged layer with
what the merged layers before it make, the branch's with the branch's. A layer is learned, then all states pass it. The
embedding, the final norm and the head keep the coefficients that they start with.

The paper has Adam with rate 0.1 on coefficients of whole changes, one for each entry, from 1 / number of branches, for
100 epochs of 16 to 64 samples. Here a coefficient multiplies a branch's share of the mean, so it starts at 1, and the
rate falls to 0 along a straight line.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bmjax.calibrate.data import Calibration
from bmjax.calibrate.hidden import Hidden
from bmjax.calibrate.learn import coefficients
from bmjax.calibrate.models import Tree
from bmjax.calibrate.programs import Shares, advance, cast, merge
from bmjax.calibrate.walk import Work
from bmjax.model import parts
from bmjax.model.batch import Batch
from bmjax.model.config import ModelConfig
from bmjax.parallel import turns

_ADAM = optax.scale_by_adam()


class Layerwise:
    """Gives a walk the coefficients of each layer, learned when it comes to it.

    A layer whose distance did not shrink on the rows that it learned from keeps the coefficients that it started with.
    """

    def __init__(self, work: Work, calibration: Calibration) -> None:
        self._work = work
        config, p = work.models.config, work.p
        domains = range(len(work.models.branches))
        batches = [list(calibration.rows(i, p.rows, "learning")) for i in domains]
        self._own, self._merged = (
            [Hidden(work.folder, f"{name}-{i}", batches[i], config.hidden_size, jnp.dtype(p.compute_dtype),
                    work.models.mesh) for i in domains]
            for name in ("own", "merged")
        )  # fmt: skip

    def factors(self, part: int, models: Sequence[Tree], shares: Shares) -> list[Tree]:
        """Return each branch's coefficients; those of a layer after `p.steps` steps of Adam."""
        config, p = self._work.models.config, self._work.p
        is_layer = 1 <= part <= config.num_layers
        factors = [coefficients(parts.rows(config, part), p.start, p.per if is_layer else "tensor") for _ in models[1:]]
        if part > config.num_layers:
            return factors
        # The branches' own states pass the part: what they become is what the merged layer should give.
        for branch, stream in zip(models[1:], self._own, strict=True):
            advance(config, part, cast(p.compute_dtype, branch), stream, jnp.dtype(p.compute_dtype))
        if part == 0:
            return factors
        paths, window, moments = self._work.paths(part), parts.window(config, part), _ADAM.init(factors)
        dtype = jnp.dtype(p.compute_dtype)

        def over_domains(factors: list[Tree], indices: Sequence[int], program: Any) -> Any:
            """Return the sum over domains of what `program` gives for a batch of each."""
            total = None
            for own, merged, i in zip(self._own, self._merged, indices, strict=True):
                terms = program(config, paths, dtype, models, shares, factors, merged.read(part, i),
                                own.read(part + 1, i), own.batches[i], window)  # fmt: skip
                total = terms if total is None else jax.tree.map(jnp.add, total, terms)
            return total

        def error(factors: list[Tree]) -> float:
            """Return the distance over all rows; a domain with fewer batches has its first ones twice."""
            most = max(len(stream.batches) for stream in self._own)
            return sum(float(over_domains(factors, self._indices(number), _distance)) for number in range(most))

        start, before = factors, error(factors)
        for number in range(p.steps):
            gradients = over_domains(factors, self._indices(number), _gradient)
            rate = np.float32(p.learning_rate * (1 - number / p.steps))
            factors, moments = _update(factors, moments, gradients, rate)
        after = error(factors)
        kept = after < before  # NaN is not
        self._work.progress.put(f"layerwise/{part}", [before, after if kept else before])
        return factors if kept else start

    def _indices(self, number: int) -> list[int]:
        """Return the batch of every domain for a step."""
        return [number % len(stream.batches) for stream in self._own]

    def errors(self) -> dict[str, dict[str, float]]:
        """Return by layer the summed squared distances with the coefficients as they start, and as they are learned."""
        config = self._work.models.config
        names = {part: parts.name(config, part) for part in range(1, config.num_layers + 1)}
        values = {name: self._work.progress.get(f"layerwise/{part}") for part, name in names.items()}
        return {name: dict(zip(("start", "learned"), pair, strict=True)) for name, pair in values.items()}

    def follow(self, part: int, models: Sequence[Tree], merged: Tree) -> None:
        """Take the merged model's states through the merged part."""
        dtype = jnp.dtype(self._work.p.compute_dtype)
        weights = cast(dtype, merged)
        for stream in self._merged:
            advance(self._work.models.config, part, weights, stream, dtype)

    def flush(self, position: int) -> None:
        for stream in (*self._own, *self._merged):
            stream.flush(position)


@functools.partial(turns.jit, static_argnums=(0, 1, 2))
def _distance(
    config: ModelConfig, paths: Any, dtype: Any, models: Any, shares: Any, factors: Any, x_BTD: jax.Array,
    target_BTD: jax.Array, batch: Batch[jax.Array], window: Any,
) -> jax.Array:  # fmt: skip
    """Return the summed squared distance of a merged layer's outputs from the targets, at real tokens."""
    params = cast(dtype, merge(paths, models, shares, factors))
    out = parts.layer(config, params, x_BTD, batch.segment_ids, window)
    difference = out.astype(jnp.float32) - target_BTD.astype(jnp.float32)
    return jnp.sum(difference**2 * (batch.segment_ids > 0)[..., None])


_gradient = turns.jit(jax.grad(_distance, argnums=5), static_argnums=(0, 1, 2))


@functools.partial(turns.jit, donate_argnums=(1, 2))
def _update(factors: Any, moments: Any, gradients: Any, rate: jax.Array) -> tuple[Any, Any]:
    updates, moments = _ADAM.update(gradients, moments)
    return jax.tree.map(lambda leaf, u: leaf - rate * u, factors, updates), moments
