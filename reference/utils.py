"""Finding tensors and objects by index, under torch's module name; see `lookup`."""

from .lookup import assert_same_keys as _assert_same_keys
from .lookup import find_state_dict_object, find_tensor_shard

__all__ = ["_assert_same_keys", "find_state_dict_object", "find_tensor_shard"]
