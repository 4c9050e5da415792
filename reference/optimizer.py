"""Loading the sharded optimizer state of FSDP1, which knows its layout only once it is there; under torch's name.

`state_dict` does this for everything else. Here the layout is told from the model's state: ShardedTensors cut along
dim 0 over all ranks; or, where tensor parallelism comes on top, ShardedTensors of one tensor-parallel slice each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from operator import add, sub
from typing import Any

import torch
import torch.distributed as dist
from torch._utils import _get_device_module
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardProperties
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed._shard.sharding_spec.chunk_sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor

from .leaves import PlanningError
from .load_planner import DefaultLoadPlanner
from .plan_functions import create_read_items, create_read_items_for_chunk_list
from .state_dict_loader import _load_state_dict
from .traverse import unflatten_state_dict

__all__ = ["load_sharded_optimizer_state_dict"]


def load_sharded_optimizer_state_dict(
    model_state_dict: dict[str, Any],
    optimizer_key: str,
    storage_reader: StorageReader,
    planner: LoadPlanner | None = None,
) -> dict[str, Any]:
    """Return the optimizer's state from a checkpoint, sharded as FSDP1 shards it. All ranks of the default group.

    Args:
        model_state_dict: from FSDP1 under `StateDictType.SHARDED_STATE_DICT`; tells how tensors are cut.
        optimizer_key: under which the optimizer's state was saved: the first part of its FQNs.
        storage_reader: of the checkpoint.
        planner: as in `load`; not used under tensor parallelism.

    Returns:
        `{optimizer_key: {"state": {fqn: {entry: ShardedTensor}}, ...}}`; tensors of one element are whole.

    Raises:
        CheckpointException: as `load`.
            So does a checkpoint that does not say how its leaves are nested, or a ShardedTensor that holds DTensors.

    Source: torch.distributed.checkpoint.optimizer.
    """
    storage_reader.reset()
    state_dict: dict[str, Any] = {}
    building = _BuildingLoadPlanner(model_state_dict, optimizer_key, planner or DefaultLoadPlanner())
    _load_state_dict(state_dict, storage_reader, planner=building)  # type: ignore[arg-type]  # acts as one
    return unflatten_state_dict(state_dict, building.paths)


class _BuildingLoadPlanner:
    """Makes the destination once it knows the checkpoint's metadata, and leaves the rest to another planner.

    So that what goes wrong here is, like anything in planning, told to all ranks.
    """

    def __init__(self, model_state_dict: dict[str, Any], optimizer_key: str, planner: LoadPlanner) -> None:
        self._model_state_dict, self._optimizer_key, self._planner = model_state_dict, optimizer_key, planner
        self.paths: Mapping[str, Any] = {}

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata, is_coordinator: bool = False) -> None:
        if not isinstance(metadata.planner_data, Mapping):
            raise PlanningError("Expected a checkpoint of a nested state dict but its metadata names no paths.")
        self.paths = metadata.planner_data
        slices, group = _slices(self._model_state_dict)
        origins: dict[str, Sequence[int]] = {}
        for fqn, entry in metadata.state_dict_metadata.items():
            path = self.paths[fqn]
            if path[0] != self._optimizer_key:
                continue
            if not isinstance(entry, TensorStorageMetadata):
                state_dict[fqn] = None  # An object takes this place.
            elif math.prod(entry.size) == 1:
                state_dict[fqn] = torch.empty(entry.size, dtype=entry.properties.dtype, device=_device(group))
            else:
                origin, size = slices.get(str(path[2]), (None, entry.size)) if group is not None else (None, entry.size)
                state_dict[fqn] = _blank(size, entry.properties.dtype, group)
                if origin is not None:
                    origins[fqn] = origin
        if group is not None:
            self._planner = _SlicedLoadPlanner(origins)
        self._planner.set_up_planner(state_dict, metadata, is_coordinator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)


class _SlicedLoadPlanner(DefaultLoadPlanner):
    """Loads tensors that are a slice of what the checkpoint holds: `offsets` tells where each begins."""

    def __init__(self, offsets: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self._offsets = offsets

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for fqn, value in self.state_dict.items():
            entry = self.metadata.state_dict_metadata[fqn]
            items += (
                self._slice_reads(fqn, value, entry) if fqn in self._offsets else create_read_items(fqn, entry, value)
            )
        return LoadPlan(items)

    def _slice_reads(self, fqn: str, value: ShardedTensor, entry: Any) -> list[ReadItem]:
        origin = self._offsets[fqn]
        chunks = [
            ChunkStorageMetadata(torch.Size(map(add, shard.metadata.shard_offsets, origin)), shard.tensor.size())
            for shard in value.local_shards()
        ]
        reads = create_read_items_for_chunk_list(fqn, entry, chunks)
        if sum(math.prod(read.lengths) for read in reads) != sum(math.prod(chunk.sizes) for chunk in chunks):
            raise PlanningError(
                f"Expected chunks that cover the slice of {fqn!r} at {tuple(origin)} but some are missing."
            )
        return [dataclasses.replace(read, dest_index=_shifted(read.dest_index, origin)) for read in reads]


def _shifted(index: MetadataIndex, origin: Sequence[int]) -> MetadataIndex:
    assert index.offset is not None
    return MetadataIndex(index.fqn, tuple(map(sub, index.offset, origin)))


def _slices(state: Mapping[str, Any]) -> tuple[dict[str, tuple[Any, torch.Size]], dist.ProcessGroup | None]:
    """Return where each parameter's slice begins and how large it is; and the group over which slices are cut."""
    slices: dict[str, tuple[Any, torch.Size]] = {}
    group = None
    for fqn, value in state.items():
        if not isinstance(value, torch.Tensor):
            continue
        slices[fqn] = (None, torch.Size(value.size()))
        shards = value.local_shards() if isinstance(value, ShardedTensor) else []
        if any(isinstance(shard.tensor, DTensor) for shard in shards):
            raise PlanningError(
                f"Expected ShardedTensors of tensors but {fqn!r} holds DTensors. Use state_dict instead."
            )
        if shards and isinstance(shards[0].tensor, ShardedTensor):
            slices[fqn] = (shards[0].metadata.shard_offsets, torch.Size(shards[0].metadata.shard_sizes))
            group = shards[0].tensor._process_group
    return slices, group


def _blank(size: Sequence[int], dtype: torch.dtype, group: dist.ProcessGroup | None) -> ShardedTensor:
    """Return an uninitialised ShardedTensor, cut along dim 0 over `group` (None: the default group)."""
    device, rank = _device(group), dist.get_rank()
    placements = [f"rank:{other}/{_device_of(other, device.type)}" for other in dist.get_process_group_ranks(group)]
    spec = ChunkShardingSpec(dim=0, placements=placements)
    whole = spec.build_metadata(torch.Size(size), ShardProperties(dtype=dtype))
    whole.shards_metadata = [shard for shard in whole.shards_metadata if 0 not in shard.shard_sizes]
    local = [
        Shard(torch.empty(shard.shard_sizes, dtype=dtype, device=device), shard)
        for shard in whole.shards_metadata
        if shard.placement is not None and shard.placement.rank() == rank
    ]
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, whole, process_group=group)


def _device(group: dist.ProcessGroup | None) -> torch.device:
    kind = dist.distributed_c10d._get_pg_default_device(group).type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, _get_device_module(kind).current_device())


def _device_of(rank: int, kind: str) -> str:
    return kind if kind == "cpu" else f"{kind}:{rank % _get_device_module(kind).device_count()}"
