"""Files of weights that end in zeros, as a download leaves them that reserved its place and was cut off.

`plan` calls it. Of each file little is read: its last bytes, and of a table of tokens, whose last rows may be padding,
some bytes over its last half. Zeros elsewhere are found as tensors are merged, see engine/zeros.py.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from bmjax.io.safetensors import Checkpoint, Reader, TensorInfo
from bmjax.merge.plan.node import FLOATS
from bmjax.merge.plan.tensor_names import is_vocabulary

_LEAST, _TAIL, _PIECES, _PIECE = 64, 4096, 32, 512  # bytes, but for the number of pieces


def ends_in_zeros(models: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Yield a line for every file whose last tensor ends in zeros, while no other model's does.

    Biases may be zero, and tensors of a few entries.
    """
    with contextlib.closing(Reader()) as reader:
        for model, checkpoint in models.items():
            last: dict[Path, tuple[str, TensorInfo]] = {}
            for name, info in checkpoint.tensors.items():
                if type(info) is TensorInfo and (info.file not in last or info.start > last[info.file][1].start):
                    last[info.file] = name, info
            for file, (name, info) in last.items():
                if info.dtype not in FLOATS or info.nbytes < _LEAST or name.endswith("bias"):
                    continue
                others = (other.tensors.get(name) for key, other in models.items() if key != model)
                if _has_zero_end(reader, info) and not any(_has_zero_end(reader, o) for o in others if o is not None):
                    yield (
                        f"model '{model}': {file.name} ends in zeros, in tensor '{name}': was its download cut off? "
                        "Compare it with the original"
                    )


def _has_zero_end(reader: Reader, info: TensorInfo) -> bool:
    if type(info) is not TensorInfo:
        return False
    end = info.start + info.nbytes
    parts = [(end - min(info.nbytes, _TAIL), min(info.nbytes, _TAIL))]
    if is_vocabulary(info.name):
        step, size = info.nbytes // 2 // _PIECES, min(_PIECE, info.nbytes // 2)
        parts += [(end - size - i * step, size) for i in range(_PIECES)]
    for start, size in parts:
        part = np.empty(size, np.uint8)
        reader.read_bytes(info.file, start, part)
        if part.any():
            return False
    return True
