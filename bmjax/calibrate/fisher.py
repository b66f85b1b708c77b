"""Fisher merging (arXiv 2111.09832), applied to changes: F_b change_b / sum_j F_j, each F over its mean in the tensor.

F_b are model b's squared gradients on rows of its own domain, a gradient for every packed row. They are computed part
by part: forward with the states before every part on disk, then backward from the head to the embedding, one part of
one model in memory. The squares wait on disk until the parts are merged. An embedding or a head is then weighted block
by block.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.calibrate.data import Calibration
from bmjax.calibrate.hidden import Hidden
from bmjax.calibrate.models import Index, Models, Tree, pieces
from bmjax.calibrate.programs import Shares, advance, cast
from bmjax.calibrate.progress import Progress
from bmjax.config import UserError
from bmjax.io.atomic import replacing_file
from bmjax.merge.recipe.calibration import CalibrationSettings
from bmjax.model import parts
from bmjax.model.batch import Batch
from bmjax.model.config import ModelConfig
from bmjax.model.spec import Param, get, unflatten
from bmjax.parallel import turns
from bmjax.parallel.mesh import sharding


class Fisher:
    """The contributions to all parameters, by squared gradients that it computes when it is made."""

    def __init__(
        self, models: Models, calibration: Calibration, p: CalibrationSettings, folder: Path, progress: Progress
    ) -> None:
        self._models, self._folder, self._progress = models, folder, progress
        for i, name in enumerate(models.branches):
            batches = list(calibration.rows(i, p.rows, "squares"))
            squares(models, name, batches, p.compute_dtype, folder, f"fisher-{i}", progress)

    def shares(self, part: int, models: Sequence[Tree]) -> Shares:
        """Return the contributions to a part's parameters, float32; block by block to the embedding and the head."""
        config = self._models.config
        shares: dict[tuple[str, ...], Any] = {}
        for row in parts.rows(config, part):
            of_block = functools.partial(self._of_block, part, row)
            if 1 <= part <= config.num_layers:  # the programs of a layer take whole arrays
                all_of_it = tuple(slice(0, size) for size in row.shape)
                shares[row.path] = of_block(all_of_it, [get(tree, row.path) for tree in models])
            else:
                shares[row.path] = of_block
        return shares

    def _of_block(self, part: int, row: Param, index: Index, models: Sequence[jax.Array]) -> list[jax.Array]:
        """Return every branch's contribution to a block of a parameter. models: the same block of all models."""
        layout = sharding(self._models.mesh, row.axes, models[0].shape)
        squared, means = [], []
        for i in range(len(models) - 1):
            array = np.load(squares_file(self._folder, f"fisher-{i}", row.hf_key), mmap_mode="r")
            block = np.array(array[index[::-1] if row.transposed else index])
            squared.append(jax.device_put(block.T if row.transposed else block, layout))
            means.append(np.float32(self._progress.get(f"fisher-{i}/backward/{part}")[row.hf_key]))
        contributions: list[jax.Array] = weighted(models, squared, means)
        return contributions

    def flush(self, position: int) -> None:
        """Nothing of it changes while parts are merged."""


@turns.jit
def weighted(models: Sequence[jax.Array], squared: Sequence[jax.Array], means: Sequence[jax.Array]) -> list[jax.Array]:
    """Return contributions by squared gradients, each over its mean; the plain ones where all are 0.

    Arguments:
        models: a parameter of the base and of every branch, or a block of it.
        squared: of every branch.
        means: of the whole parameter's squares, of every branch.
    """
    base, *branches = (leaf.astype(jnp.float32) for leaf in models)
    plain = [(branch - base) / len(branches) for branch in branches]
    weights = [f / jnp.where(m > 0, m, 1.0) for f, m in zip(squared, means, strict=True)]
    total = sum(weights)
    some = total > 0
    return [jnp.where(some, len(plain) * w / jnp.where(some, total, 1.0), 1.0) * c
            for w, c in zip(weights, plain, strict=True)]  # fmt: skip


def squares_file(folder: Path, label: str, key: str) -> Path:
    """Return the file of a parameter's squares, an array of the shape of its tensor in a checkpoint."""
    return folder / f"{label}-{key}.npy"


def _save(path: Path, row: Param, squared: np.ndarray) -> float:
    """Write a parameter's squares, of which a block is read in one go; returns their mean."""
    total = np.float64(0)
    with replacing_file(path) as file:
        descr = np.lib.format.dtype_to_descr(squared.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": row.hf_shape}
        np.lib.format.write_array_header_1_0(file, header)
        for index in pieces(row, None):
            block = squared[index].T if row.transposed else squared[index]
            total += np.sum(block, dtype=np.float64)
            file.write(np.ascontiguousarray(block).data)
    return float(total / squared.size)


def squares(
    models: Models, name: str, batches: Sequence[Batch[jax.Array]], dtype: str, folder: Path, label: str,
    progress: Progress,
) -> None:  # fmt: skip
    """Write the sum over packed rows of the squared gradient of each row's summed loss, float32.

    progress: parts that it has are not computed again. A part's entry holds the mean of every tensor's squares.
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
        params = cast(compute, models.load_one(name, part)) if part or config.tied else {}
        if part == last + 1 and config.tied:
            params |= cast(compute, models.load_one(name, 0))
        kept = {
            row.path: jnp.zeros(row.shape, jnp.float32, device=sharding(models.mesh, row.axes, row.shape))
            for row in parts.rows(config, part)
        }
        for i, batch in enumerate(batches):
            if part == 0:
                norm = cast(compute, models.load_one(name, last + 1)) if config.tied else {}
                final = trace.read(last + 1, i) if config.tied else None
                kept = _embedding_squares(config, compute, params | norm, batch, final, gradient.read(1, i), kept)
                continue
            window = parts.window(config, part) if part <= last else None
            dy = gradient.read(part + 1, i) if part <= last else None
            dx, kept = _part_squares(config, params, batch, trace.read(part, i), window, dy, kept)
            gradient.write(part, i, dx)
        del params
        means = {}
        for row in parts.rows(config, part):
            path = squares_file(folder, label, row.hf_key)
            mean = means[row.hf_key] = _save(path, row, np.asarray(kept.pop(row.path)))
            if not np.isfinite(mean):
                for any_part in range(last + 2):  # a weight that is no number is named itself
                    models.check_finite(any_part)
                raise UserError(
                    f"along: fisher: model '{name}': the squared gradients of tensor '{row.hf_key}' are NaN or "
                    "infinite on the rows of its domain; its weights are too large to weigh it by them"
                )
        if part:
            gradient.flush(part)
        progress.put(f"{label}/backward/{part}", means)
    every_mean = [mean for part in range(last + 2) for mean in progress.get(f"{label}/backward/{part}").values()]
    if not any(every_mean):
        raise UserError(
            f"along: fisher: model '{name}': all squared gradients are 0 on the rows of its domain, from tensor "
            f"'{parts.rows(config, last + 1)[0].hf_key}' on; its weights are too large, or none decides what it writes"
        )


def _over_rows(add: Callable[..., Any], kept: Any, *arrays: Any) -> tuple[Any, Any]:
    """Scan `add(kept, row...)` over the rows of a batch, each as a batch of one."""

    def one(kept: Any, rows: Any) -> tuple[Any, Any]:
        kept, result = add(kept, *jax.tree.map(lambda array: array[None], rows))
        return kept, jax.tree.map(lambda array: array[0], result)

    return jax.lax.scan(one, kept, arrays)


def _add(kept: dict[tuple[str, ...], jax.Array], gradients: Tree) -> dict[tuple[str, ...], jax.Array]:
    return {path: total + jnp.square(get(gradients, path).astype(jnp.float32)) for path, total in kept.items()}


@functools.partial(turns.jit, static_argnums=0, donate_argnums=6)
def _part_squares(
    config: ModelConfig, params: Tree, batch: Batch[jax.Array], x_BTD: jax.Array, window: Any, dy_BTD: Any, kept: Any
) -> tuple[jax.Array, Any]:
    """Return the gradient of the loss by the input of a layer (or of the head, without `dy`), and `kept` with the rows'
    squares added."""

    def add_row(kept: Any, row: Batch[jax.Array], x: jax.Array, *dy: jax.Array) -> tuple[Any, jax.Array]:
        def run(params: Tree, x: jax.Array) -> jax.Array:
            if not dy:
                return parts.loss_sum(config, params, x, row)[0]
            return parts.layer(config, params, x, row.segment_ids, window)

        gradients, dx = jax.vjp(run, params, x)[1](dy[0] if dy else jnp.float32(1))
        return _add(kept, gradients), dx

    kept, dx_BTD = _over_rows(add_row, kept, batch, x_BTD, *([] if dy_BTD is None else [dy_BTD]))
    return dx_BTD, kept


@functools.partial(turns.jit, static_argnums=(0, 1), donate_argnums=6)
def _embedding_squares(
    config: ModelConfig, dtype: Any, params: Tree, batch: Batch[jax.Array], final_BTD: Any, dx_BTD: jax.Array, kept: Any
) -> Any:
    """Return `kept` with the embedding's squares added; a tied head adds to a gradient before it is squared.

    params: of the embedding and the final norm where the head is tied, else none.
    """

    def add_row(kept: Any, row: Batch[jax.Array], dx: jax.Array, *final: jax.Array) -> tuple[Any, None]:
        def run(params: Tree) -> tuple[jax.Array, ...]:
            head = [parts.loss_sum(config, params, x, row)[0] for x in final]
            return parts.embed(config, params, row.tokens, dtype), *head

        # The gradient of a lookup is the same for every table.
        tables = params or unflatten((path, jnp.zeros_like(total, dtype)) for path, total in kept.items())
        (gradients,) = jax.vjp(run, tables)[1]((dx, *(jnp.float32(1) for _ in final)))
        return _add(kept, gradients), None

    return _over_rows(add_row, kept, batch, dx_BTD, *([] if final_BTD is None else [final_BTD]))[0]
