"""Read and write items of one leaf, under torch's module name; see `plan_functions`."""

from .plan_functions import create_chunk_list, create_read_items, create_read_items_for_chunk_list, create_write_items

__all__ = ["create_read_items_for_chunk_list"]

_create_chunk_list = create_chunk_list
_create_read_items = create_read_items
_create_write_items = create_write_items
