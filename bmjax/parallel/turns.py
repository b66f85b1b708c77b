"""Programs over several CPU devices run one at a time; on other devices JAX may queue as many as it likes."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def finished(results: Any) -> Any:
    """Return a program's results; those on several CPU devices, once they are there.

    XLA has as many threads on a CPU as there are cores. With two programs under way, each thread may stand in another
    one and wait there for a device's part, which no thread is left to compute. After 40 seconds XLA ends the process.
    """
    for leaf in jax.tree.leaves(results):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            devices: set[Any] = leaf.sharding.device_set
            is_spread = len(devices) > 1 and next(iter(devices)).platform == "cpu"
            return jax.block_until_ready(results) if is_spread else results
    return results


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return `jax.jit(function, **options)` whose results are `finished`. Within another program it is a part of it."""
    program = jax.jit(function, **options)

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        return finished(program(*arguments, **named))

    return run
