"""Saving and loading a state dict as a whole, with its nesting: what format conversion stands on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from .load_planner import DefaultLoadPlanner
from .metadata import MetadataError
from .nesting import LeafNote, describe, is_dense, nest, rebuild
from .save_planner import DefaultSavePlanner

__all__ = ["WholeLoadPlanner", "WholeSavePlanner"]

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


def _destination(metadata: Metadata) -> Any:
    entries = metadata.state_dict_metadata
    planner_data = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    made: dict[str, Any] = {}

    def make(note: LeafNote) -> Any:
        if note.same_as is not None:
            return made[note.same_as]
        made[note.fqn] = _blank(entries[note.fqn], note)
        return made[note.fqn]

    if _NESTING in planner_data:
        return rebuild(planner_data[_NESTING], make)
    if metadata.planner_data is None:
        return {fqn: make(LeafNote(fqn)) for fqn in entries}
    leaves = [(planner_data.get(fqn, (fqn,)), make(LeafNote(fqn))) for fqn in entries]
    return nest(leaves + [(path, {}) for fqn, path in planner_data.items() if fqn not in entries])


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
