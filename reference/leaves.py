"""The leaves of one state dict and what this rank holds of each: what both planners look things up in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from .flatten import FlatStateDict, Slot, flatten
from .layout import LocalBox, is_checkpointable, is_tensor_leaf, local_boxes, tensor_shard

__all__ = ["HoldsLeaves", "LeafTable", "PlanningError"]


class PlanningError(ValueError, RuntimeError):
    """A state dict that cannot be saved, or that does not fit the checkpoint it is loaded from.

    torch raises `ValueError` for some of this and `RuntimeError` for the rest: what catches those catches this.
    """


@dataclass(frozen=True, slots=True)
class _Held:
    """What this rank holds of one tensor."""

    value: torch.Tensor
    boxes: list[LocalBox]
    by_offset: dict[torch.Size, LocalBox]


class LeafTable:
    """The leaves of `state_dict`, and the local boxes of those that are tensors (worked out once).

    Args:
        state_dict: nested, unless `is_nested` is False: then each top-level value is a leaf.
        is_whole: see `flatten`.
    """

    def __init__(
        self,
        state_dict: Mapping[Any, Any],
        *,
        is_nested: bool = True,
        is_whole: Callable[[str], bool] | None = None,
    ) -> None:
        self._flat = flatten(state_dict, is_whole=is_whole) if is_nested else _unnested(dict(state_dict), state_dict)
        # One entry holds all that belongs together, since writer threads look things up at the same time.
        self._held: dict[str, _Held] = {}

    @classmethod
    def of_leaves(cls, leaves: dict[str, Any]) -> LeafTable:
        """Return the table of leaves that are flat already, and live in the dict `leaves` itself."""
        table = cls({})
        table._flat = _unnested(leaves, leaves)
        return table

    @property
    def leaves(self) -> dict[str, Any]:
        """FQN -> value."""
        return self._flat.leaves

    @property
    def paths(self) -> dict[str, tuple[str | int, ...]]:
        """FQN -> path, as stored in `planner_data`."""
        return self._flat.paths

    def slot(self, fqn: str) -> Slot:
        """Return where the leaf lives."""
        return self._flat.slots[fqn]

    def boxes(self, fqn: str, value: torch.Tensor) -> list[LocalBox]:
        """Return what this rank holds of the tensor `value`."""
        return self._hold(fqn, value).boxes

    def _hold(self, fqn: str, value: torch.Tensor) -> _Held:
        held = self._held.get(fqn)
        if held is None or held.value is not value:  # a subclass of a planner may replace one
            boxes = local_boxes(fqn, value)
            held = self._held[fqn] = _Held(value, boxes, {box.offsets: box for box in boxes})
        return held

    def lookup(self, leaves: Mapping[str, Any], fqn: str, offset: torch.Size | None) -> Any:
        """Return the object at `fqn`, or the view of the local tensor that is its box at `offset`.

        Args:
            leaves: the planner's own dict, since a subclass may have replaced values in it.
            fqn: the leaf's name.
            offset: None only for an object, or a tensor of which this rank holds a single box.
        """
        if fqn not in leaves:
            raise PlanningError(f"Expected an FQN of this state dict but got fqn={fqn!r}.")
        value = leaves[fqn]
        if not is_tensor_leaf(value):
            return value
        if is_checkpointable(value):
            return tensor_shard(value, MetadataIndex(fqn, offset))
        held = self._hold(fqn, value)
        if offset is None and len(held.boxes) == 1:
            return held.boxes[0].data
        box = held.by_offset.get(offset) if offset is not None else None
        if box is None:
            raise PlanningError(
                f"Expected the offset of a box that this rank holds of {fqn!r} but got offset={offset!r}. "
                f"Held: {[tuple(b.offsets) for b in held.boxes]}."
            )
        return box.data


class HoldsLeaves:
    """A planner's leaves: what its `set_up_planner` made of the state dict, or what a subclass put there instead."""

    state_dict: dict[str, Any]
    _set_up_table: LeafTable | None = None
    _other_table: LeafTable | None = None

    def _table(self) -> LeafTable:
        table = self._set_up_table
        if table is not None and table.leaves is self.state_dict:
            return table
        if self._other_table is None or self._other_table.leaves is not self.state_dict:
            self._other_table = LeafTable.of_leaves(self.state_dict)
        return self._other_table


def _unnested(leaves: dict[str, Any], container: Mapping[Any, Any]) -> FlatStateDict:
    return FlatStateDict(
        leaves=leaves,
        paths={fqn: (fqn,) for fqn in leaves},
        slots={fqn: Slot(container, fqn) for fqn in leaves},
    )
