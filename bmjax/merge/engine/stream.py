"""The tensors of a plan, from files to files: several at once, largest first, each in chunks on a pool of threads."""

import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from bmjax.config import UserError
from bmjax.io.safetensors import Checkpoint, Reader, SharedWriter, TensorInfo
from bmjax.merge.engine import passes
from bmjax.merge.engine.chunks import CHUNK, SAMPLE, Chunk, Job, NotFiniteError, Source, View, totals
from bmjax.merge.engine.journal import Journal, block_digest, digest
from bmjax.merge.methods.arcee_fusion import agreement, three_importances
from bmjax.merge.plan.nodes import Node
from bmjax.merge.plan.token_rows import row_reader
from bmjax.merge.recipe.recipe import Recipe
from bmjax.merge.report.statistics import Stats, TensorStats, check_overflow, keys

FLUSH_BYTES = 2**27
SAMPLED = 24  # tensors
Progress = Callable[[int, int, str], None]


class Stream:
    """One merge's work. memory: bytes for what is kept of inputs between passes and for chunks at work."""

    def __init__(
        self, recipe: Recipe, models: Mapping[str, Checkpoint], writer: SharedWriter, journal: Journal, memory: int
    ) -> None:
        self.recipe, self.models, self.writer, self.journal = recipe, models, writer, journal
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._tensors = 2  # at once, so that a small one fills the gaps of a large one
        # A chunk at work takes its inputs and about twice as many float32 arrays.
        at_work = CHUNK * 4 * (2 * len(models) + 4)
        self._pool = ThreadPoolExecutor(max(1, min(cores, memory // 2 // at_work)), "merge-chunk")
        self._flusher = ThreadPoolExecutor(1, "merge-flush")
        self._memory = memory // (2 * self._tensors)
        self._files = Reader()
        self._sampled: set[str] = set()
        self._done, self._unflushed, self._lock, self._stop = 0, 0, threading.Lock(), threading.Event()

    def close(self) -> None:
        """Ends the threads and closes the files."""
        self._pool.shutdown(cancel_futures=True)
        self._flusher.shutdown(cancel_futures=True)
        self._files.close()

    def run(self, nodes: Sequence[Node], progress: Progress) -> dict[str, TensorStats]:
        """Writes every tensor that the journal has not; the statistics of all that were merged, in the plan's order."""
        total = sum(self._bytes_read(node) for node in nodes)

        def work(node: Node) -> TensorStats:
            stats = self.journal.stats(node.name)
            if stats is None:
                if self._stop.is_set():
                    return {}
                try:
                    stats = self._tensor(node)
                except BaseException:
                    self._stop.set()
                    raise
            with self._lock:
                self._done += self._bytes_read(node)
                progress(self._done, total, node.name)
            return stats

        # Where the masks of formulas are compared: some matrices, over all depths.
        matrices = [node.name for node in nodes if len(node.shape) == 2]
        self._sampled = set(matrices[:: max(1, len(matrices) // SAMPLED)])
        waiting = sorted(nodes, key=lambda node: -math.prod(node.shape))
        with ThreadPoolExecutor(self._tensors, "merge-tensor") as drivers:
            try:
                found = dict(zip((node.name for node in waiting), drivers.map(work, waiting), strict=True))
            except BaseException:
                self._stop.set()
                raise
        return {node.name: found[node.name] for node in nodes if found[node.name]}

    def _bytes_read(self, node: Node) -> int:
        return sum(info.nbytes for info in self._infos(node).values())

    def _infos(self, node: Node) -> dict[tuple[str, str], TensorInfo]:
        """The stored tensors that a node is made of, by model and name."""
        return {(model, tensor): self.models[model].tensors[tensor] for model, tensor in node.files()}

    def _tensor(self, node: Node) -> TensorStats:
        infos = self._infos(node)
        if not node.floating or 0 in node.shape:
            return self._copy(node, infos)
        job = Job(node.shape, any(n.step.method.by_row for n in _nodes(node)), self._pool, self._memory)
        sources: dict[Any, Source] = {}
        views: dict[int, View] = {}
        top = self._view(node, job, sources, views)
        job.keep = sum(min(4, s.dtype.itemsize) for s in sources.values()) * job.geometry.size <= self._memory
        for info in infos.values():
            self._files.advise(info)
        try:
            return self._merge(node, job, top, list(views.values()), list(sources.values()))
        except NotFiniteError:
            for source in sources.values():
                source.check(job.geometry)
            raise

    def _merge(self, node: Node, job: Job, top: View, views: list[View], sources: list[Source]) -> TensorStats:
        for view in views:  # earlier steps first
            view.prepare()
        device = np.dtype(np.float32) if node.dtype == np.float64 else node.dtype

        def write(where: Chunk) -> tuple[bytes, list[np.ndarray]]:
            memo: dict[Any, Any] = {}
            start, count = job.geometry.entries(where.index)
            leaf = np.asarray(top.leaf(where, memo, device)).reshape(-1)[:count].astype(node.dtype, copy=False)
            self.writer.write(node.name, start * node.dtype.itemsize, leaf)
            sums = [passes.statistics()(x, result, kept) for result, x, kept in (memo[view] for view in views)]
            return block_digest(leaf), [np.concatenate([totals(rows) for rows in pair]) for pair in sums]

        chunks = job.each(write)
        stats = {}
        for i, view in enumerate(views):
            found = Stats.of(view.size, view.step.branches, np.sum([sums[i] for _, sums in chunks], axis=0))
            if node.name in self._sampled and view.step.method.name == "arcee_fusion":
                found = replace(found, agreement=agreement(view.values_of_rows(three_importances, SAMPLE // 2)))
            stats[view.step.name] = found
        if not all(np.isfinite([*s.products.flat, s.reference, s.moved]).all() for s in stats.values()):
            for source in sources:
                source.check(job.geometry)
        check_overflow(node.name, stats[top.step.name], node.dtype)
        checksums: dict[str, dict[str, str]] = {}
        for source in sources:
            seen = digest(source.digests[i] for i in sorted(source.digests))
            checksums.setdefault(source.model, {})[source.tensor] = seen
        g = job.geometry
        self.journal.add(node.name, stats, g.chunk_rows * g.columns, digest(d for d, _ in chunks), checksums)
        self._flush(node)
        return stats

    def _flush(self, node: Node) -> None:
        """Has what was written go to the disk while the merge goes on, instead of all at its end."""
        with self._lock:
            self._unflushed += math.prod(node.shape) * node.dtype.itemsize
            due = self._unflushed >= FLUSH_BYTES
            self._unflushed = 0 if due else self._unflushed
        if due:
            self._flusher.submit(self.writer.flush, node.name)

    def _view(self, node: Node, job: Job, sources: dict[Any, Source], views: dict[int, View]) -> View:
        if id(node) in views:
            return views[id(node)]

        def get(model: str) -> Source | View:
            place = node.inputs[model]
            if place.node is not None:
                return self._view(place.node, job, sources, views)
            key = (model, place.tensor, id(place.rows))
            if key not in sources:
                info = self.models[model].tensors[place.tensor]
                read: Callable[[int, np.ndarray], None] = functools.partial(self._files.read, info)
                if place.rows is not None:
                    others = [(self.models[m].tensors[tensor], rows) for m, tensor, rows in place.others]
                    read = row_reader(info, place.rows, others, self._files.read)
                sources[key] = Source(model, place.tensor, info.numpy_dtype, read)
            return sources[key]

        step = node.step
        models = {name: get(model) for name, model in step.named.items()}
        base = None if step.base is None else get(step.base)
        branches = [get(name) for name in step.branches]
        random, compat = keys(self.recipe, step, node.name), self.recipe.compat
        prepare = functools.partial(step.method.merge, arguments=node.arguments)
        # After those of the steps it reads, so that they are prepared in this order.
        views[id(node)] = View(step, job, base, branches, models, random, compat, prepare)
        return views[id(node)]

    def _copy(self, node: Node, infos: Mapping[tuple[str, str], TensorInfo]) -> TensorStats:
        """A tensor that is not floating-point (a mask, a table of positions) must be the same everywhere."""
        (first, info), *others = infos.items()
        size, blocks = math.prod(node.shape), []
        for start in range(0, size, CHUNK):
            out = np.empty(min(CHUNK, size - start), info.numpy_dtype)
            self._files.read(info, start, out)
            for name, other in others:
                copy = np.empty(len(out), other.numpy_dtype)
                self._files.read(other, start, copy)
                if other.dtype != info.dtype or copy.tobytes() != out.tobytes():
                    raise UserError(
                        f"tensor '{node.name}' is {info.numpy_dtype} and differs between models '{first[0]}' and "
                        f"'{name[0]}'; only floating-point tensors can be merged"
                    )
            self.writer.write(node.name, start * info.numpy_dtype.itemsize, out)
            blocks.append(block_digest(out))
        self.journal.add(node.name, {}, CHUNK, digest(blocks), {})
        return {}


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for source in node.inputs.values():
        if source.node is not None:
            yield from _nodes(source.node)
