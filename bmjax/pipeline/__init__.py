"""The phases in order, resumable stage by stage; only this package knows the order."""

from typing import TYPE_CHECKING, Any

from bmjax.pipeline.settings import RunSettings

if TYPE_CHECKING:
    from bmjax.pipeline.phases import run

__all__ = ["RunSettings", "run"]


def __getattr__(name: str) -> Any:
    if name == "run":  # it imports jax; a command's --help does not need it
        import importlib

        return importlib.import_module("bmjax.pipeline.phases").run
    raise AttributeError(f"module 'bmjax.pipeline' has no attribute {name!r}")
