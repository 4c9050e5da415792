"""Many ranks in one process: drives one generator per rank, and makes DTensors for any rank without a process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from reference import FileSystemReader, FileSystemWriter, load
from reference.collectives import Broadcast, Gather, Scatter, pack, unpack
from reference.engine import load_protocol, save_protocol


def drive(protocols: Sequence[Any]) -> list[Any]:
    """Return each rank's result, or what it raised. All ranks must ask for the same collective at the same time."""
    answers: list[Any] = [None] * len(protocols)
    outcomes: list[Any] = [None] * len(protocols)
    while True:
        requests: list[Any] = [None] * len(protocols)
        for rank, protocol in enumerate(protocols):
            try:
                requests[rank] = protocol.send(answers[rank])
            except StopIteration as stop:
                outcomes[rank] = stop.value
            except BaseException as error:
                outcomes[rank] = error
        waiting = [request for request in requests if request is not None]
        if not waiting:
            return outcomes
        assert len(waiting) == len(protocols), f"some ranks wait alone: {requests}, {outcomes}"
        kinds = {(type(request), request.step) for request in waiting}
        assert len(kinds) == 1, f"ranks ask for different collectives: {kinds}"
        answers = _answer(waiting)


def _answer(requests: Sequence[Any]) -> list[Any]:
    step, coordinator = requests[0].step, requests[0]
    match coordinator:
        case Gather():
            sent = [pack(request.message, rank, step)[0] for rank, request in enumerate(requests)]
            return [[unpack(raw, rank, step) for rank, raw in enumerate(sent)]] + [None] * (len(requests) - 1)
        case Scatter():
            sent = [pack(message, 0, step)[0] for message in coordinator.messages]
            return [unpack(raw, rank, step) for rank, raw in enumerate(sent)]
        case Broadcast():
            raw = pack(coordinator.message, 0, step)[0]
            return [unpack(raw, rank, step) for rank in range(len(requests))]
    raise AssertionError(coordinator)


def save_all(
    states: Sequence[Any],
    path: Any,
    *,
    planners: Callable[[int], Any] | None = None,
    writers: Callable[[int], Any] | None = None,
    **options: Any,
) -> list[Any]:
    """Save one state dict per rank."""
    return drive(
        [
            save_protocol(
                state,
                rank=rank,
                world_size=len(states),
                open_storage=lambda rank=rank: writers(rank) if writers else FileSystemWriter(path, sync_files=False),
                planner=planners(rank) if planners else None,
                **options,
            )
            for rank, state in enumerate(states)
        ]
    )


def load_all(
    states: Sequence[Any],
    path: Any,
    *,
    planners: Callable[[int], Any] | None = None,
    readers: Callable[[int], Any] | None = None,
) -> list[Any]:
    """Load into one state dict per rank."""
    return drive(
        [
            load_protocol(
                state,
                rank=rank,
                world_size=len(states),
                open_storage=lambda rank=rank: readers(rank) if readers else FileSystemReader(path),
                planner=planners(rank) if planners else None,
            )
            for rank, state in enumerate(states)
        ]
    )


def check(outcomes: Sequence[Any]) -> Sequence[Any]:
    """Raise the first failure, if any."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def mesh_for(rank: int, ranks: Any) -> DeviceMesh:
    """Return a mesh as `rank` sees it."""
    return DeviceMesh("cpu", torch.as_tensor(ranks), _init_backend=False, _rank=rank)


def local_part(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> torch.Tensor:
    """Return what torch's own splitting leaves on this rank of the mesh."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return blank((0,), whole.dtype)
    # Split a tensor of indices, then pick the elements by their bytes: some dtypes know no arithmetic at all.
    part = torch.arange(whole.numel()).reshape(whole.size())
    for axis, placement in enumerate(placements):
        if isinstance(placement, _StridedShard) or placement.is_shard():
            parts, _ = placement._split_tensor(part, mesh.size(axis), with_padding=False, contiguous=True)
            part = parts[coordinate[axis]]
    if not part.numel():
        return blank(part.size(), whole.dtype)
    elements = whole.contiguous().reshape(-1).view(torch.uint8).reshape(-1, whole.dtype.itemsize)
    return elements[part.reshape(-1)].reshape(-1).view(whole.dtype).reshape(part.size())


def shard(whole: torch.Tensor, rank: int, ranks: Any, placements: Sequence[Placement]) -> DTensor:
    """Return `whole` as a DTensor, as `rank` holds it."""
    mesh = mesh_for(rank, ranks)
    return as_dtensor(local_part(whole, mesh, placements), whole, mesh, placements)


def as_dtensor(local: torch.Tensor, whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.size(), stride=whole.contiguous().stride()
    )


def blank_like(value: Any) -> Any:
    """Return a destination with the same nesting and other content."""
    if isinstance(value, DTensor):
        local = blank(value.to_local().size(), value.dtype)
        return DTensor.from_local(
            local, value.device_mesh, value.placements, run_check=False, shape=value.size(), stride=value.stride()
        )
    if isinstance(value, torch.Tensor):
        return blank(value.size(), value.dtype)
    if isinstance(value, dict):
        return type(value)((key, blank_like(entry)) for key, entry in value.items())
    if isinstance(value, list):
        return [blank_like(entry) for entry in value]
    return "not loaded"


def blank(size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    num_bytes = torch.Size(size).numel() * dtype.itemsize
    return (
        torch.zeros(num_bytes, dtype=torch.uint8).view(dtype).reshape(tuple(size))
        if num_bytes
        else torch.empty(tuple(size), dtype=dtype)
    )


def load_into_blank(state: dict[str, Any], path: Any) -> dict[str, Any]:
    """Return what the checkpoint at `path` holds of `state`; this process alone."""
    loaded: dict[str, Any] = blank_like(state)
    load(loaded, checkpoint_id=path)
    return loaded


def noise(size: Sequence[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return a tensor of random bytes: any NaN payload, any denormal."""
    num_bytes = torch.Size(size).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(tuple(size)) if num_bytes else torch.empty(tuple(size), dtype=dtype)


def raw_bytes(value: torch.Tensor) -> bytes:
    """Return the content byte for byte."""
    with torch.no_grad():
        local = value.to_local() if isinstance(value, DTensor) else value.detach()
        local = local.resolve_conj().resolve_neg().contiguous().reshape(-1)
        return local.view(torch.uint8).numpy().tobytes() if local.numel() else b""
