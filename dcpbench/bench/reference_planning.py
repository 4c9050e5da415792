"""How long a load takes to plan against a tensor that was saved in many chunks. Runs on one rank, without a group.

Each side reads the metadata as its own save writes it, so that what a side prepares there counts for it; decoding is
timed apart. The whole plan counts, each of its items looked at.
"""

from __future__ import annotations

import importlib
import itertools
import pickle
import time
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dcpbench.bench.figures import Planned
from dcpbench.bench.reference_ranks import MODULES
from dcpbench.errors import DcpbenchError

__all__ = ["plan_load"]

_ROWS = 2
_COLUMNS = 1 << 20
"""More than rows, as in the widest layers: the dim that is cut is then not the longest one."""


def plan_load(
    _rank: int, _world_size: int, *, side: str, num_chunks: int, num_tensors: int, destination: str
) -> Planned:
    """Plans one load of ``num_tensors`` tensors of ``num_chunks`` chunks each, after checking what the plan covers."""
    size = torch.Size((num_chunks * _ROWS, _COLUMNS))
    names = [f"layers.{number}.weight" for number in range(num_tensors)]
    boxes = _boxes(destination, num_chunks)
    state = {name: _holder(size, boxes) for name in names}
    raw = _written(side, names, size, num_chunks)
    begin_s = time.monotonic()
    metadata = _read(side, raw)
    decoded_s = time.monotonic()
    planner = importlib.import_module(MODULES[side]).DefaultLoadPlanner()
    planner.set_up_planner(state, metadata, True)
    plan_begin_s = time.monotonic()
    plan = planner.create_local_plan()
    num_items = sum(1 for _ in plan.items)
    end_s = time.monotonic()
    covered = sum(item.lengths.numel() for item in plan.items)
    wanted = num_tensors * sum(box.sizes.numel() for box in boxes)
    if covered != wanted:
        raise DcpbenchError(f"{side} planned reads of {covered} elements where {wanted} are asked for.")
    return Planned(decoded_s - begin_s, end_s - plan_begin_s, num_items)


class _Holder(torch.Tensor):
    """Stands for a tensor of which this rank holds some boxes: one element, expanded, since nothing is filled."""

    boxes: list[ChunkStorageMetadata]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self.boxes

    def __create_write_items__(self, fqn: str, _value: Any) -> list[Any]:
        raise NotImplementedError(f"{fqn} is only loaded.")

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        box = self.boxes[index.index or 0]
        return torch.empty(box.sizes, device="meta")


def _holder(size: torch.Size, boxes: list[ChunkStorageMetadata]) -> _Holder:
    holder: _Holder = torch.zeros(()).expand(size).as_subclass(_Holder)
    holder.boxes = boxes
    return holder


def _boxes(destination: str, num_chunks: int) -> list[ChunkStorageMetadata]:
    num_rows = num_chunks * _ROWS
    if destination == "as many boxes":  # each begins in the middle of a chunk
        edges = [0, *range(_ROWS // 2, num_rows, _ROWS), num_rows]
        return [_box(begin, end) for begin, end in itertools.pairwise(edges)]
    num_ranks = min(int(destination.split()[2]), num_chunks)
    return [_box(num_rows // num_ranks, num_rows // num_ranks * 2)]


def _box(begin: int, end: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size((begin, 0)), torch.Size((end - begin, _COLUMNS)))


def _written(side: str, names: list[str], size: torch.Size, num_chunks: int) -> bytes:
    metadata = Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(torch.float32),
                size,
                [_box(_ROWS * number, _ROWS * (number + 1)) for number in range(num_chunks)],
            )
            for name in names
        },
        storage_data={},
        storage_meta=StorageMeta(),
    )
    if side == "reference":
        written: bytes = importlib.import_module("reference.metadata").dump_metadata(metadata)
        return written
    return pickle.dumps(metadata)


def _read(side: str, raw: bytes) -> Any:
    return (
        importlib.import_module("reference.metadata").load_metadata(raw) if side == "reference" else pickle.loads(raw)
    )
