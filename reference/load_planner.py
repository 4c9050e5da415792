"""Planning a load: which bytes of the checkpoint fill what this rank holds.

`set_up_planner` flattens the destination, `create_local_plan` intersects what this rank holds with the saved chunks,
and the storage then asks for destinations with `resolve_tensor` and hands over objects with `load_bytes`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from operator import sub
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from .boxes import BoxIndex, find_tiling_fault
from .layout import LocalBox, is_tensor_leaf
from .leaves import LeafTable, PlanningError
from .materialize import materialize
from .metadata import MetadataError

__all__ = ["DefaultLoadPlanner"]


class DefaultLoadPlanner(LoadPlanner):
    """Plans a load into an existing state dict; tensors are filled in place, objects are replaced where they stand.

    Everything that can be refused is refused while planning, when no byte of the destination has changed.

    Args:
        flatten_state_dict: as it was on saving.
        flatten_sharded_tensors: accepted as in torch.
        allow_partial_load: leave leaves that the checkpoint lacks as they are, instead of refusing.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
    ) -> None:
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.allow_partial_load = allow_partial_load
        self.original_state_dict: dict[str, Any] = {}
        self.mappings: dict[str, Any] = {}
        self.metadata: Metadata | None = None

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
        self._table = LeafTable(
            state_dict,
            is_nested=self.flatten_state_dict,
            is_whole=lambda fqn: isinstance(entries.get(fqn), BytesStorageMetadata),
        )
        self._materialized: dict[str, torch.Tensor] = {}
        for fqn, value in self._table.leaves.items():
            if isinstance(value, torch.Tensor) and value.device.type == "meta" and fqn in entries:
                self._table.leaves[fqn] = self._materialized[fqn] = materialize(fqn, value)
        self.original_state_dict = state_dict
        self.state_dict: dict[str, Any] = self._table.leaves
        self.mappings = dict(self._table.paths)
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Return the reads that fill what this rank holds. All ranks.

        Raises:
            PlanningError: a leaf is missing from the checkpoint, or differs in shape or in kind; all such are named.
        """
        if self.metadata is None:
            raise PlanningError("Expected the checkpoint's metadata but got metadata=None. Call set_up_planner first.")
        faults: list[str] = []
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
                items += self._tensor_reads(fqn, value, entry)
            else:
                items.append(_bytes_read(fqn))
        if faults:
            shown = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
            raise PlanningError(f"Expected a state dict that fits the checkpoint but got: {shown}.")
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged: reads need no agreement. Coordinator only."""
        return global_plan

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """Accept the plan, and put materialised tensors where the meta tensors were. All ranks."""
        for fqn, tensor in self._materialized.items():
            self._table.slot(fqn).put(tensor)
        return new_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Replace an object by the loaded one, in its own container under its own key."""
        fqn = read_item.dest_index.fqn
        loaded = torch.load(value, weights_only=False)
        self.state_dict[fqn] = loaded
        self._table.slot(fqn).put(loaded)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Return the view of the destination that `read_item` fills."""
        return self.transform_tensor(read_item, self.lookup_tensor(read_item.dest_index))

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Called once `tensor` is filled; nothing to do, since it is the destination itself. A hook."""

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return the view of the local tensor that is the box at `index.offset`. A hook for subclasses."""
        found: torch.Tensor = self._table.lookup(self.state_dict, index.fqn, index.offset)
        return found

    def transform_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of `tensor` that `read_item` fills. A hook for subclasses."""
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, offset, length)
        return tensor

    def _mismatch(self, fqn: str, value: Any, entry: TensorStorageMetadata | BytesStorageMetadata) -> str | None:
        is_tensor = is_tensor_leaf(value)
        if isinstance(entry, BytesStorageMetadata):
            if is_tensor:
                return f"{fqn!r} is a tensor here and an object in the checkpoint"
            slot = self._table.slot(fqn)
            if not slot.is_writable:
                return f"{fqn!r} is in a {_kind(slot.container)}, which cannot take the loaded object"
            return None
        if not is_tensor:
            return f"{fqn!r} is a {_kind(value)} here and a tensor in the checkpoint"
        if tuple(value.size()) != tuple(entry.size):
            return f"{fqn!r} has shape {tuple(value.size())} here and {tuple(entry.size)} in the checkpoint"
        if fqn in self._materialized and not self._table.slot(fqn).is_writable:
            return f"{fqn!r} is a meta tensor in a {_kind(self._table.slot(fqn).container)}, which cannot be changed"
        return None

    def _tensor_reads(self, fqn: str, value: Any, entry: TensorStorageMetadata) -> list[ReadItem]:
        dtype = value.dtype
        if dtype != entry.properties.dtype:
            warnings.warn(
                f"{fqn!r} was saved as {entry.properties.dtype} and is loaded as {dtype}: values are converted.",
                stacklevel=2,
            )
        index = BoxIndex(entry.chunks)
        reads: list[ReadItem] = []
        for position, box in enumerate(self._table.boxes(fqn, value)):
            parts: list[ReadItem] = []
            for chunk_position, offsets, sizes in index.overlapping(box.offsets, box.sizes):
                chunk = entry.chunks[chunk_position]
                parts.append(
                    ReadItem(
                        type=LoadItemType.TENSOR,
                        dest_index=MetadataIndex(fqn, box.offsets, position),
                        dest_offsets=_minus(offsets, box.offsets),
                        storage_index=MetadataIndex(fqn, chunk.offsets, chunk_position),
                        storage_offsets=_minus(offsets, chunk.offsets),
                        lengths=torch.Size(sizes),
                    )
                )
            _check_coverage(box, parts, entry, fqn)
            reads += parts
        return reads


@dataclass(frozen=True)
class _Part:
    offsets: torch.Size
    sizes: torch.Size


def _check_coverage(box: LocalBox, reads: list[ReadItem], entry: TensorStorageMetadata, fqn: str) -> None:
    """Check that `reads` fill every element of `box` once: a checkpoint may be incomplete elsewhere, but not here."""
    if len(reads) == 1 and reads[0].lengths == box.sizes:
        return
    fault = find_tiling_fault([_Part(read.dest_offsets, read.lengths) for read in reads], box.sizes)
    if fault is not None:
        at = tuple(a + b for a, b in zip(box.offsets, fault.index, strict=True))
        holders = [tuple(entry.chunks[reads[i].storage_index.index or 0].offsets) for i in fault.positions]
        raise MetadataError(
            f"Expected one chunk for each element of {fqn!r} but got {len(holders)} for the element at {at}"
            f"{f', at offsets {holders}' if holders else ''}. The checkpoint is incomplete or contradicts itself."
        )


def _bytes_read(fqn: str) -> ReadItem:
    zero = torch.Size((0,))
    return ReadItem(LoadItemType.BYTE_IO, MetadataIndex(fqn), zero, MetadataIndex(fqn), zero, zero)


def _minus(a: Sequence[int], b: Sequence[int]) -> torch.Size:
    return torch.Size(map(sub, a, b))


def _kind(value: Any) -> str:
    return type(value).__name__
