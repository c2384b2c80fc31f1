"""Align language models from preferences."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("prefopt")
