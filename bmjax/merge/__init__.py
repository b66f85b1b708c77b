"""The merge phase: branches become one model. `bmjax.merge(recipe, output)` is `bmjax.api.merge`."""

import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    # The Python contract calls `bmjax.merge(...)`, and this package has that name: once imported, it answers the call.
    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        from bmjax.api import merge

        return merge(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
