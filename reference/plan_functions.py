"""Steps of planning as functions, for planners of one's own: what `DefaultSavePlanner` and `DefaultLoadPlanner` do."""

from __future__ import annotations

from collections.abc import Sequence
from operator import sub
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from .boxes import BoxIndex
from .layout import is_tensor_leaf, local_boxes
from .leaves import PlanningError
from .load_planner import DefaultLoadPlanner
from .metadata import metadata_faults
from .save_planner import create_default_global_save_plan, write_items

__all__ = [
    "create_chunk_list",
    "create_default_global_load_plan",
    "create_default_local_load_plan",
    "create_default_local_metadata",
    "create_read_items",
    "create_read_items_for_chunk_list",
    "create_write_items",
    "validate_global_plan",
]


def create_default_local_load_plan(state_dict: dict[str, Any], metadata: Metadata, strict: bool = True) -> LoadPlan:
    """Return the reads that fill what this rank holds of a flat state dict.

    Args:
        state_dict: FQN -> value.
        metadata: of the checkpoint.
        strict: False leaves out what the checkpoint lacks, instead of refusing.

    Raises:
        PlanningError: a leaf is missing, or differs in shape or kind; all such are named.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, allow_partial_load=not strict)
    planner.set_up_planner(state_dict, metadata)
    return planner.create_local_plan()


def create_default_global_load_plan(all_plans: list[LoadPlan]) -> list[LoadPlan]:
    """Return the plans unchanged: reads need no agreement. Coordinator only."""
    return all_plans


def create_read_items_for_chunk_list(
    fqn: str, checkpoint_md: TensorStorageMetadata, local_chunks: Sequence[ChunkStorageMetadata]
) -> list[ReadItem]:
    """Return the reads that fill `local_chunks` from a checkpoint's chunks, in the order of `local_chunks`.

    Nothing is checked: elements that the checkpoint lacks are not read.

    Args:
        fqn: the leaf's name.
        checkpoint_md: the leaf's entry in the checkpoint's metadata.
        local_chunks: boxes of the global tensor to fill.
    """
    index = BoxIndex(checkpoint_md.chunks)
    reads = []
    for position, local in enumerate(local_chunks):
        for saved_position, offsets, sizes in index.overlapping(local.offsets, local.sizes):
            saved = checkpoint_md.chunks[saved_position]
            reads.append(
                ReadItem(
                    LoadItemType.TENSOR,
                    dest_index=MetadataIndex(fqn, local.offsets, position),
                    dest_offsets=torch.Size(map(sub, offsets, local.offsets)),
                    storage_index=MetadataIndex(fqn, saved.offsets, saved_position),
                    storage_offsets=torch.Size(map(sub, offsets, saved.offsets)),
                    lengths=torch.Size(sizes),
                )
            )
    return reads


def create_read_items(fqn: str, md: TensorStorageMetadata | BytesStorageMetadata, obj: Any) -> list[ReadItem]:
    """Return the reads that fill `obj`, whatever it is.

    Raises:
        PlanningError: `obj` is no tensor, and the checkpoint holds one.
    """
    if isinstance(md, TensorStorageMetadata):
        return create_read_items_for_chunk_list(fqn, md, create_chunk_list(obj, fqn))
    zero = torch.Size((0,))
    return [ReadItem(LoadItemType.BYTE_IO, MetadataIndex(fqn), zero, MetadataIndex(fqn), zero, zero)]


def create_chunk_list(tensor: Any, fqn: str = "") -> list[ChunkStorageMetadata]:
    """Return the boxes that this rank holds of `tensor`.

    Raises:
        PlanningError: it is no tensor.
        LayoutError: a tensor whose boxes cannot be told.
    """
    if not is_tensor_leaf(tensor):
        raise PlanningError(f"Expected a tensor but got {fqn!r}, a {type(tensor).__qualname__}.")
    return [ChunkStorageMetadata(box.offsets, box.sizes) for box in local_boxes(fqn, tensor)]


def create_write_items(fqn: str, object: Any) -> list[WriteItem]:  # noqa: A002  torch's name
    """Return what this rank writes of the leaf `fqn`."""
    return write_items(fqn, object, local_boxes)


def create_default_local_metadata(state_dict: dict[str, Any]) -> Metadata:
    """Return the metadata of a flat state dict as far as this rank can tell without asking others.

    A ShardedTensor knows all its shards; of a DTensor, only this rank's boxes are described.
    """
    items: list[WriteItem] = []
    for fqn, value in state_dict.items():
        items += _all_shards(fqn, value) if isinstance(value, ShardedTensor) else create_write_items(fqn, value)
    return create_default_global_save_plan([SavePlan(items)])[1]


def validate_global_plan(global_plan: list[SavePlan], metadata: Metadata) -> list[str]:
    """Return what is wrong with the chunks of `metadata`, one sentence each; empty if all is well.

    Args:
        global_plan: one plan per rank; a single one may leave gaps.
        metadata: the plan's.
    """
    return metadata_faults(metadata, must_cover=len(global_plan) > 1)


def _all_shards(fqn: str, value: ShardedTensor) -> list[WriteItem]:
    held = value.metadata()
    theirs = held.tensor_properties
    properties = TensorProperties(dtype=theirs.dtype, layout=theirs.layout, requires_grad=theirs.requires_grad)
    items = []
    for shard in held.shards_metadata:
        chunk = ChunkStorageMetadata(torch.Size(shard.shard_offsets), torch.Size(shard.shard_sizes))
        data = TensorWriteData(chunk, properties, held.size)
        items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
    return items
