"""The package's version, where everything else reads it."""

__version__ = "0.1.0"
