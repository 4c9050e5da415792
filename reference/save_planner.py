"""Planning a save: what each rank writes, who writes what several ranks hold, and the metadata.

`set_up_planner` flattens, `create_local_plan` turns leaves into write items, `create_global_plan` (coordinator only)
drops replicas and makes the metadata, `resolve_data` hands the storage each item's bytes.
"""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Callable, Mapping
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
from torch.distributed.tensor import DTensor

from ._dedup_save_plans import dedup_save_plans
from .gc_pause import gc_paused
from .items import serialize_object
from .layout import LocalBox, global_size, is_sharded, is_tensor_leaf, local_boxes, own_write_items, source_tensor
from .leaves import HoldsLeaves, LeafTable, PlanningError
from .metadata import check_metadata
from .plan_cache import PlanCache

__all__ = [
    "DefaultSavePlanner",
    "create_default_global_save_plan",
    "create_default_local_save_plan",
    "write_items",
]

_cache = PlanCache()
_logger = logging.getLogger(__name__)


class DefaultSavePlanner(HoldsLeaves, SavePlanner):
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
        dedup_replicated_tensors: bool | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,
    ) -> None:
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.dedup_save_to_lowest_rank = dedup_save_to_lowest_rank
        self._enable_plan_caching = enable_plan_caching
        if dedup_replicated_tensors is not None:
            _logger.warning("DefaultSavePlanner: dedup_replicated_tensors has no effect any more. Leave it out.")
        self.state_dict: dict[str, Any] = {}
        self.mappings: dict[str, Any] = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,  # noqa: ARG002
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict to save. All ranks."""
        table = LeafTable(state_dict, is_nested=self.flatten_state_dict)
        self._set_up_table = table
        self.mappings = dict(table.paths)
        self.state_dict = table.leaves
        self.is_coordinator = is_coordinator

    @gc_paused()
    def create_local_plan(self) -> SavePlan:
        """Return one write item per box that this rank holds, and one per object. All ranks.

        Raises:
            PlanningError, LayoutError: a leaf that cannot be stored, named.
        """
        table = self._table()
        items: list[WriteItem] = []
        for fqn, value in self.state_dict.items():
            items += write_items(fqn, value, table.boxes)
        self.plan = SavePlan(items, planner_data=self.mappings if self.flatten_state_dict else None)
        return self.plan

    @gc_paused()
    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return each rank's final plan, and the metadata. Coordinator only.

        What several ranks hold is written by one of them. If more than one rank takes part, the chunks must cover
        every tensor; a single plan may hold a part only, since a rank can save its own shards alone.

        Raises:
            PlanningError: ranks disagree about a leaf.
            MetadataError: chunks overlap, leave a gap, or lie out of bounds.
        """
        setting = (type(self), self.flatten_state_dict, self.dedup_save_to_lowest_rank)
        is_caching = self._enable_plan_caching and self._plans_as_here()
        found = _cache.find(setting, all_plans) if is_caching else None
        plans, metadata = found if found is not None else self._create_global_plan(all_plans)
        if is_caching and found is None:
            _cache.keep(setting, all_plans, plans, metadata)
        self.global_plan, self.metadata = plans, metadata
        return plans, metadata

    def _create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        if self.flatten_state_dict:
            paths: dict[str, Any] = {}
            metadata.planner_data = paths
            for plan in plans:
                # Where ranks differ, the lowest is right, as in torch. A subclass may send something else instead.
                if isinstance(plan.planner_data, Mapping):
                    paths.update((fqn, path) for fqn, path in plan.planner_data.items() if fqn not in paths)
        check_metadata(metadata, must_cover=len(all_plans) > 1)
        return plans, metadata

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans without replicas. A hook, as in torch."""
        return dedup_save_plans(all_plans, self.dedup_save_to_lowest_rank)

    def _plans_as_here(self) -> bool:
        # A subclass that plans in its own way may look at what the remembered plan's key does not know of.
        cls = type(self)
        return (
            cls._create_global_plan is DefaultSavePlanner._create_global_plan
            and cls._dedup_save_plans is DefaultSavePlanner._dedup_save_plans
        )

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
        return self._table().lookup(self.state_dict, index.fqn, index.offset)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002  torch's name
        """Return what is stored for `object`: an object is pickled, a tensor is left as it is. A hook."""
        return serialize_object(object) if write_item.type == WriteItemType.BYTE_IO else object


def create_default_local_save_plan(state_dict: dict[str, Any], is_coordinator: bool) -> SavePlan:  # noqa: ARG001
    """Return what `DefaultSavePlanner` writes for a flat state dict: each box that this rank holds, and each object.

    Args:
        state_dict: FQN -> value.
        is_coordinator: without effect, as in torch: every rank offers what it has.

    Raises:
        PlanningError, LayoutError: a leaf that cannot be stored, named.
    """
    items: list[WriteItem] = []
    for fqn, value in state_dict.items():
        items += write_items(fqn, value, local_boxes)
    return SavePlan(items)


def create_default_global_save_plan(
    all_plans: list[SavePlan], rewrite_index_hints: bool = True
) -> tuple[list[SavePlan], Metadata]:
    """Return the plans with index hints, and the metadata that their items make up. Coordinator only.

    Args:
        all_plans: one per rank, free of replicas.
        rewrite_index_hints: give each item its position among the tensor's chunks.

    Raises:
        PlanningError: two items write the same object or unsharded tensor.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    plans = []
    for plan in all_plans:
        recorded = [_record(item, entries) for item in plan.items]
        plans.append(dataclasses.replace(plan, items=recorded if rewrite_index_hints else list(plan.items)))
    return plans, Metadata(state_dict_metadata=entries)


def write_items(fqn: str, value: Any, boxes: Callable[[str, Any], list[LocalBox]]) -> list[WriteItem]:
    """Return what this rank writes of the leaf `fqn`.

    Args:
        fqn: its name.
        value: a tensor of any kind, or an object.
        boxes: `local_boxes`, or what remembers its results.
    """
    if not is_tensor_leaf(value):
        return [WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)]
    if isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None:
        return []
    own = own_write_items(fqn, value)
    if own is not None:
        return own
    held = boxes(fqn, value)
    if not held:
        return []
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
        for box in held
    ]


def _properties(tensor: torch.Tensor) -> TensorProperties:
    return TensorProperties(dtype=tensor.dtype, layout=tensor.layout, requires_grad=tensor.requires_grad)


def _record(item: WriteItem, entries: dict[str, TensorStorageMetadata | BytesStorageMetadata]) -> WriteItem:
    """Enter `item` into the metadata, and return it with its position among the tensor's chunks as index hint."""
    fqn, data = item.index.fqn, item.tensor_data
    entry = entries.get(fqn)
    if entry is not None and (item.type != WriteItemType.SHARD or data is None):
        raise PlanningError(f"Expected one write item for {fqn!r} but got several. Drop the replicas first.")
    if data is None:
        entries[fqn] = BytesStorageMetadata()
        return item
    if data.chunk is None:
        raise PlanningError(f"Expected a chunk in each write item of a tensor but got {fqn!r} chunk=None.")
    if entry is None:
        entry = entries[fqn] = TensorStorageMetadata(data.properties, data.size, [])
    assert isinstance(entry, TensorStorageMetadata)
    index = MetadataIndex(fqn, item.index.offset, len(entry.chunks))
    entry.chunks.append(data.chunk)
    return WriteItem(index, item.type, item.bytes_io_data, data)
