"""bmjax: Branch-Merge distillation (arXiv 2503.04872) in JAX.

    m = bmjax.load("DIR or hub id")         bmjax.merge("recipe.yaml", "OUT")
    m.logits(tokens), m.loss(tokens, mask)  bmjax.train({...}), bmjax.run("configs/demo.yaml", output="DIR")

Heavy libraries are imported when a function is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from bmjax.version import __version__

if TYPE_CHECKING:
    from bmjax.api import Model, generate, load, merge, run, save, train
    from bmjax.config import UserError

__all__ = ["Model", "UserError", "__version__", "generate", "load", "merge", "run", "save", "train"]


def __getattr__(name: str) -> Any:
    if name == "UserError":
        return importlib.import_module("bmjax.config").UserError
    if name in __all__:
        return getattr(importlib.import_module("bmjax.api"), name)
    raise AttributeError(f"module 'bmjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
