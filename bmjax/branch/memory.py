"""What a step takes of a device's memory: what is held from step to step, and the compiler's own account."""

import math
from typing import Any

import jax

GIB = 2**30


def held(state: dict[str, Any]) -> dict[str, float]:
    """Bytes on a chip of the training state by kind, and of the float32 gradients that a step makes of it."""

    def size(tree: Any) -> float:
        leaves = jax.tree.leaves(tree)
        return float(sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves))

    parameters = size(state["params"])
    return {
        "parameters": parameters + size(state["frozen"]) + size(state.get("start", {})),
        "optimizer": size(state["moments"]),
        "gradients": parameters,
    }


def program_bytes(compiled: Any) -> float:
    """Bytes that a compiled program takes on a device: arguments, outputs, temporaries, code."""
    memory = compiled.memory_analysis()
    return float(
        memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )  # fmt: skip


def text(compiled: Any, state: dict[str, Any], device: Any) -> str:
    """One line on what a compiled step takes; state: its training state, arrays or shapes."""
    kinds, total = held(state), program_bytes(compiled)
    kept = kinds["parameters"] + kinds["optimizer"]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return (
        f"a step takes {_size(total)} a device{f' of {_size(limit)}' if limit else ''}: parameters "
        f"{_size(kinds['parameters'])}, optimizer {_size(kinds['optimizer'])}, gradients and temporaries "
        f"{_size(max(0.0, total - kept))}"
    )


def _size(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.2f} MiB"
