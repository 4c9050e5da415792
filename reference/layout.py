"""Which boxes of a global tensor this rank holds, and where each lies in the local tensor.

Planning starts here: a leaf that is a tensor becomes a list of `LocalBox`, on saving (each is a chunk to write) and on
loading (each is a region to fill). All arithmetic is on integers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

__all__ = [
    "LayoutError",
    "LocalBox",
    "Run",
    "global_size",
    "is_checkpointable",
    "is_sharded",
    "is_tensor_leaf",
    "local_boxes",
    "local_runs",
    "own_write_items",
    "source_tensor",
    "tensor_shard",
]

Run = tuple[int, int]
"""A stretch of one tensor dim: (first global index, number of indices)."""

_Cut = tuple[int, int | None]
"""What a mesh axis does to a tensor: the dim that it cuts, and the split factor of a strided shard."""


class LayoutError(ValueError):
    """A tensor whose place in the global tensor cannot be told."""


@dataclass(frozen=True)
class LocalBox:
    """One box of the global tensor that this rank holds.

    Args:
        offsets: where the box begins in the global tensor; `()` for a scalar.
        sizes: its extent; may hold zeros only if the whole tensor is empty.
        data: the view of the local tensor that is this box; it has shape `sizes`. None for a tensor that describes its
            own chunks: it is asked with `tensor_shard` once the data is needed, since it may have to make them.
    """

    offsets: torch.Size
    sizes: torch.Size
    data: torch.Tensor | None


def is_checkpointable(value: Any) -> bool:
    """Whether `value` describes its own chunks: `__get_tensor_shard__` with one or both of its siblings.

    `__create_write_items__` is what saving needs, `__create_chunk_list__` what loading needs. A DTensor has these
    methods as well, with torch's own arithmetic behind them; it only counts if its local tensor has them.
    """
    if isinstance(value, DTensor):
        value = _local_tensor(value)
    return hasattr(value, "__get_tensor_shard__") and (
        hasattr(value, "__create_chunk_list__") or hasattr(value, "__create_write_items__")
    )


def own_write_items(fqn: str, value: Any) -> list[WriteItem] | None:
    """Return the write items that `value` makes itself; None if it leaves that to us."""
    target = _local_tensor(value) if isinstance(value, DTensor) else value
    if not is_checkpointable(value) or not hasattr(target, "__create_write_items__"):
        return None
    return list(target.__create_write_items__(fqn, value))


def tensor_shard(value: Any, index: MetadataIndex) -> torch.Tensor:
    """Return the part at `index` of a tensor that describes its own chunks."""
    target: Any = _local_tensor(value) if isinstance(value, DTensor) else value
    shard: torch.Tensor = target.__get_tensor_shard__(index)
    return shard.detach()


def is_tensor_leaf(value: Any) -> bool:
    """Whether `value` is stored as chunks, rather than pickled as an object."""
    return isinstance(value, torch.Tensor) or is_checkpointable(value)


def is_sharded(value: torch.Tensor) -> bool:
    """Whether other ranks may hold other parts of `value`."""
    return isinstance(value, DTensor | ShardedTensor)


def global_size(value: torch.Tensor) -> torch.Size:
    """Return the shape of the whole tensor, of which this rank may hold a part."""
    return torch.Size(value.size())


def source_tensor(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor that tells the dtype and layout of what this rank holds, without any communication."""
    if isinstance(value, DTensor):
        return _local_tensor(value)
    if isinstance(value, ShardedTensor):
        shards = value.local_shards()
        return source_tensor(shards[0].tensor) if shards else torch.empty(0, dtype=value.dtype)
    return value


def local_boxes(fqn: str, value: torch.Tensor) -> list[LocalBox]:
    """Return the boxes of `value` that this rank holds, in the order of their place in the local tensor.

    A `_StridedShard` may leave a rank with several separate boxes: one box from first to last element would claim
    elements that other ranks hold. An empty shard is no box at all, except when the whole tensor is empty: then each
    rank of the mesh has one box, the whole, so that the tensor is recorded at all.

    Args:
        fqn: the leaf's name, for error messages.
        value: a plain tensor, a DTensor, a ShardedTensor, or a tensor with the checkpointable methods.

    Raises:
        LayoutError: a placement that has no boxes (`Partial`, or an unknown one), or a local tensor whose shape
            contradicts its placements.

    Source: torch.distributed.tensor.placement_types, `Shard._custom_chunk` and `_StridedShard._split_tensor`.
    """
    if isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None:
        return []
    if is_checkpointable(value):
        return _checkpointable_boxes(fqn, value)
    if isinstance(value, DTensor):
        return _dtensor_boxes(fqn, value)
    if isinstance(value, ShardedTensor):
        return _sharded_tensor_boxes(fqn, value, (0,) * len(value.size()))
    size = torch.Size(value.size())
    return [LocalBox(torch.Size([0] * len(size)), size, _settled(value).detach())]


@functools.lru_cache(maxsize=4096)  # the tensors of a model have few shapes
def local_runs(dim_size: int, splits: tuple[tuple[int, int, int | None], ...]) -> tuple[Run, ...]:
    """Return the runs of one tensor dim that a rank holds, in local order.

    Args:
        dim_size: global extent of the dim; may be 0.
        splits: one `(num_shards, position, split_factor)` per mesh axis that shards this dim, in the order in which
            they apply; `split_factor` is None for `Shard`.
    """
    runs: list[Run] = [(0, dim_size)]
    for num_shards, position, split_factor in splits:
        if split_factor is None:
            runs = _nth_piece(runs, num_shards, position)
        else:
            pieces = [_nth_piece(runs, split_factor, i) for i in range(split_factor)]
            runs = [run for piece in pieces for run in _nth_piece(piece, num_shards, position)]
    return tuple(_merge([run for run in runs if run[1]]))


def _nth_piece(runs: list[Run], num_pieces: int, position: int) -> list[Run]:
    # As torch.chunk: every piece but the last ones has ceil(length / num_pieces) elements; the last may be empty.
    length = sum(run[1] for run in runs)
    step = -(-length // num_pieces)
    begin, end = min(step * position, length), min(step * (position + 1), length)
    piece = []
    at = 0
    for start, size in runs:
        low, high = max(begin, at), min(end, at + size)
        if low < high:
            piece.append((start + low - at, high - low))
        at += size
    return piece


def _merge(runs: list[Run]) -> list[Run]:
    merged: list[Run] = []
    for start, size in runs:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + size)
        else:
            merged.append((start, size))
    return merged


def _dtensor_boxes(fqn: str, value: DTensor) -> list[LocalBox]:
    mesh, size, placements = value.device_mesh, torch.Size(value.size()), value.placements
    local = _local_tensor(value)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    # A redistributed DTensor may have been sharded by its mesh axes in another order than left to right.
    order = tuple(axis for entry in getattr(value._spec, "shard_order", None) or () for axis in entry.mesh_dims)
    cuts = tuple([_cut_of(fqn, value, placement) for placement in placements])
    runs, expected = _runs_of_all(size, tuple(mesh.shape), tuple(coordinate), cuts, order)
    if 0 in size:
        return [LocalBox(torch.Size([0] * len(size)), size, local.detach().new_empty(size))]
    if local.size() != expected and (local.numel() or math.prod(expected)):
        raise LayoutError(
            f"Expected a local tensor of shape {tuple(expected)} but got {fqn!r} local shape={tuple(local.size())} "
            f"for global shape {tuple(size)}, placements {placements!r}, mesh coordinate {coordinate!r}. "
            "Pass shape= and stride= to DTensor.from_local if the shards are uneven."
        )
    return _boxes_of_runs(runs, local)


def _cut_of(fqn: str, value: DTensor, placement: Placement) -> _Cut | None:
    """Return the dim that a placement cuts, with the split factor of a strided shard; None if it cuts none."""
    if type(placement) is Shard:
        return (placement.dim, None)
    if isinstance(placement, _StridedShard):
        return (placement.dim, int(placement.split_factor))
    if isinstance(placement, Shard):
        return (placement.dim, None)
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, Partial):
        raise LayoutError(
            f"Expected placements without pending reductions but got {fqn!r} placements={value.placements!r}. "
            "Call redistribute() with Replicate or Shard first."
        )
    raise LayoutError(
        f"Expected Shard, Replicate or _StridedShard placements but got {fqn!r} "
        f"placements={value.placements!r}. Redistribute the tensor to one of these."
    )


@functools.lru_cache(maxsize=4096)
def _runs_of_all(
    size: torch.Size,
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    cuts: tuple[_Cut | None, ...],
    first_axes: tuple[int, ...],
) -> tuple[list[tuple[Run, ...]], torch.Size]:
    """Return what a place of the mesh holds along each dim, and the local shape; worked out once for equal tensors."""
    splits: list[list[tuple[int, int, int | None]]] = [[] for _ in size]
    for axis in (*first_axes, *(axis for axis in range(len(mesh_shape)) if axis not in first_axes)):
        cut = cuts[axis]
        if cut is not None:
            dim, split_factor = cut
            splits[dim].append((mesh_shape[axis], coordinate[axis], split_factor))
    runs = [local_runs(dim_size, tuple(dim_splits)) for dim_size, dim_splits in zip(size, splits, strict=True)]
    return runs, torch.Size([sum(length for _, length in dim_runs) for dim_runs in runs])


def _boxes_of_runs(runs: list[tuple[Run, ...]], local: torch.Tensor) -> list[LocalBox]:
    if all(len(dim_runs) == 1 for dim_runs in runs):
        offsets = torch.Size([dim_runs[0][0] for dim_runs in runs])
        return [LocalBox(offsets, torch.Size(local.size()), local.detach())]
    positions = [list(itertools.accumulate((length for _, length in dim_runs), initial=0)) for dim_runs in runs]
    boxes = []
    local = local.detach()
    for picks in itertools.product(*(range(len(dim_runs)) for dim_runs in runs)):
        data = local
        for dim, pick in enumerate(picks):
            if len(runs[dim]) > 1:
                data = data.narrow(dim, positions[dim][pick], runs[dim][pick][1])
        offsets = torch.Size(runs[dim][pick][0] for dim, pick in enumerate(picks))
        boxes.append(LocalBox(offsets, torch.Size(data.size()), data))
    return boxes


def _local_tensor(value: DTensor) -> torch.Tensor:
    # What to_local() returns under no_grad(); asked for several times for each leaf of a plan.
    return _settled(value._local_tensor)


def _settled(value: torch.Tensor) -> torch.Tensor:
    """Return `value` once the collective that makes it is over."""
    return value.wait() if isinstance(value, AsyncCollectiveTensor) else value


def _sharded_tensor_boxes(fqn: str, value: ShardedTensor, origin: Sequence[int]) -> list[LocalBox]:
    boxes: list[LocalBox] = []
    for shard in value.local_shards():
        offsets = [a + b for a, b in zip(origin, shard.metadata.shard_offsets, strict=True)]
        if isinstance(shard.tensor, ShardedTensor):
            boxes += _sharded_tensor_boxes(fqn, shard.tensor, offsets)
        elif isinstance(shard.tensor, DTensor):
            boxes += [
                LocalBox(torch.Size(map(add, offsets, box.offsets)), box.sizes, box.data)
                for box in local_boxes(fqn, shard.tensor)
                if math.prod(box.sizes) or math.prod(value.size()) == 0
            ]
        elif shard.tensor.numel() or math.prod(value.size()) == 0:
            boxes.append(LocalBox(torch.Size(offsets), torch.Size(shard.tensor.size()), shard.tensor.detach()))
    return boxes


def _checkpointable_boxes(fqn: str, value: Any) -> list[LocalBox]:
    target: Any = _local_tensor(value) if isinstance(value, DTensor) else value
    if not hasattr(target, "__create_chunk_list__"):
        raise LayoutError(
            f"Expected a tensor that lists its chunks but got {fqn!r}, a {type(target).__qualname__} without "
            "__create_chunk_list__. Add that method."
        )
    return [
        LocalBox(torch.Size(chunk.offsets), torch.Size(chunk.sizes), None) for chunk in target.__create_chunk_list__()
    ]
