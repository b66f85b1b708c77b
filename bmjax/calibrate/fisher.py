"""Fisher merging (arXiv 2111.09832), applied to changes: F_b change_b / sum_j F_j, each F over its mean in the tensor.

F_b are model b's squared gradients on rows of its own domain, a gradient for every packed row. They are computed part
by part: forward with the states before every part on disk, then backward from the head to the embedding, one part of
one model in memory. The squares wait on disk until the parts are merged.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.calibrate.data import Calibration
from bmjax.calibrate.hidden import Hidden, save_array
from bmjax.calibrate.models import Models, Tree, whole
from bmjax.calibrate.programs import Shares, advance, cast
from bmjax.calibrate.progress import Progress
from bmjax.merge.recipe.calibration import CalibrationSettings
from bmjax.model import parts
from bmjax.model.batch import Batch
from bmjax.model.config import ModelConfig
from bmjax.model.spec import get
from bmjax.parallel import turns
from bmjax.parallel.mesh import sharding


class Fisher:
    """The contributions to all parameters, by squared gradients that it computes when it is made."""

    def __init__(
        self, models: Models, calibration: Calibration, p: CalibrationSettings, folder: Path, progress: Progress
    ) -> None:
        self._models, self._folder = models, folder
        for i, name in enumerate(models.branches):
            batches = list(calibration.rows(i, p.rows, "squares"))
            squares(models, name, batches, p.compute_dtype, folder, f"fisher-{i}", progress)

    def shares(self, part: int, models: Sequence[Tree]) -> Shares:
        """Return the contributions to a part's parameters, float32."""
        shares = {}
        for row in parts.rows(self._models.config, part):
            place = sharding(self._models.mesh, row.axes, row.shape)
            files = [squares_file(self._folder, f"fisher-{i}", row.hf_key) for i in range(len(models) - 1)]
            squared = [jax.device_put(np.load(file, mmap_mode="r"), place) for file in files]
            shares[row.path] = weighted([whole(get(tree, row.path)) for tree in models], squared)
        return shares

    def flush(self, position: int) -> None:
        """Nothing of it changes while parts are merged."""


@turns.jit
def weighted(models: Sequence[jax.Array], squared: Sequence[jax.Array]) -> list[jax.Array]:
    """Return contributions by squared gradients, each over its mean; the plain ones where all are 0.

    models: a parameter of the base and of every branch. squared: of every branch.
    """
    base, *branches = (leaf.astype(jnp.float32) for leaf in models)
    plain = [(branch - base) / len(branches) for branch in branches]
    means = [jnp.mean(f) for f in squared]
    weights = [f / jnp.where(m > 0, m, 1.0) for f, m in zip(squared, means, strict=True)]
    total = sum(weights)
    some = total > 0
    return [jnp.where(some, len(plain) * w / jnp.where(some, total, 1.0), 1.0) * c
            for w, c in zip(weights, plain, strict=True)]  # fmt: skip


def squares_file(folder: Path, label: str, key: str) -> Path:
    """Return the file of a parameter's squares."""
    return folder / f"{label}-{key}.npy"


def squares(
    models: Models, name: str, batches: Sequence[Batch[jax.Array]], dtype: str, folder: Path, label: str,
    progress: Progress,
) -> None:  # fmt: skip
    """Write the sum over packed rows of the squared gradient of each row's summed loss, float32, as the parameters.

    progress: parts that it has are not computed again.
    """
    config, compute, last = models.config, jnp.dtype(dtype), models.config.num_layers
    trace = Hidden(folder, f"{label}-trace", batches, config.hidden_size, compute, models.mesh, kept=last + 2)
    gradient = Hidden(folder, f"{label}-gradient", batches, config.hidden_size, compute, models.mesh)
    for part in range(last + 1):
        if progress.get(f"{label}/forward/{part}") is None:
            advance(config, part, cast(compute, models.load_one(name, part)), trace, compute)
            trace.flush(part + 1)
            progress.put(f"{label}/forward/{part}", True)
    # Position p + 1 of `gradient` is that of the loss by part p's output.
    for part in reversed(range(last + 2)):
        if progress.get(f"{label}/backward/{part}") is not None:
            continue
        params = cast(np.dtype(np.float32), models.load_one(name, part))
        if part == last + 1 and config.tied:
            params |= cast(np.dtype(np.float32), models.load_one(name, 0))
        kept = {row.path: jnp.zeros_like(get(params, row.path)) for row in parts.rows(config, part)}
        for i, batch in enumerate(batches):
            window = parts.window(config, part) if 1 <= part <= last else None
            if part == 0:
                norm = cast(np.dtype(np.float32), models.load_one(name, last + 1)) if config.tied else {}
                final = trace.read(last + 1, i) if config.tied else None
                kept = _embedding_squares(config, dtype, params, norm, batch, final, gradient.read(1, i), kept)
                continue
            dy = gradient.read(part + 1, i) if part <= last else None
            dx, kept = _part_squares(config, dtype, params, batch, trace.read(part, i), window, dy, kept)
            gradient.write(part, i, dx)
        for row in parts.rows(config, part):
            save_array(squares_file(folder, label, row.hf_key), kept[row.path])
        if part:
            gradient.flush(part)
        progress.put(f"{label}/backward/{part}", True)


def _over_rows(add: Callable[..., Any], kept: Any, *arrays: Any) -> tuple[Any, Any]:
    """Scan `add(kept, row...)` over the rows of a batch, each as a batch of one."""

    def one(kept: Any, rows: Any) -> tuple[Any, Any]:
        kept, result = add(kept, *jax.tree.map(lambda array: array[None], rows))
        return kept, jax.tree.map(lambda array: array[0], result)

    return jax.lax.scan(one, kept, arrays)


def _add(kept: dict[tuple[str, ...], jax.Array], gradients: Tree) -> dict[tuple[str, ...], jax.Array]:
    return {path: total + jnp.square(get(gradients, path)) for path, total in kept.items()}


@functools.partial(turns.jit, static_argnums=(0, 1), donate_argnums=7)
def _part_squares(
    config: ModelConfig, dtype: Any, params: Tree, batch: Batch[jax.Array], x_BTD: jax.Array, window: Any, dy_BTD: Any,
    kept: Any,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Return the gradient of the loss by the input of a layer (or of the head, without `dy`), and `kept` with the rows'
    squares added."""

    def add_row(kept: Any, row: Batch[jax.Array], x: jax.Array, *dy: jax.Array) -> tuple[Any, jax.Array]:
        def run(params: Tree, x: jax.Array) -> jax.Array:
            weights = cast(dtype, params)
            if not dy:
                return parts.loss_sum(config, weights, x, row)[0]
            return parts.layer(config, weights, x, row.segment_ids, window)

        gradients, dx = jax.vjp(run, params, x)[1](dy[0] if dy else jnp.float32(1))
        return _add(kept, gradients), dx

    kept, dx_BTD = _over_rows(add_row, kept, batch, x_BTD, *([] if dy_BTD is None else [dy_BTD]))
    return dx_BTD, kept


@functools.partial(turns.jit, static_argnums=(0, 1), donate_argnums=7)
def _embedding_squares(
    config: ModelConfig, dtype: Any, params: Tree, norm: Tree, batch: Batch[jax.Array], final_BTD: Any,
    dx_BTD: jax.Array, kept: Any,
) -> Any:  # fmt: skip
    """Return `kept` with the embedding's squares added; a tied head adds to a gradient before it is squared."""

    def add_row(kept: Any, row: Batch[jax.Array], dx: jax.Array, *final: jax.Array) -> tuple[Any, None]:
        def run(params: Tree) -> tuple[jax.Array, ...]:
            weights = cast(dtype, params)
            head = [parts.loss_sum(config, weights | cast(dtype, norm), x, row)[0] for x in final]
            return parts.embed(config, weights, row.tokens, dtype), *head

        (gradients,) = jax.vjp(run, params)[1]((dx, *(jnp.float32(1) for _ in final)))
        return _add(kept, gradients), None

    return _over_rows(add_row, kept, batch, dx_BTD, *([] if final_BTD is None else [final_BTD]))[0]
