"""Planning a load: which bytes of the checkpoint fill what this rank holds.

`set_up_planner` flattens the destination, `create_local_plan` intersects what this rank holds with the saved chunks,
and the storage then asks for destinations with `resolve_tensor` and hands over objects with `load_bytes`.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from .chunk_parts import PartFinder
from .gc_pause import gc_paused
from .indices import new_index
from .kept_plans import keeps_plans
from .layout import is_tensor_leaf
from .leaves import HoldsLeaves, LeafTable, PlanningError
from .materialize import materialize
from .traverse import set_element

__all__ = ["DefaultLoadPlanner"]


class DefaultLoadPlanner(HoldsLeaves, LoadPlanner):
    """Plans a load into an existing state dict; tensors are filled in place, objects are replaced where they stand.

    Everything that can be refused is refused while planning, when no byte of the destination has changed.

    Args:
        flatten_state_dict: as it was on saving.
        flatten_sharded_tensors: accepted as in torch.
        allow_partial_load: leave leaves that the checkpoint lacks as they are, instead of refusing.
        allow_dtype_change: convert tensors that were saved with another dtype, with a warning that names them; False
            refuses them.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
        *,
        allow_dtype_change: bool = True,
    ) -> None:
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.allow_partial_load = allow_partial_load
        self.allow_dtype_change = allow_dtype_change
        self.original_state_dict: dict[str, Any] = {}
        self.state_dict: dict[str, Any] = {}
        self.mappings: dict[str, Any] = {}
        self.metadata: Metadata | None = None
        self._materialized: dict[str, torch.Tensor] = {}
        self._parts = PartFinder()

    @gc_paused()
    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the destination and the checkpoint's metadata. All ranks.

        Meta tensors get memory, but only reach the caller's containers in `finish_plan`.
        """
        entries = metadata.state_dict_metadata if metadata is not None else {}
        table = LeafTable(
            state_dict,
            is_nested=self.flatten_state_dict,
            is_whole=lambda fqn: isinstance(entries.get(fqn), BytesStorageMetadata),
        )
        self._set_up_table = table
        self._parts = PartFinder()
        self._materialized = {}
        for fqn, value in table.leaves.items():
            if isinstance(value, torch.Tensor) and value.device.type == "meta" and fqn in entries:
                table.leaves[fqn] = self._materialized[fqn] = materialize(fqn, value)
        self.original_state_dict = state_dict
        self.state_dict = table.leaves
        self.mappings = dict(table.paths)
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    @gc_paused()
    def create_local_plan(self) -> LoadPlan:
        """Return the reads that fill what this rank holds. All ranks.

        Raises:
            PlanningError: a leaf is missing from the checkpoint, or differs in shape or in kind; all such are named.
        """
        if self.metadata is None:
            raise PlanningError("Expected the checkpoint's metadata but got metadata=None. Call set_up_planner first.")
        faults: list[str] = []
        changes: list[str] = []
        items: list[ReadItem] = []
        for fqn, value in self.state_dict.items():
            entry = self.metadata.state_dict_metadata.get(fqn)
            if entry is None:
                if not self.allow_partial_load:
                    faults.append(f"{fqn!r} is missing from the checkpoint")
                continue
            fault = self._mismatch(fqn, value, entry)
            if fault:
                faults.append(fault)
            elif isinstance(entry, TensorStorageMetadata):
                if value.dtype != entry.properties.dtype:
                    changes.append(f"{fqn!r} was saved as {entry.properties.dtype} and is loaded as {value.dtype}")
                items += self._tensor_reads(fqn, value, entry)
            else:
                items.append(_bytes_read(fqn))
        if changes and not self.allow_dtype_change:
            faults += changes
        if faults:
            raise PlanningError(f"Expected a state dict that fits the checkpoint but got: {_first_few(faults)}.")
        if changes:
            warnings.warn(
                f"{_first_few(changes)}: values are converted. Pass DefaultLoadPlanner(allow_dtype_change=False) to "
                "refuse that.",
                stacklevel=3,
            )
        return LoadPlan(items)

    @keeps_plans
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged: reads need no agreement. Coordinator only."""
        return global_plan

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """Accept the plan, and put materialised tensors where the meta tensors were. All ranks."""
        for fqn, tensor in self._materialized.items():
            self._set_up_leaves().slot(fqn).put(tensor)
        return new_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Replace an object by the loaded one, in its own container under its own key."""
        fqn = read_item.dest_index.fqn
        loaded = torch.load(value, weights_only=False)
        table = self._table()
        self.state_dict[fqn] = loaded
        if table is not self._set_up_table and fqn in self.mappings:
            set_element(self.original_state_dict, self.mappings[fqn], loaded)
        else:
            table.slot(fqn).put(loaded)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Return the view of the destination that `read_item` fills."""
        return self.transform_tensor(read_item, self.lookup_tensor(read_item.dest_index))

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Called once `tensor` is filled; nothing to do, since it is the destination itself. A hook."""

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return the view of the local tensor that is the box at `index.offset`. A hook for subclasses."""
        found: torch.Tensor = self._table().lookup(self.state_dict, index.fqn, index.offset)
        return found

    def transform_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of `tensor` that `read_item` fills. A hook for subclasses."""
        if tensor.size() == read_item.lengths:
            return tensor
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, offset, length)
        return tensor

    def _set_up_leaves(self) -> LeafTable:
        """Return the leaves in the caller's own containers, whatever a subclass has put in their place since."""
        assert self._set_up_table is not None
        return self._set_up_table

    def _mismatch(self, fqn: str, value: Any, entry: TensorStorageMetadata | BytesStorageMetadata) -> str | None:
        is_tensor = is_tensor_leaf(value)
        if isinstance(entry, BytesStorageMetadata):
            if is_tensor:
                return f"{fqn!r} is a tensor here and an object in the checkpoint"
            if not (slot := self._table().slot(fqn)).is_writable:
                return f"{fqn!r} is in a {_kind(slot.container)}, which cannot take the loaded object"
            return None
        if not is_tensor:
            return f"{fqn!r} is a {_kind(value)} here and a tensor in the checkpoint"
        if tuple(value.size()) != tuple(entry.size):
            return f"{fqn!r} has shape {tuple(value.size())} here and {tuple(entry.size)} in the checkpoint"
        if fqn in self._materialized and not (slot := self._set_up_leaves().slot(fqn)).is_writable:
            return f"{fqn!r} is a meta tensor in a {_kind(slot.container)}, which cannot be changed"
        return None

    def _tensor_reads(self, fqn: str, value: Any, entry: TensorStorageMetadata) -> list[ReadItem]:
        reads: list[ReadItem] = []
        boxes = self._table().boxes(fqn, value)
        for position, (box, parts) in enumerate(zip(boxes, self._parts.parts(fqn, entry, boxes), strict=True)):
            destination = new_index(fqn, box.offsets, position)
            for part in parts:
                source = new_index(fqn, part.chunk_offsets, part.position)
                reads.append(
                    ReadItem(
                        LoadItemType.TENSOR, destination, part.offsets, source, part.chunk_part_offsets, part.sizes
                    )
                )
        return reads


def _bytes_read(fqn: str) -> ReadItem:
    zero = torch.Size((0,))
    return ReadItem(LoadItemType.BYTE_IO, MetadataIndex(fqn), zero, MetadataIndex(fqn), zero, zero)


def _first_few(sentences: list[str]) -> str:
    return "; ".join(sentences[:10]) + (f"; and {len(sentences) - 10} more" if len(sentences) > 10 else "")


def _kind(value: Any) -> str:
    return type(value).__name__
