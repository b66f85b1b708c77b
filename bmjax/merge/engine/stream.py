"""The tensors of a plan, from files to files: several at once, largest first, each in chunks on a pool of threads.

files.py calls it. It writes tensors, their statistics and checksums, and no other file.
"""

import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import numpy as np

from bmjax.config import UserError
from bmjax.io.safetensors import Reader, SharedWriter, TensorInfo, units
from bmjax.merge.engine.chunks import CHUNK, SAMPLE, Chunk, ChunkCache, StoredTensor, View, block_digest, digest
from bmjax.merge.engine.device import compute_on
from bmjax.merge.engine.journal import Journal
from bmjax.merge.engine.masks import is_shared_mask
from bmjax.merge.engine.quantile import NotFiniteError
from bmjax.merge.engine.read_ahead import ReadAhead
from bmjax.merge.engine.zeros import vanished, zero_models
from bmjax.merge.methods.arcee_fusion import agreement
from bmjax.merge.plan.node import Node, TensorSource
from bmjax.merge.plan.nodes import MergePlan
from bmjax.merge.plan.token_rows import row_reader
from bmjax.merge.report.statistics import Stats, TensorStats, check_overflow

FLUSH_BYTES = 2**27
SAMPLED = 24  # tensors
TENSORS = 2  # at once, so that a small one fills the gaps of a large one
Progress = Callable[[int, int, str], None]
StoredKey = tuple[str, str, int]


class Stream:
    """One merge's work.

    Arguments:
        memory: bytes for what is kept of inputs between passes and for chunks at work.
        device: to compute on.
    """

    def __init__(self, plan: MergePlan, writer: SharedWriter, journal: Journal, memory: int, device: Any) -> None:
        self.recipe, self.models, self.writer, self.journal = plan.recipe, plan.models, writer, journal
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # A chunk at work takes its inputs and about twice as many float32 arrays.
        at_work = CHUNK * 4 * (2 * len(self.models) + 4)
        self._device = device
        self._pool = ThreadPoolExecutor(
            max(1, min(cores, memory // 2 // at_work)), "merge-chunk", initializer=compute_on, initargs=(device,)
        )
        self._flusher = ThreadPoolExecutor(1, "merge-flush")
        self._memory = memory // (2 * TENSORS)
        self._files = Reader()
        self._sampled: set[str] = set()
        self._done, self._unflushed, self._lock = 0, 0, threading.Lock()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._flusher.shutdown(cancel_futures=True)
        self._files.close()

    def run(self, nodes: Sequence[Node], progress: Progress) -> dict[str, TensorStats]:
        """Write every tensor that the journal has not. Returns the statistics of all merged ones, in the plan's order.

        Raises UserError for inputs that cannot be merged; what other tensors had begun is then left.
        """
        bytes_read = {node.name: sum(info.nbytes for info in self._infos(node).values()) for node in nodes}
        total = sum(bytes_read.values())

        largest_first = sorted(nodes, key=lambda node: -math.prod(node.shape))
        unwritten = [node for node in largest_first if self.journal.stats(node.name) is None]
        ahead = ReadAhead(self._files, {node.name: list(self._infos(node).values()) for node in unwritten})

        def work(node: Node) -> TensorStats:
            stats = self.journal.stats(node.name)
            if stats is None:
                stats = self._tensor(node, functools.partial(ahead.add, node.name))
                ahead.finish(node.name)
            with self._lock:
                self._done += bytes_read[node.name]
                progress(self._done, total, node.name)
            return stats

        # Where the masks of formulas are compared: some matrices, over all depths.
        matrices = [node.name for node in nodes if len(node.shape) == 2]
        self._sampled = set(matrices[:: max(1, len(matrices) // SAMPLED)])
        driving = ThreadPoolExecutor(TENSORS, "merge-tensor", initializer=compute_on, initargs=(self._device,))
        with contextlib.closing(ahead), driving as drivers:
            futures = {node.name: drivers.submit(work, node) for node in largest_first}
            try:
                wait(futures.values(), return_when=FIRST_EXCEPTION)
            finally:
                drivers.shutdown(cancel_futures=True)
            # One that failed comes before those that were cancelled for it.
            stats = {name: future.result() for name, future in futures.items()}
        return {node.name: stats[node.name] for node in nodes if stats[node.name]}

    def _infos(self, node: Node) -> dict[tuple[str, str], TensorInfo]:
        """Return the stored tensors that a node is made of, by model and name."""
        return {(model, tensor): self.models[model].tensors[tensor] for model, tensor in node.files()}

    def _tensor(self, node: Node, count_read: Callable[[int], None]) -> TensorStats:
        """Merge or copy a node's tensor. count_read: is called with bytes of inputs as they are read."""
        infos = self._infos(node)
        if not node.floating:
            return self._copy(node, infos)
        # The stored tensors that the steps read, each once.
        nodes = _schedule(node)
        stored: dict[StoredKey, StoredTensor] = {}
        for model, source in (pair for n in nodes for pair in n.inputs.items()):
            if source.node is not None or _stored_key(model, source) in stored:
                continue
            info = self.models[model].tensors[source.tensor]
            read: Callable[[int, np.ndarray], None] = functools.partial(self._files.read, info)
            if source.rows is not None:
                others = [(self.models[m].tensors[tensor], rows) for m, tensor, rows in source.others]
                read = row_reader(info, source.rows, others, self._files.read)
            stored[_stored_key(model, source)] = StoredTensor(model, source.tensor, info.numpy_dtype, read, count_read)
        # Memory says what is kept between passes; it changes no result.
        stored_bytes = sum(min(4, tensor.dtype.itemsize) for tensor in stored.values()) * math.prod(node.shape)
        by_row = any(n.step.method.by_row for n in nodes)
        cache = ChunkCache(node.shape, by_row, self._pool, keep=stored_bytes <= self._memory)
        try:
            return self._merge(nodes, stored, cache)
        except NotFiniteError:
            if is_shared_mask(stored.values(), cache.chunks):
                return self._copy_mask(node, next(iter(stored.values())), cache)
            for broken in stored.values():
                broken.check_finite(cache.chunks)
            raise

    def _merge(self, nodes: Sequence[Node], stored: Mapping[StoredKey, StoredTensor], cache: ChunkCache) -> TensorStats:
        """Merge the last node's tensor. nodes: it and the earlier steps' ones, in the order of the steps."""
        node = nodes[-1]
        # The passes that precede the result, step by step: those of a step read the results of earlier ones.
        views: dict[Node, View] = {}
        for n in nodes:
            inputs = {
                model: stored[_stored_key(model, source)] if source.node is None else views[source.node]
                for model, source in n.inputs.items()
            }
            views[n] = View(self.recipe, n, inputs, cache, self._memory)
            views[n].prepare(n.arguments)

        # The result, with the statistics of every step.
        copied = next(iter(stored.values())) if node.is_copy else None
        if copied is not None and copied.dtype != node.dtype:
            copied = None
        may_vanish = node.dtype == np.float16 and any(tensor.dtype != np.float16 for tensor in stored.values())

        def write(chunk: Chunk) -> tuple[bytes, np.ndarray, list[np.ndarray]]:
            results: dict[View, Any] = {}
            leaf = np.asarray(views[node].compute(chunk, results)).reshape(-1)[: chunk.count]
            x = results[views[node]][0]

            def exact() -> np.ndarray:
                values, _ = views[node].result(x, chunk, np.dtype(np.float32))
                return np.asarray(values).reshape(-1)[: chunk.count]

            lost = vanished(leaf, exact) if may_vanish else np.zeros(2, np.int64)
            if copied is not None:
                is_read_whole = copied.dtype != np.float64
                leaf = np.asarray(x.branches[0]).reshape(-1)[: chunk.count] if is_read_whole else copied.raw(chunk)
            leaf = leaf.astype(node.dtype, copy=False)
            self.writer.write(node.name, chunk.start * node.dtype.itemsize, leaf)
            return block_digest(leaf), lost, [views[n].statistics(*results[views[n]]) for n in nodes]

        digests, losses, chunk_sums = zip(*cache.map(write, cache.chunks), strict=True)
        stats: dict[str, Stats] = {}
        for n, *sums in zip(nodes, *chunk_sums, strict=True):
            of_step = Stats.of(cache.size, n.step.branches, np.sum(sums, axis=0))
            if node.name in self._sampled and n.step.method.name == "arcee_fusion":
                of_step = replace(of_step, agreement=agreement(views[n].sample_of_rows(SAMPLE // 4)))
            read = {m: stored[_stored_key(m, source)] for m, source in n.inputs.items() if source.node is None}
            if len(node.shape) > 1 or "norm" in node.name:  # biases may be zero
                reference = n.step.base or n.step.branches[0]
                of_step = replace(of_step, zero=zero_models(of_step, reference, read, cache.chunks))
            stats[n.step.name] = of_step
        lost, remaining = np.sum(losses, axis=0).tolist()
        stats[node.step.name] = replace(stats[node.step.name], vanished=(lost, remaining))

        # What may be wrong with them, and the journal's line.
        if not all(np.isfinite([*s.products.flat, s.reference, s.moved]).all() for s in stats.values()):
            if is_shared_mask(stored.values(), cache.chunks):
                return self._copy_mask(node, next(iter(stored.values())), cache)
            for tensor in stored.values():
                tensor.check_finite(cache.chunks, as_stored=copied is not None)
            stats = stats if copied is None else {}  # those of float64 beyond float32 say nothing
        if copied is None:
            check_overflow(node.name, stats[node.step.name], node.dtype)
        checksums: dict[str, dict[str, str]] = {}
        for tensor in stored.values():
            checksum = digest(tensor.digests[i] for i in sorted(tensor.digests))
            checksums.setdefault(tensor.model, {})[tensor.tensor] = checksum
        self.journal.add(node.name, stats, cache.chunk_rows * cache.columns, digest(digests), checksums)

        # What was written goes to the disk while the merge goes on, instead of all at its end.
        with self._lock:
            self._unflushed += cache.size * node.dtype.itemsize
            if self._unflushed >= FLUSH_BYTES:
                self._unflushed = 0
                self._flusher.submit(self.writer.flush, node.name)
        return stats

    def _copy_mask(self, node: Node, mask: StoredTensor, cache: ChunkCache) -> TensorStats:
        """Write a mask of infinities, which all models share, and of which there are no statistics."""
        blocks = []
        for chunk in cache.chunks:
            with np.errstate(over="ignore"):  # the least number of a wider type becomes -inf
                out = mask.raw(chunk).astype(node.dtype)
            self.writer.write(node.name, chunk.start * node.dtype.itemsize, out)
            blocks.append(block_digest(out))
        self.journal.add(node.name, {}, cache.chunk_rows * cache.columns, digest(blocks), {})
        return {}

    def _copy(self, node: Node, infos: Mapping[tuple[str, str], TensorInfo]) -> TensorStats:
        """Copy a tensor that is not floating-point, as a mask or a table of positions; all models must agree."""
        ((first, _), info), *others = infos.items()
        (unit, size), blocks = units(info.numpy_dtype, node.shape), []
        for start in range(0, size, CHUNK):
            out = np.empty(min(CHUNK, size - start), unit)
            self._files.read(info, start, out)
            for (name, _), other in others:
                copy = np.empty(len(out), units(other.numpy_dtype, ())[0])
                self._files.read(other, start, copy)
                if other.dtype != info.dtype or copy.tobytes() != out.tobytes():
                    raise UserError(
                        f"tensor '{node.name}' is {info.numpy_dtype} and differs between models '{first}' and "
                        f"'{name}'; only floating-point tensors can be merged"
                    )
            self.writer.write(node.name, start * unit.itemsize, out)
            blocks.append(block_digest(out))
        self.journal.add(node.name, {}, CHUNK, digest(blocks), {})
        return {}


def _stored_key(model: str, source: TensorSource) -> StoredKey:
    """Return what makes two reads of stored tensors the same: model, tensor and order of the rows."""
    return (model, source.tensor, id(source.rows))


def _schedule(node: Node, ordered: Sequence[Node] = ()) -> list[Node]:
    """Return the nodes in `ordered`, then those that a node reads, earlier steps first, then the node: each once."""
    nodes = list(ordered)
    for source in node.inputs.values():
        if source.node is not None and source.node not in nodes:
            nodes = _schedule(source.node, nodes)
    return [*nodes, node]
