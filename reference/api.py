"""The exception that reaches every rank, under torch's module name."""

from .collectives import CheckpointException

__all__ = ["CheckpointException"]
