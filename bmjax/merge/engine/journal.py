"""The journal of a merge, beside its unfinished files: after a kill the next run goes on from it.

files.py opens it, stream.py adds a line for every finished tensor. It is no part of the result.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.io.safetensors import SharedWriter, units
from bmjax.merge.engine.chunks import block_digest, digest, digest_of_tensors
from bmjax.merge.report.statistics import Stats, TensorStats

NAME = "merge_journal.jsonl"
_KEYS = {"name", "digest", "block", "sources", "stats"}


def clear(folder: Path, keep: Sequence[Path] = ()) -> None:
    """Remove what is in a folder but for the files in `keep`."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path not in keep:
            path.unlink()


class Journal:
    """A file with one line a finished tensor: its statistics, its checksum and those of what it was made of."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        """Go on with what `folder` holds of a merge with this fingerprint, or clear it of anything else."""
        self.path, self._lock = folder / NAME, threading.Lock()
        # The lines that are whole: a kill may have cut off the last one; a machine's fall may have put anything there.
        lines: list[Any] = []
        with contextlib.suppress(OSError, ValueError):
            for text in self.path.read_bytes().split(b"\n"):
                line = json.loads(text)
                if not isinstance(line, dict) or (lines and not line.keys() >= _KEYS):
                    break
                lines.append(line)
        if lines[:1] != [dict(fingerprint)]:
            clear(folder)
            lines = [fingerprint]
        # What follows a line that is cut off would not be read next time.
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self._tensors = {line["name"]: line for line in lines[1:]}
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def check(self, writer: SharedWriter, rows: Sequence[tuple[str, np.dtype, tuple[int, ...]]]) -> None:
        """Forget tensors whose bytes in the files are not those that were written."""
        for name, dtype, shape in rows:
            if name not in self._tensors:
                continue
            (unit, size), step, blocks = units(dtype, shape), int(self._tensors[name]["block"]), []
            for start in range(0, size, step):
                part = np.empty(min(step, size - start), unit)
                writer.read(name, start * unit.itemsize, part)
                blocks.append(block_digest(part))
            if digest(blocks) != self._tensors[name]["digest"]:
                del self._tensors[name]

    def stats(self, name: str) -> TensorStats | None:
        """Return the statistics of a finished tensor, by step; None for one that is to be made."""
        line = self._tensors.get(name)
        return None if line is None else {step: Stats.read(plain) for step, plain in line["stats"].items()}

    def add(
        self, name: str, stats: TensorStats, block: int, checksum: str, sources: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Add a tensor that is written. block: entries of a checksum's block. sources: checksums by model, tensor."""
        plain = {step: s.plain() for step, s in stats.items()}
        line = {"name": name, "digest": checksum, "block": block, "sources": sources, "stats": plain}
        with self._lock:
            self._tensors[name] = line
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def checksums(self) -> dict[str, str]:
        return {name: self._tensors[name]["digest"] for name in sorted(self._tensors)}

    def source(self, model: str) -> str:
        """Return one checksum of all tensors read of a model."""
        lines = self._tensors.values()
        return digest_of_tensors({t: d for line in lines for t, d in line["sources"].get(model, {}).items()})

    def close(self, remove: bool = False) -> None:
        self._file.close()
        if remove:
            os.unlink(self.path)
