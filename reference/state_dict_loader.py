"""`load`, under torch's module name."""

from .engine import load

__all__ = ["load"]
