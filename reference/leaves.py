"""The leaves of one state dict and what this rank holds of each: what both planners look things up in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .flatten import FlatStateDict, Slot, flatten
from .layout import LocalBox, is_tensor_leaf, local_boxes

__all__ = ["LeafTable", "PlanningError"]


class PlanningError(ValueError):
    """A state dict that cannot be saved, or that does not fit the checkpoint it is loaded from."""


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
        if is_nested:
            self._flat = flatten(state_dict, is_whole=is_whole)
        else:
            self._flat = FlatStateDict(
                leaves=dict(state_dict),
                paths={fqn: (fqn,) for fqn in state_dict},
                slots={fqn: Slot(state_dict, fqn) for fqn in state_dict},
            )
        self._boxes: dict[str, list[LocalBox]] = {}
        self._by_offset: dict[str, dict[torch.Size, LocalBox]] = {}

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
        found = self._boxes.get(fqn)
        if found is None:
            found = self._boxes[fqn] = local_boxes(fqn, value)
            self._by_offset[fqn] = {box.offsets: box for box in found}
        return found

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
        boxes = self.boxes(fqn, value)
        if offset is None and len(boxes) == 1:
            return boxes[0].data
        box = self._by_offset[fqn].get(offset) if offset is not None else None
        if box is None:
            raise PlanningError(
                f"Expected the offset of a box that this rank holds of {fqn!r} but got offset={offset!r}. "
                f"Held: {[tuple(b.offsets) for b in boxes]}."
            )
        return box.data
