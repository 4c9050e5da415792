"""Planners that cut, order and route chunks in other ways."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem, WriteItemType

from tests.odd_backends.dense import local_of

__all__ = [
    "Bookkeeping",
    "ColumnHalves",
    "HighestRank",
    "Hintless",
    "Restaging",
    "RoundRobin",
    "RowChunks",
    "Shuffled",
]


class RowChunks(dcp.DefaultSavePlanner):
    """Makes each row along dim 0 a chunk of its own, where there are at most a hundred."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.first = {item.index.fqn: item.index.offset[0] for item in plan.items if item.index.offset}
        return dataclasses.replace(plan, items=[part for item in plan.items for part in self.rows(item)])

    def rows(self, item: WriteItem) -> Iterator[WriteItem]:
        chunk = item.tensor_data.chunk if self.is_cut(item.index.fqn) else None
        if chunk is None or 0 in chunk.sizes:
            yield item
            return
        for row in range(chunk.sizes[0]):
            at = torch.Size([chunk.offsets[0] + row, *chunk.offsets[1:]])
            part = ChunkStorageMetadata(at, torch.Size([1, *chunk.sizes[1:]]))
            data = dataclasses.replace(item.tensor_data, chunk=part)
            yield WriteItem(MetadataIndex(item.index.fqn, at), WriteItemType.SHARD, tensor_data=data)

    def is_cut(self, fqn: str) -> bool:
        held = self.state_dict[fqn]
        return isinstance(held, torch.Tensor) and held.dim() > 0 and held.size(0) <= 100

    def lookup_object(self, index: MetadataIndex) -> Any:
        held = self.state_dict[index.fqn]
        local = local_of(held) if isinstance(held, torch.Tensor) else held
        if not self.is_cut(index.fqn) or not local.numel():
            return local
        return local.narrow(0, index.offset[0] - self.first[index.fqn], 1)


class HighestRank(dcp.DefaultSavePlanner):
    """Has the last rank that holds a chunk write it."""

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        last = {item.index: number for number, plan in enumerate(all_plans) for item in plan.items}
        return [
            dataclasses.replace(plan, items=[item for item in plan.items if last[item.index] == number])
            for number, plan in enumerate(all_plans)
        ]


class Shuffled(dcp.DefaultSavePlanner):
    """Writes its items in random order, lists chunks backwards and leaves empty ones out of the metadata."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                entry.chunks = [chunk for chunk in reversed(entry.chunks) if 0 not in chunk.sizes]
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        items = random.sample(new_plan.items, len(new_plan.items))
        return super().finish_plan(dataclasses.replace(new_plan, items=items))


class Bookkeeping(dcp.DefaultSavePlanner):
    """Adds entries of its own to the metadata, for a tensor and a value that no state dict has."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        whole = ChunkStorageMetadata(torch.Size([3]), torch.Size([3]))
        own = TensorStorageMetadata(TensorProperties(torch.uint8), torch.Size([3]), [whole, whole])
        entries = {**metadata.state_dict_metadata, "\0index of the engine": own, "\0notes": BytesStorageMetadata()}
        return plans, dataclasses.replace(metadata, state_dict_metadata=entries)


class Restaging(dcp.DefaultLoadPlanner):
    """Has each part read into memory of its own, and copies it into the tensor when it is complete."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return torch.empty_like(super().resolve_tensor(read_item), memory_format=torch.contiguous_format)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        super().resolve_tensor(read_item).detach().copy_(tensor)


class RoundRobin(dcp.DefaultSavePlanner):
    """Has the ranks that hold a chunk take turns in writing."""

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        holders: dict[MetadataIndex, list[int]] = {}
        for number, plan in enumerate(all_plans):
            for item in plan.items:
                holders.setdefault(item.index, []).append(number)
        writer = {index: ranks[turn % len(ranks)] for turn, (index, ranks) in enumerate(holders.items())}
        return [
            dataclasses.replace(plan, items=[item for item in plan.items if writer[item.index] == number])
            for number, plan in enumerate(all_plans)
        ]


class Hintless(dcp.DefaultSavePlanner):
    """Gives no hint where in a list of chunks an item's is: DCP's indices may have one, and need none."""

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        items = [
            dataclasses.replace(item, index=dataclasses.replace(item.index, index=None)) for item in new_plan.items
        ]
        return super().finish_plan(dataclasses.replace(new_plan, items=items))


class ColumnHalves(RowChunks):
    """Makes two chunks of what a rank holds, cut along the last dim."""

    def create_local_plan(self) -> SavePlan:
        plan = dcp.DefaultSavePlanner.create_local_plan(self)
        self.first = {item.index.fqn: item.index.offset[-1] for item in plan.items if item.index.offset}
        return dataclasses.replace(plan, items=[part for item in plan.items for part in self.rows(item)])

    def rows(self, item: WriteItem) -> Iterator[WriteItem]:
        chunk = item.tensor_data.chunk if self.is_cut(item.index.fqn) else None
        if chunk is None or 0 in chunk.sizes or chunk.sizes[-1] < 2:
            yield item
            return
        middle = chunk.sizes[-1] // 2
        for start, size in ((0, middle), (middle, chunk.sizes[-1] - middle)):
            at = torch.Size([*chunk.offsets[:-1], chunk.offsets[-1] + start])
            part = ChunkStorageMetadata(at, torch.Size([*chunk.sizes[:-1], size]))
            data = dataclasses.replace(item.tensor_data, chunk=part)
            yield WriteItem(MetadataIndex(item.index.fqn, at), WriteItemType.SHARD, tensor_data=data)

    def lookup_object(self, index: MetadataIndex) -> Any:
        held = self.state_dict[index.fqn]
        local = local_of(held) if isinstance(held, torch.Tensor) else held
        if not self.is_cut(index.fqn) or not local.numel() or local.size(-1) < 2:
            return local
        middle, start = local.size(-1) // 2, index.offset[-1] - self.first[index.fqn]
        return local.narrow(-1, start, local.size(-1) - middle if start else middle)
