"""Saving and loading a state dict as a whole, with its nesting: what format conversion stands on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from .leaves import PlanningError
from .load_planner import DefaultLoadPlanner
from .metadata import MetadataError
from .nesting import LeafNote, describe, is_dense, nest, rebuild
from .save_planner import DefaultSavePlanner

__all__ = ["EmptyStateDictLoadPlanner", "WholeLoadPlanner", "WholeSavePlanner"]

_NESTING = "\0nesting"
"""Where in `planner_data` the nesting is kept; torch only looks at the FQNs there."""


class WholeSavePlanner(DefaultSavePlanner):
    """Saves one given state dict as it is, nesting included; to be used by one process alone.

    The state dict comes by this constructor rather than through `save`, which asks `Stateful` values for their state:
    an object in a file is stored as the object.
    """

    def __init__(self, state_dict: Mapping[Any, Any]) -> None:
        super().__init__()
        self._whole = state_dict

    def set_up_planner(
        self,
        state_dict: dict[str, Any],  # noqa: ARG002  see above
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict given to the constructor."""
        super().set_up_planner(dict(self._whole), storage_meta, is_coordinator)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return the plan and the metadata, with the nesting in its `planner_data`."""
        plans, metadata = super().create_global_plan(all_plans)
        metadata.planner_data[_NESTING] = describe(self._whole, self.state_dict)
        return plans, metadata


class WholeLoadPlanner(DefaultLoadPlanner):
    """Loads everything that a checkpoint holds into a state dict that it makes itself: `loaded`."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: Any = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],  # noqa: ARG002  there is none yet
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Make the destination from the metadata.

        Raises:
            MetadataError: the metadata names no possible nesting.
        """
        if metadata is None:
            raise MetadataError("Expected the checkpoint's metadata but got metadata=None.")
        self.flatten_state_dict = metadata.planner_data is not None
        self.loaded = _destination(metadata)
        super().set_up_planner(self.loaded, metadata, is_coordinator)


class EmptyStateDictLoadPlanner(DefaultLoadPlanner):
    """Loads what a checkpoint holds into the empty dict that it is given; in torch, `_EmptyStateDictLoadPlanner`.

    Every process that loads with it needs memory for all that is loaded.

    Args:
        keys: FQNs, or names of subtrees (`"model"` for `model.weight`); None for everything.
        args: as `DefaultLoadPlanner` takes them.
        kwargs: as `DefaultLoadPlanner` takes them.

    Source: torch.distributed.checkpoint.default_planner.
    """

    def __init__(self, keys: Iterable[str] | None = None, *args: Any, **kwargs: Any) -> None:
        self.keys = None if keys is None else set(keys)
        super().__init__(*args, **kwargs)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Fill `state_dict` with memory for what will be loaded. All ranks.

        Raises:
            PlanningError: it is not empty.
            MetadataError: the metadata names no possible nesting.
        """
        if metadata is None:
            raise MetadataError("Expected the checkpoint's metadata but got metadata=None.")
        if state_dict:
            raise PlanningError(f"Expected an empty state dict but got one with {len(state_dict)} entries.")
        if metadata.planner_data is None:
            self.flatten_state_dict = False
        wanted = {fqn for fqn in metadata.state_dict_metadata if self._should_include_key(fqn, metadata)}
        is_all = len(wanted) == len(metadata.state_dict_metadata)
        state_dict.update(_destination(metadata, None if is_all else wanted))
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def _should_include_key(self, key: str, metadata: Metadata) -> bool:
        """Whether the leaf `key` is wanted. A hook for subclasses, as in torch."""
        if self.keys is None or key in self.keys:
            return True
        paths = metadata.planner_data
        path = paths.get(key, ()) if isinstance(paths, dict) else ()
        return any(".".join(map(str, path[:end])) in self.keys for end in range(1, len(path)))


def _destination(metadata: Metadata, wanted: set[str] | None = None) -> Any:
    """Return memory for the whole checkpoint, nested as it was saved; or for the leaves `wanted` only."""
    entries = metadata.state_dict_metadata
    if wanted is not None:
        entries = {fqn: entry for fqn, entry in entries.items() if fqn in wanted}
    planner_data = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    made: dict[str, Any] = {}

    def make(note: LeafNote) -> Any:
        if note.same_as is not None:
            return made[note.same_as]
        made[note.fqn] = _blank(entries[note.fqn], note)
        return made[note.fqn]

    if _NESTING in planner_data and wanted is None:
        return rebuild(planner_data[_NESTING], make)
    if metadata.planner_data is None:
        return {fqn: make(LeafNote(fqn)) for fqn in entries}
    # the nesting's order is that of the saved state dict; the entries' order is that of the ranks that wrote them
    in_order = [*(fqn for fqn in planner_data if fqn in entries), *(fqn for fqn in entries if fqn not in planner_data)]
    leaves = [(planner_data.get(fqn, (fqn,)), make(LeafNote(fqn))) for fqn in in_order]
    if wanted is None:
        leaves += [(path, {}) for fqn, path in planner_data.items() if fqn not in entries]
    return nest(leaves)


def _blank(entry: TensorStorageMetadata | BytesStorageMetadata, note: LeafNote) -> torch.Tensor | None:
    """Return memory for a tensor; None for an object, which takes that place when it is loaded."""
    if isinstance(entry, BytesStorageMetadata):
        return None
    size, properties = entry.size, entry.properties
    if note.stride is not None and len(note.stride) == len(size) and is_dense(size, note.stride):
        blank = torch.empty_strided(size, note.stride, dtype=properties.dtype)
    else:
        blank = torch.empty(size, dtype=properties.dtype)
    if note.is_parameter:
        return torch.nn.Parameter(blank, requires_grad=properties.requires_grad)
    return blank.requires_grad_(properties.requires_grad)
