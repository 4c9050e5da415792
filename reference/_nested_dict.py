"""Nested state dict to flat one and back, under torch's module name; see `traverse`."""

from .flatten import Path
from .traverse import flatten_state_dict, unflatten_state_dict

__all__ = ["FLATTEN_MAPPING", "flatten_state_dict", "unflatten_state_dict"]

FLATTEN_MAPPING = dict[str, Path]
