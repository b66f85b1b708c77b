"""Merge methods, one file a family. Importing this package registers them all."""

from bmjax.merge.methods.arcee_fusion import arcee_fusion
from bmjax.merge.methods.linear import linear
from bmjax.merge.methods.method import METHODS, About, Merged, Method, Parameter, find, method
from bmjax.merge.methods.nearswap import nearswap
from bmjax.merge.methods.passthrough import passthrough
from bmjax.merge.methods.slerp import slerp
from bmjax.merge.methods.task_arithmetic import task_arithmetic

__all__ = [
    "METHODS",
    "About",
    "Merged",
    "Method",
    "Parameter",
    "arcee_fusion",
    "find",
    "linear",
    "method",
    "nearswap",
    "passthrough",
    "slerp",
    "task_arithmetic",
]
