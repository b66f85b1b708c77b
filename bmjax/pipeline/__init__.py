"""The phases in order, resumable stage by stage; only this package knows the order."""

from bmjax.pipeline.run import run
from bmjax.pipeline.settings import RunSettings

__all__ = ["RunSettings", "run"]
