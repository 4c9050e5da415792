"""`save`, under torch's module name."""

from .engine import save

__all__ = ["save"]
