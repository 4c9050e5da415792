"""What one side does at one size in `dcpbench bench planning`, in a process of its own: so is its memory.

A few ranks plan for themselves. The plans of all ranks are made by geometry and pickled as that side sends them; the
coordinator unpacks them, plans for all, and writes the metadata; the same few ranks read it and plan a load.
"""

from __future__ import annotations

import functools
import gc
import json
import pickle
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import reference
from dcpbench.bench.planning_models import MODELS, Grid, Leaf
from dcpbench.errors import DcpbenchError
from reference import gc_pause, save_planner, wire
from reference._dedup_save_plans import dedup_save_plans as reference_dedup
from reference.metadata import check_metadata, dump_metadata, load_metadata

__all__ = ["STEPS", "run"]

STEPS = (
    "local plan",
    "unpack plans",
    "dedup",
    "global plan",
    "validation",
    "metadata encode",
    "metadata decode",
    "load plan",
)
"""In their order. Local plan, metadata decode and load plan are each rank's own; the others the coordinator's."""

_NUM_SAMPLES = 3


def run(side: str, model: str, world_size: int, *, is_whole: bool = True) -> dict[str, Any]:
    """Returns seconds by step, and sizes.

    Args:
        side: ``torch`` or ``reference``.
        model: a name in :data:`~dcpbench.bench.planning_models.MODELS`.
        world_size: ranks that save and load.
        is_whole: the coordinator plans for all ranks. False makes the metadata by geometry, for those who read it.
    """
    grid = MODELS[model].grid(world_size)
    leaves: list[list[Leaf]] = [[] for _ in range(grid.stages)]
    for leaf in MODELS[model].leaves():
        leaves[leaf.stage].append(leaf)
    seconds: dict[str, float] = {}
    ranks = sorted({0, world_size // 2 + 1, world_size - 1})[:_NUM_SAMPLES]
    states = [_state(leaves[grid.place(rank)[0]], grid, rank) for rank in ranks]
    seconds["local plan"] = statistics.median(_local_plan(side, state) for state in states)
    num_items = peak = 0
    if is_whole:
        sent = [_dumped(side, _plan(leaves[grid.place(rank)[0]], grid, rank)) for rank in range(world_size)]
        before = _resident_bytes()
        raw, num_items, num_chunks = _coordinate(side, sent, seconds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        del sent
    else:
        raw, num_chunks = _written(side, _by_geometry(leaves, grid), seconds)
    gc.collect()
    read = _timed(seconds, "metadata decode", lambda: load_metadata(raw) if side == "reference" else pickle.loads(raw))
    seconds["load plan"] = statistics.median(_load_plan(side, state, read) for state in states)
    return {
        "side": side,
        "model": model,
        "world_size": world_size,
        "seconds": seconds,
        "num_items": num_items,
        "num_chunks": num_chunks,
        "metadata_bytes": len(raw),
        "peak_bytes": peak,
    }


def _coordinate(side: str, sent: list[bytes], seconds: dict[str, float]) -> tuple[bytes, int, int]:
    """Returns the metadata's bytes, and how many items and chunks there are."""

    def paused() -> AbstractContextManager[object]:
        return gc_pause.gc_paused() if side == "reference" else nullcontext()

    with paused():
        plans = _timed(seconds, "unpack plans", lambda: [pickle.loads(raw) for raw in sent])
    num_items = sum(len(plan.items) for plan in plans)
    with paused():
        dedup = reference_dedup if side == "reference" else dedup_save_plans
        plans = _timed(seconds, "dedup", functools.partial(dedup, plans, False))
        make: Callable[..., Any] = (
            save_planner.create_default_global_save_plan
            if side == "reference"
            else default_planner.create_default_global_save_plan
        )
        plans, metadata = _timed(seconds, "global plan", functools.partial(make, plans))
        if side == "reference":
            _timed(seconds, "validation", functools.partial(check_metadata, metadata))
        else:
            check = functools.partial(default_planner._validate_global_plan, plans, metadata)
            if faults := _timed(seconds, "validation", check):
                raise DcpbenchError(f"torch refuses the plan: {faults[0]}.")
    metadata.storage_data = {
        item.index: _StorageInfo(f"__{rank}_0.distcp", 1024 * number, 1024)
        for rank, plan in enumerate(plans)
        for number, item in enumerate(plan.items)
    }
    del plans
    raw, num_chunks = _written(side, metadata, seconds)
    return raw, num_items, num_chunks


def _written(side: str, metadata: Metadata, seconds: dict[str, float]) -> tuple[bytes, int]:
    """Returns the metadata's bytes, and how many chunks and objects they list."""
    encode = dump_metadata if side == "reference" else pickle.dumps
    return _timed(seconds, "metadata encode", functools.partial(encode, metadata)), len(metadata.storage_data)


def _by_geometry(leaves: list[list[Leaf]], grid: Grid) -> Metadata:
    """Returns the metadata that all plans together come to."""
    metadata = Metadata({}, storage_data={})
    num_within = grid.first * grid.second
    for stage, held in enumerate(leaves):
        for leaf in held:
            boxes = dict.fromkeys(grid.box(leaf, stage * num_within + number) for number in range(num_within))
            chunks = [ChunkStorageMetadata(torch.Size(box[0]), torch.Size(box[1])) for box in boxes if box is not None]
            properties = TensorProperties(dtype=torch.bfloat16)
            metadata.state_dict_metadata[leaf.fqn] = TensorStorageMetadata(properties, torch.Size(leaf.shape), chunks)
            for number, chunk in enumerate(chunks):
                index = MetadataIndex(leaf.fqn, chunk.offsets, number)
                metadata.storage_data[index] = _StorageInfo(f"__{number}_0.distcp", 1024 * number, 1024)
    return metadata


def _timed(seconds: dict[str, float], name: str, action: Callable[[], Any]) -> Any:
    begin_s = time.process_time()
    result = action()
    seconds[name] = time.process_time() - begin_s
    return result


def _dumped(side: str, plan: SavePlan) -> bytes:
    return wire.dumps(plan) if side == "reference" else pickle.dumps(plan)


def _local_plan(side: str, state: dict[str, Any]) -> float:
    planner = (reference.DefaultSavePlanner if side == "reference" else DefaultSavePlanner)()
    begin_s = time.process_time()
    planner.set_up_planner(state, None, True)
    planner.create_local_plan()
    return time.process_time() - begin_s


def _load_plan(side: str, state: dict[str, Any], metadata: Metadata) -> float:
    planner = (reference.DefaultLoadPlanner if side == "reference" else DefaultLoadPlanner)()
    begin_s = time.process_time()
    planner.set_up_planner(state, metadata, True)
    plan = planner.create_local_plan()
    elapsed_s = time.process_time() - begin_s
    wanted = sum(_local(tensor).numel() for tensor in state.values())
    if sum(item.lengths.numel() for item in plan.items) != wanted:
        raise DcpbenchError(f"{side} does not plan to read what is asked for.")
    return elapsed_s


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _plan(leaves: list[Leaf], grid: Grid, rank: int) -> SavePlan:
    """Returns the local plan of a rank, as both sides make it."""
    properties, items = TensorProperties(dtype=torch.bfloat16), []
    for leaf in leaves:
        if (box := grid.box(leaf, rank)) is not None:
            offsets, sizes = torch.Size(box[0]), torch.Size(box[1])
            data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, torch.Size(leaf.shape))
            kind = WriteItemType.SHARD if leaf.shape else WriteItemType.TENSOR
            items.append(WriteItem(MetadataIndex(leaf.fqn, offsets), kind, tensor_data=data))
    return SavePlan(items)


def _state(leaves: list[Leaf], grid: Grid, rank: int) -> dict[str, Any]:
    """Returns the state dict of a rank: tensors of one element that seem to be as large as they are."""
    stage, *_ = grid.place(rank)
    first = stage * grid.first * grid.second
    ranks = torch.arange(first, first + grid.first * grid.second).reshape(grid.first, grid.second)
    mesh = DeviceMesh("cpu", ranks, _init_backend=False, _rank=rank)
    state: dict[str, Any] = {}
    for leaf in leaves:
        if not leaf.shape:
            state[leaf.fqn] = torch.zeros((), dtype=torch.bfloat16)
            continue
        box = grid.box(leaf, rank)
        sizes = box[1] if box is not None else (0, *leaf.shape[1:])
        local = torch.zeros((), dtype=torch.bfloat16).expand(sizes)
        placements = [Replicate() if dim is None else Shard(dim) for dim in leaf.dims]
        whole = torch.empty(leaf.shape, device="meta")
        state[leaf.fqn] = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=whole.size(), stride=whole.stride()
        )
    return state


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], int(sys.argv[3]), is_whole=sys.argv[4] == "whole")))
