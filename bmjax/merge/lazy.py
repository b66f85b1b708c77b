"""JAX, loaded when a kernel first touches it: a recipe can be read and checked, and the help shown, without it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax.numpy as jnp
    from jax import Array, lax
else:

    class _Module:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    jnp, lax = _Module("jax.numpy"), _Module("jax.lax")
    Array = Any

__all__ = ["Array", "jnp", "lax"]
