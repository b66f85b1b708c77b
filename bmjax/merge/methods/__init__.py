"""Merge methods, one file a family. Importing this package registers them all."""

from bmjax.merge.methods import (  # noqa: F401
    arcee_fusion,
    linear,
    model_stock,
    nearswap,
    ram,
    sce,
    singular,
    slerp,
    spherical,
    task_arithmetic,
)
from bmjax.merge.methods.method import METHODS, Method

__all__ = ["METHODS", "Method"]
