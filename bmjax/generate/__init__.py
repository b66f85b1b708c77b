"""Generation with a key/value cache. `bmjax.generate(model, prompts)` is `bmjax.generate.text.generate`."""

import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    # The Python contract calls `bmjax.generate(...)`, and this package has that name: it answers once imported.
    def __call__(self, *arguments: Any, **options: Any) -> list[str] | list[list[int]]:
        from bmjax.generate.text import generate

        return generate(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
