"""Finding in a flat state dict what an index of the metadata names: functions for planners of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex

from .layout import is_checkpointable, is_tensor_leaf, local_boxes, tensor_shard
from .leaves import PlanningError

__all__ = ["assert_same_keys", "find_state_dict_object", "find_tensor_shard"]


def find_state_dict_object(state_dict: Mapping[str, Any], index: MetadataIndex) -> Any:
    """Return the object at `index`, or the view of the local tensor that is its box there.

    Args:
        state_dict: FQN -> value.
        index: without an offset, an object or a tensor of which this rank holds a single box.

    Raises:
        PlanningError: there is none.
    """
    if index.fqn not in state_dict:
        raise PlanningError(f"Expected an FQN of this state dict but got fqn={index.fqn!r}.")
    value = state_dict[index.fqn]
    if is_tensor_leaf(value):
        return find_tensor_shard(value, index)
    if index.offset is not None:
        raise PlanningError(f"Expected no offset for {index.fqn!r}, an object, but got offset={index.offset!r}.")
    return value


def find_tensor_shard(tensor: torch.Tensor, index: MetadataIndex) -> torch.Tensor:
    """Return the view of the local tensor that is its box at `index`.

    Raises:
        PlanningError: this rank holds no such box.
    """
    if is_checkpointable(tensor):
        return tensor_shard(tensor, index)
    boxes = local_boxes(index.fqn, tensor)
    for box in boxes:
        if (index.offset is None and len(boxes) == 1) or box.offsets == index.offset:
            assert box.data is not None
            return box.data
    raise PlanningError(
        f"Expected the offset of a box that this rank holds of {index.fqn!r} but got offset={index.offset!r}. "
        f"Held: {[tuple(box.offsets) for box in boxes]}."
    )


def assert_same_keys(state_dict: Mapping[str, Any], process_group: dist.ProcessGroup | None = None) -> None:
    """Check that all ranks have the same keys; all ranks of the group must call this.

    Raises:
        AssertionError: other ranks have keys that this one lacks; not raised on ranks that lack none.
    """
    if dist.get_world_size(process_group) == 1:
        return
    gathered: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(gathered, list(state_dict), group=process_group)
    missing = {key for keys in gathered for key in keys} - set(state_dict)
    if missing:
        raise AssertionError(f"Expected the same keys on all ranks but this one lacks {sorted(map(str, missing))}.")
