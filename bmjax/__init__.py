"""bmjax: Branch-Merge distillation (arXiv 2503.04872) in JAX.

    m = bmjax.load("DIR or hub id")         bmjax.merge("recipe.yaml", "OUT")
    m.logits(tokens), m.loss(tokens, mask)  bmjax.train({...}), bmjax.run("config.yaml", output="DIR")
    bmjax.generate(m, ["2 + 2 ="])          bmjax.evaluate({...}), bmjax.plan({...}, topology="v5p:4x4x4")

Heavy libraries are imported when a function is first used.
"""

import importlib
import logging
import sys
import types
from typing import TYPE_CHECKING, Any

from bmjax.version import __version__

if TYPE_CHECKING:
    from bmjax.api import (
        Model,
        collect,
        convert,
        evaluate,
        generate,
        load,
        merge,
        plan,
        rejudge,
        run,
        save,
        select,
        train,
    )
    from bmjax.branch.examples import tokenize
    from bmjax.errors import UserError
    from bmjax.teach.judges.judge import judge

__all__ = [
    "Model", "UserError", "__version__", "collect", "convert", "evaluate", "generate", "judge", "load", "merge", "plan",
    "rejudge", "run", "save", "select", "tokenize", "train",
]  # fmt: skip
# transformers warns that PyTorch is missing. bmjax does without it, and its users need not read of it.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())

# Names that need less than all of bmjax.api: merging works without the extras.
_MODULES = {"UserError": "bmjax.errors", "merge": "bmjax.calibrate.dispatch", "judge": "bmjax.teach.judges.judge"}


class _Package(types.ModuleType):
    """The package as a module whose names are the functions of `bmjax.api`, loaded when they are first used.

    Importing a module of the folder `merge`, `generate`, `evaluate` or `plan` would set that name to the folder; here
    the function keeps it.
    """

    def __getattr__(self, name: str) -> Any:
        if name in __all__:
            try:
                return getattr(importlib.import_module(_MODULES.get(name, "bmjax.api")), name)
            except ModuleNotFoundError as error:
                from bmjax.errors import missing_package

                raise missing_package(error) or error from None
        raise AttributeError(f"module 'bmjax' has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted(__all__)


sys.modules[__name__].__class__ = _Package
