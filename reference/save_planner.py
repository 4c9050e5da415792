"""Planning a save: what each rank writes, who writes what several ranks hold, and the metadata.

`set_up_planner` flattens, `create_local_plan` turns leaves into write items, `create_global_plan` (coordinator only)
drops replicas and makes the metadata, `resolve_data` hands the storage each item's bytes.
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from .dedup import assign_replicas
from .items import serialize_object
from .layout import global_size, is_checkpointable, is_sharded, is_tensor_leaf, source_tensor
from .leaves import LeafTable, PlanningError
from .metadata import check_metadata
from .plan_cache import PlanCache

__all__ = ["DefaultSavePlanner"]

_cache = PlanCache()


class DefaultSavePlanner(SavePlanner):
    """Plans a save; subclass it and override `lookup_object` or `transform_object` to change what is written.

    Args:
        flatten_state_dict: give nested mappings and lists one FQN per leaf. False stores each top-level value whole.
        flatten_sharded_tensors: accepted as in torch; nested ShardedTensors are always described by their own boxes.
        dedup_replicated_tensors: accepted and without effect, as in torch.
        dedup_save_to_lowest_rank: give each replica to the lowest rank that holds it, instead of balancing bytes.
        enable_plan_caching: reuse the coordinator's global plan if every rank's local plan equals the one it was made
            from, across saves and planners of this class. Gives the same checkpoint, sooner.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_replicated_tensors: bool | None = None,  # noqa: ARG002
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,
    ) -> None:
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.dedup_save_to_lowest_rank = dedup_save_to_lowest_rank
        self._is_caching = enable_plan_caching
        self.mappings: dict[str, Any] = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,  # noqa: ARG002
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict to save. All ranks."""
        self._table = LeafTable(state_dict, is_nested=self.flatten_state_dict)
        self.mappings = dict(self._table.paths)
        self.state_dict: dict[str, Any] = self._table.leaves
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """Return one write item per box that this rank holds, and one per object. All ranks.

        Raises:
            PlanningError, LayoutError: a leaf that cannot be stored, named.
        """
        items: list[WriteItem] = []
        for fqn, value in self.state_dict.items():
            items += self._write_items(fqn, value)
        self.plan = SavePlan(items, planner_data=self.mappings if self.flatten_state_dict else None)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return each rank's final plan, and the metadata. Coordinator only.

        What several ranks hold is written by one of them. If more than one rank takes part, the chunks must cover
        every tensor; a single plan may hold a part only, since a rank can save its own shards alone.

        Raises:
            PlanningError: ranks disagree about a leaf.
            MetadataError: chunks overlap, leave a gap, or lie out of bounds.
        """
        setting = (type(self), self.flatten_state_dict, self.dedup_save_to_lowest_rank)
        found = _cache.find(setting, all_plans) if self._is_caching else None
        plans, metadata = found if found is not None else self._plan_globally(all_plans)
        if self._is_caching and found is None:
            _cache.keep(setting, all_plans, plans, metadata)
        self.global_plan, self.metadata = plans, metadata
        return plans, metadata

    def _plan_globally(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        kept = assign_replicas(all_plans, to_lowest_rank=self.dedup_save_to_lowest_rank)
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        plans = []
        for plan, items in zip(all_plans, kept, strict=True):
            plans.append(dataclasses.replace(plan, items=[_record(item, entries) for item in items]))
        metadata = Metadata(state_dict_metadata=entries)
        if self.flatten_state_dict:
            metadata.planner_data = {fqn: path for plan in all_plans for fqn, path in (plan.planner_data or {}).items()}
        check_metadata(metadata, must_cover=len(all_plans) > 1)
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return the plan this rank will write. All ranks."""
        self.plan = new_plan
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the tensor or the bytes of `write_item`; idempotent, and safe to call from several threads."""
        resolved: torch.Tensor | io.BytesIO = self.transform_object(write_item, self.lookup_object(write_item.index))
        return resolved

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the object, or the view of the local tensor, that `index` names. A hook for subclasses."""
        return self._table.lookup(self.state_dict, index.fqn, index.offset)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002  torch's name
        """Return what is stored for `object`: an object is pickled, a tensor is left as it is. A hook."""
        return serialize_object(object) if write_item.type == WriteItemType.BYTE_IO else object

    def _write_items(self, fqn: str, value: Any) -> list[WriteItem]:
        if not is_tensor_leaf(value):
            return [WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)]
        boxes = self._table.boxes(fqn, value)
        if not boxes:
            return []
        if is_checkpointable(value) and hasattr(value, "__create_write_items__"):
            return list(value.__create_write_items__(fqn, value))
        source = source_tensor(value)
        if source.layout != torch.strided:
            raise PlanningError(
                f"Expected a strided tensor but got {fqn!r} layout={source.layout!r}. Convert it with to_dense()."
            )
        if source.device.type == "meta":
            raise PlanningError(
                f"Expected a tensor with data but got {fqn!r} on device='meta'. Materialise it before saving."
            )
        kind = WriteItemType.SHARD if is_sharded(value) else WriteItemType.TENSOR
        size = global_size(value)
        return [
            WriteItem(
                MetadataIndex(fqn, box.offsets),
                kind,
                tensor_data=TensorWriteData(ChunkStorageMetadata(box.offsets, box.sizes), _properties(source), size),
            )
            for box in boxes
        ]


def _properties(tensor: torch.Tensor) -> TensorProperties:
    return TensorProperties(dtype=tensor.dtype, layout=tensor.layout, requires_grad=tensor.requires_grad)


def _record(item: WriteItem, entries: dict[str, TensorStorageMetadata | BytesStorageMetadata]) -> WriteItem:
    """Enter `item` into the metadata, and return it with its position among the tensor's chunks as index hint."""
    fqn, data = item.index.fqn, item.tensor_data
    if data is None:
        entries[fqn] = BytesStorageMetadata()
        return item
    entry = entries.get(fqn)
    if entry is None:
        entry = entries[fqn] = TensorStorageMetadata(data.properties, data.size, [])
    assert isinstance(entry, TensorStorageMetadata)
    index = MetadataIndex(fqn, item.index.offset, len(entry.chunks))
    entry.chunks.append(data.chunk)
    return WriteItem(index, item.type, item.bytes_io_data, data)
