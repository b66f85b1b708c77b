"""Tensors that are not simply what a model's file holds: computed as they are read, or taken from an adapter.

Blockwise FP8 is multiplied by its scales, and to a matrix the product of a LoRA adapter is added. Each reads only the
rows that are asked for, so memory does not grow with the tensor. They are read as float32. What a merge writes takes
the type that the model's own tensor has.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bmjax.io.safetensors import Reader, TensorInfo


@dataclass(frozen=True)
class _Computed(TensorInfo, ABC):
    """A matrix of which whole rows are computed in float32. `plain` is the stored tensor that it is made of."""

    plain: TensorInfo

    def fill(self, reader: Reader, start: int, out: np.ndarray) -> None:
        columns = self.shape[1]
        first, last = start // columns, -(-(start + out.size) // columns)
        rows = self.rows(reader, first, last).reshape(-1)
        out.reshape(-1)[...] = rows[start - first * columns :][: out.size]

    @abstractmethod
    def rows(self, reader: Reader, first: int, last: int) -> np.ndarray:
        """Return rows `first` to `last` (exclusive), float32 [rows, columns]."""


@dataclass(frozen=True)
class BlockScaledTensor(_Computed):
    """FP8 with a scale for every `block` of rows and columns: DeepSeek-V3's blocks, single rows, or all of it."""

    scales: TensorInfo
    block: tuple[int, int]

    @property
    def kept_dtype(self) -> str:
        return "BF16"

    @property
    def files(self) -> tuple[Path, ...]:
        return self.plain.files + self.scales.files

    def rows(self, reader: Reader, first: int, last: int) -> np.ndarray:
        height, width = self.block
        values = read_rows(reader, self.plain, first, last)
        scales = read_rows(reader, self.scales, first // height, -(-last // height))
        if scales.shape[1] == 1:  # one scale a row of blocks
            values *= np.repeat(scales, height, axis=0)[first % height :][: last - first]
            return values
        for i, scale in enumerate(scales, first // height):
            part = slice(max(0, i * height - first), (i + 1) * height - first)
            values[part] *= np.repeat(scale, width)[: values.shape[1]]
        return values


@dataclass(frozen=True)
class AdaptedTensor(_Computed):
    """`plain` + scale * B A, with A [rank, inputs] and B [outputs, rank].

    transposed: the matrix is stored [inputs, outputs], as an embedding and GPT-2's matrices are.
    """

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool

    @property
    def kept_dtype(self) -> str:
        return self.plain.kept_dtype

    @property
    def files(self) -> tuple[Path, ...]:
        settings = self.a.file.parent / "adapter_config.json"  # the scale's
        return (*self.plain.files, *self.a.files, *self.b.files, settings)

    def rows(self, reader: Reader, first: int, last: int) -> np.ndarray:
        values = read_rows(reader, self.plain, first, last)
        if self.transposed:
            a_columns = read_rows(reader, self.a, 0, self.a.shape[0])[:, first:last]
            return values + np.float32(self.scale) * (a_columns.T @ read_rows(reader, self.b, 0, self.b.shape[0]).T)
        a = read_rows(reader, self.a, 0, self.a.shape[0])
        return values + np.float32(self.scale) * (read_rows(reader, self.b, first, last) @ a)


@dataclass(frozen=True)
class PartsTensor(_Computed):
    """Equal parts of `plain`, along its rows or columns, in another order: some may stand twice, some not at all.

    axis: 0 for parts of `size` rows, 1 for parts of `size` columns. parts: the number of each part in `plain`.
    """

    axis: int
    parts: tuple[int, ...]
    size: int

    @property
    def kept_dtype(self) -> str:
        return self.plain.kept_dtype

    @property
    def files(self) -> tuple[Path, ...]:
        return self.plain.files

    def rows(self, reader: Reader, first: int, last: int) -> np.ndarray:
        if self.axis == 1:
            columns = np.array(self.parts)[:, None] * self.size + np.arange(self.size)
            return read_rows(reader, self.plain, first, last)[:, columns.reshape(-1)]
        pieces = []
        while first < last:
            part, row = divmod(first, self.size)
            count = min(self.size - row, last - first)
            start = self.parts[part] * self.size + row
            pieces.append(read_rows(reader, self.plain, start, start + count))
            first += count
        return np.concatenate(pieces)


@dataclass(frozen=True)
class ReplacementTensor(TensorInfo):
    """A tensor that an adapter holds whole, often in float32 where the model's own, `replaced`, is bfloat16."""

    replaced: TensorInfo

    @property
    def kept_dtype(self) -> str:
        return self.replaced.kept_dtype


def read_rows(reader: Reader, info: TensorInfo, first: int, last: int) -> np.ndarray:
    """Return rows `first` to `last` (exclusive) of a matrix as float32."""
    out = np.empty((last - first, info.shape[1]), info.numpy_dtype)
    reader.read(info, first * info.shape[1], out)
    return out.astype(np.float32)
