"""Safelight: image work behind a REST API and a message broker."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("safelight")
