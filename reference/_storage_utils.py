"""How a `checkpoint_id` becomes storage, under torch's module name; see `open_storage`."""

from .open_storage import open_storage as _storage_setup

__all__ = ["_storage_setup"]
