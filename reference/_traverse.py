"""Walking through a nested state dict, under torch's module name; see `traverse`."""

from .flatten import Path
from .traverse import get_element, print_tensor, set_element, traverse_state_dict

__all__ = ["OBJ_PATH", "get_element", "print_tensor", "set_element", "traverse_state_dict"]

OBJ_PATH = Path
