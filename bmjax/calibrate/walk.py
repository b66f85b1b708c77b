"""One walk over the parts of all models: each is merged, written, judged on held-out rows, and dropped.

steps.py walks once with the coefficients as they start, and again with learned ones. A walk that was killed goes on
after its last finished part.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.calibrate.hidden import Batches, Hidden, save_array
from bmjax.calibrate.judge import Loss, by_document, joined
from bmjax.calibrate.models import Index, Models, Tree, piece, pieces
from bmjax.calibrate.programs import (
    Shares,
    advance,
    assemble,
    cast,
    chunks,
    losses_by_token,
    merge_chunk_with_sums,
    merge_part,
)
from bmjax.calibrate.progress import Progress
from bmjax.io.safetensors import SharedWriter
from bmjax.merge.engine import passes
from bmjax.merge.recipe.calibration import CalibrationSettings
from bmjax.merge.recipe.step import Step
from bmjax.merge.report.statistics import Stats, TensorStats, check_overflow
from bmjax.model import parts
from bmjax.model.config import ModelConfig
from bmjax.model.spec import Param, get, unflatten
from bmjax.weights import hf


class Contributions(Protocol):
    """What the coefficients multiply. Parts are asked for in their order."""

    def shares(self, part: int, models: Sequence[Tree]) -> Shares: ...

    def flush(self, position: int) -> None: ...


class Changes:
    """The plain mean of the changes: nothing but the models is needed."""

    def shares(self, part: int, models: Sequence[Tree]) -> Shares:
        return {}

    def flush(self, position: int) -> None: ...


class Stored:
    """Contributions kept on disk from the first walk, for those that follow."""

    def __init__(self, contributions: Contributions, config: ModelConfig, folder: Path, in_memory: bool) -> None:
        """in_memory: whether those that were read stay in memory, too."""
        self._contributions, self._config, self._folder = contributions, config, folder
        self._kept: dict[int, Shares] | None = {} if in_memory else None
        folder.mkdir(parents=True, exist_ok=True)

    def shares(self, part: int, models: Sequence[Tree]) -> Shares:
        if self._kept is None:
            return self._on_disk(part, models)
        if part not in self._kept:
            self._kept[part] = self._on_disk(part, models)
        return self._kept[part]

    def _on_disk(self, part: int, models: Sequence[Tree]) -> Shares:
        if (self._folder / f"{part}.done").exists():
            shares = {}
            for row in parts.rows(self._config, part):
                files = [self._folder / f"{row.hf_key}-{i}.npy" for i in range(len(models) - 1)]
                if files[0].exists():
                    layout = get(models[0], row.path).sharding
                    shares[row.path] = [jax.device_put(np.load(file, mmap_mode="r"), layout) for file in files]
            return shares
        computed = self._contributions.shares(part, models)
        for row in parts.rows(self._config, part):
            whole: Any = computed.get(row.path, ())  # as all contributions to layers are
            for i, share in enumerate(whole):
                save_array(self._folder / f"{row.hf_key}-{i}.npy", share)
        self._contributions.flush(part + 1)
        (self._folder / f"{part}.done").touch()
        return computed

    def flush(self, position: int) -> None: ...


class Chooser(Protocol):
    """What gives a walk the coefficients of every part."""

    def factors(self, part: int, models: Sequence[Tree], shares: Shares) -> list[Tree]:
        """Return each branch's coefficients of a part."""

    def follow(self, part: int, models: Sequence[Tree], merged: Tree) -> None:
        """Take notice of a merged part, in the type to compute in."""

    def flush(self, position: int) -> None:
        """Put on disk what part `position` needs."""


class Judged:
    """The held-out rows of every domain under one model that is known part by part."""

    def __init__(self, folder: Path, label: str, models: Models, held_out: Sequence[Batches], dtype: str) -> None:
        self._config, self._dtype = models.config, dtype
        self._streams = [
            Hidden(folder, f"{label}-{i}", batches, models.config.hidden_size, jnp.dtype(dtype), models.mesh)
            for i, batches in enumerate(held_out)
        ]

    def follow(self, part: int, params: Tree) -> None:
        """Take the rows through the embedding or a layer."""
        weights = cast(self._dtype, params)
        for stream in self._streams:
            advance(self._config, part, weights, stream, jnp.dtype(self._dtype))

    def losses(self, params: Tree) -> list[Loss]:
        """Return the loss of each domain. params: of the final norm and the matrix that is the head."""
        weights, losses = cast(self._dtype, params), []
        for stream in self._streams:
            of_batches = []
            for i, batch in enumerate(stream.batches):
                states = stream.read(self._config.num_layers + 1, i)
                nats, mask = losses_by_token(self._config, weights, states, batch)
                of_batches.append(by_document(nats, mask, batch.segment_ids))
            losses.append(joined(of_batches))
        return losses

    def flush(self, position: int) -> None:
        for stream in self._streams:
            stream.flush(position)


@dataclass(frozen=True)
class Work:
    """What all walks of a step share."""

    step: Step
    p: CalibrationSettings
    models: Models
    contributions: Contributions
    held_out: Sequence[Batches]  # of each domain
    folder: Path  # for what only this step needs
    progress: Progress

    def paths(self, part: int) -> tuple[tuple[str, ...], ...]:
        return tuple(row.path for row in parts.rows(self.models.config, part))


def walk(
    work: Work, label: str, chooser: Chooser, writer: SharedWriter | None, dtype: Any, judge: dict[str, str]
) -> tuple[dict[str, TensorStats], dict[str, list[Loss]]]:
    """Merge one part after another.

    Arguments:
        label: of this walk in the journal.
        writer: of the result; None: it is only judged.
        judge: which models are judged, `base` and `merged`, each by the name that its losses get.
    Returns:
        The statistics by tensor, and the held-out losses of the domains by name.
    """
    models, config, progress = work.models, work.models.config, work.progress
    judged = {kind: Judged(work.folder, f"{label}-{kind}", models, work.held_out, work.p.compute_dtype)
              for kind in judge}  # fmt: skip
    losses: dict[str, list[Loss]] = {}
    stats: dict[str, TensorStats] = {}
    for part in range(parts.count(config)):
        key, last = f"{label}/{part}", part == parts.count(config) - 1
        finished = progress.get(key)
        if finished is None:
            finished = _merge_part(work, label, part, chooser, writer, np.dtype(dtype), judged, judge, last)
            # What the next part needs is on disk before the journal says so.
            if not last:
                work.contributions.flush(part + 1)
                chooser.flush(part + 1)
                for of_model in judged.values():
                    of_model.flush(part + 1)
            progress.put(key, finished)
        for name, plain in finished["stats"].items():
            stats[name] = {work.step.name: Stats.read(plain)}
        for name, checksums in finished["checksums"].items():
            models.checksums[name] |= checksums
        for name, plain in finished["losses"].items():
            losses[name] = [Loss.read(of_domain) for of_domain in plain]
    return stats, losses


def _merge_part(
    work: Work, label: str, part: int, chooser: Chooser, writer: SharedWriter | None, dtype: np.dtype,
    judged: dict[str, Judged], judge: dict[str, str], last: bool,
) -> dict[str, Any]:  # fmt: skip
    """Merge, write and judge a part; returns its line of the journal."""
    models, config = work.models, work.models.config
    loaded = models.load(part)
    changes = _changes(work, part, loaded)
    # The merged part.
    shares = work.contributions.shares(part, loaded)
    factors = chooser.factors(part, loaded, shares)
    stats: dict[str, Any] = {}
    leaves: dict[tuple[str, ...], jax.Array] = {}
    for row in parts.rows(config, part):
        count = len(loaded) - 1
        sums = np.zeros(1 + 2 * count)
        blocks = _merged_blocks(row, loaded, shares, factors, sums, writer, dtype)
        leaves[row.path] = assemble(row, blocks, work.p.compute_dtype, models.mesh)
        # What is known of the tensor.
        size = int(np.prod(row.shape))
        scales = [np.asarray(get(tree, row.path), np.float64) for tree in factors]
        coefficients = np.array([scale.sum() * (size / scale.size) for scale in scales])
        of_tensor = replace(
            Stats.of(size, work.step.branches, np.array(changes[row.hf_key])),
            moved=float(sums[0]), kept=sums[1 + count :], weighted=(sums[1 : 1 + count], coefficients),
        )  # fmt: skip
        stats[row.hf_key] = of_tensor.plain()
        if writer is not None:
            check_overflow(row.hf_key, of_tensor, dtype)
            writer.flush(row.hf_key)
    merged = unflatten(leaves.items())
    del shares, leaves
    # The rows that go through it.
    losses: dict[str, Any] = {}
    known = {"base": loaded[0], "merged": merged}
    if not last:
        for kind, of_model in judged.items():
            of_model.follow(part, known[kind])
        chooser.follow(part, loaded, merged)
    else:
        del loaded
        for kind, of_model in judged.items():
            params = known.pop(kind)
            if config.tied:
                params |= _embedding(work, chooser, kind)
            losses[judge[kind]] = [loss.plain() for loss in of_model.losses(params)]
    checksums = {
        name: {row.hf_key: known_sums[row.hf_key] for row in parts.rows(config, part) if row.hf_key in known_sums}
        for name, known_sums in models.checksums.items()
    }
    return {"stats": stats, "losses": losses, "checksums": checksums}


def _merged_blocks(
    row: Param, loaded: Sequence[Tree], shares: Shares, factors: Sequence[Tree], sums: np.ndarray,
    writer: SharedWriter | None, dtype: np.dtype,
) -> Iterator[tuple[Index, jax.Array]]:  # fmt: skip
    """Yield the blocks of a merged parameter, float32, each after it was written in `dtype`.

    sums: gets those of `merge_chunk_with_sums`; the first is infinite where a number does not fit in `dtype`.
    """
    row_bytes = int(np.prod(row.hf_shape[1:])) * dtype.itemsize
    for index, arrays in chunks(row, loaded, shares, factors):
        block, of_block = merge_chunk_with_sums(*arrays)
        sums += np.asarray(of_block, np.float64).reshape(len(sums), -1).sum(-1)
        if writer is not None:
            tensor = np.asarray(hf.hf_tensor(block, None, dtype, row.transposed))
            if dtype == np.float16 and not np.isfinite(tensor).all():
                sums[0] = np.inf
            writer.write(row.hf_key, index[-1 if row.transposed else 0].start * row_bytes, tensor)
        yield index, block


def _embedding(work: Work, chooser: Chooser, kind: str) -> Tree:
    """Return the embedding of the base or of the merged model, for the head that is tied to it."""
    if kind == "base":
        return work.models.load_one(next(iter(work.models.checkpoints)), 0)
    loaded = work.models.load(0)
    shares = work.contributions.shares(0, loaded)
    factors = chooser.factors(0, loaded, shares)
    rows = parts.rows(work.models.config, 0)
    return merge_part(rows, loaded, shares, factors, work.p.compute_dtype, work.models.mesh)


def _changes(work: Work, part: int, loaded: Sequence[Tree]) -> dict[str, list[float]]:
    """Return by tensor the sums that `Stats.of` takes; UserError for NaN or infinity."""
    known = work.progress.get(f"changes/{part}")
    if known is not None:
        return dict(known)
    changes = {}
    for row in parts.rows(work.models.config, part):
        leaves, total = [get(tree, row.path) for tree in loaded], np.float64(0)
        for index in pieces(row, leaves[0]):
            base, *branches = (block.reshape(-1, block.shape[-1]) for block in (piece(leaf, index) for leaf in leaves))
            (sums,) = passes.statistics()(passes.block(base, branches, {}), base, [])
            total += np.asarray(sums, np.float64).sum(-1)
        changes[row.hf_key] = np.asarray(total).tolist()
    if not np.isfinite(np.concatenate(list(changes.values()))).all():
        work.models.check_finite(part)
    work.progress.put(f"changes/{part}", changes)
    return changes


class Fixed:
    """Coefficients that are known before a walk. make: gives each branch's of a part."""

    def __init__(self, make: Callable[[int], list[Tree]]) -> None:
        self._make = make

    def factors(self, part: int, models: Sequence[Tree], shares: Shares) -> list[Tree]:
        return self._make(part)

    def follow(self, part: int, models: Sequence[Tree], merged: Tree) -> None: ...

    def flush(self, position: int) -> None: ...
