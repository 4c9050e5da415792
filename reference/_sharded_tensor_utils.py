"""A step of planners written for torch, under torch's module name; see `traverse`."""

from .traverse import flatten_sharded_tensors as _flatten_sharded_tensors

__all__ = ["_flatten_sharded_tensors"]
