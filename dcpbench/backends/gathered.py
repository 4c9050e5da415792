"""The backend ``gathered``: ``torch.save`` on rank 0 of what all ranks hold, as many a training script does it.

Each rank sends its leaves by path, of DTensors the box that it holds; rank 0 puts the boxes together and writes one
file, which every rank reads in full. What a rank holds as strided shards is no box, and is refused.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from dcpbench.backends.protocol import EngineBackend

__all__ = ["BACKEND", "load", "save"]

_FILE = "checkpoint.pt"
_Path = tuple[Any, ...]


def save(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    """Saves ``state_dict``; all ranks call it. All of them raise where one of them cannot go on."""
    packed, problem = b"", ""
    try:
        packed = _packed({path: _sent(path, value) for path, value in _leaves(state_dict) if _is_here(value)})
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    _agree(problem)
    parts = _gather(packed)
    if parts is not None:
        try:
            _write(_put_together([_unpacked(part) for part in parts]), checkpoint_id)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
    _agree(problem)


def load(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    """Fills ``state_dict``; all ranks call it, and all raise, with nothing filled, where one misses something."""
    held: dict[_Path, Any] = {}
    wanted = list(_leaves(state_dict))
    problem = ""
    try:
        held = torch.load(Path(checkpoint_id, _FILE), weights_only=False)
        for path, value in wanted:
            _check(path, value, held)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    _agree(problem)
    for path, value in wanted:
        if isinstance(value, torch.Tensor):
            _fill(path, value, held[path])
        else:
            at: Any = state_dict
            for part in path[:-1]:
                at = at[part]
            at[path[-1]] = held[path]


def _leaves(held: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """Yields paths and leaves: tensors and values; a list without tensors is a value, as DCP has it."""
    is_list = isinstance(held, list) and _has_tensor(held)
    children = held.items() if isinstance(held, dict) else enumerate(held) if is_list else None
    if children is None or (path and not held):
        yield path, held
        return
    for key, value in children:
        yield from _leaves(value, (*path, key))


def _has_tensor(held: Any) -> bool:
    children = held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()
    return isinstance(held, torch.Tensor) or any(map(_has_tensor, children))


@dataclass(frozen=True)
class _Box:
    """What one rank holds of a tensor."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: torch.Tensor


def _is_here(value: Any) -> bool:
    return not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is not None


def _offsets(path: _Path, tensor: DTensor) -> tuple[int, ...]:
    if any(isinstance(placement, _StridedShard) for placement in tensor.placements):
        raise NotImplementedError(f"{_fqn(path)} is a strided shard")
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]


def _sent(path: _Path, value: Any) -> Any:
    if isinstance(value, DTensor):
        return _Box(tuple(value.shape), _offsets(path, value), value.to_local().detach())
    return value.detach() if isinstance(value, torch.Tensor) else value


def _put_together(parts: Sequence[dict[_Path, Any]]) -> dict[_Path, Any]:
    """Returns the leaves of all ranks; where several hold one, that of the lowest rank, and of boxes the whole."""
    whole: dict[_Path, Any] = {}
    for part in parts:
        for path, value in part.items():
            if not isinstance(value, _Box):
                whole.setdefault(path, value)
                continue
            if path not in whole:
                whole[path] = torch.empty(value.shape, dtype=value.data.dtype)
            _part(whole[path], value.offsets, value.data.shape).copy_(value.data)
    return whole


def _part(whole: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        whole = whole.narrow(dim, offset, size) if size else whole.narrow(dim, 0, 0)
    return whole


def _fqn(path: _Path) -> str:
    return ".".join(map(str, path))


def _packed(leaves: dict[_Path, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(leaves, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> dict[_Path, Any]:
    found: dict[_Path, Any] = torch.load(io.BytesIO(data), weights_only=False)
    return found


def _gather(packed: bytes) -> list[bytes] | None:
    """Returns what all ranks hold, in their order, on rank 0; None on the others."""
    if not dist.is_initialized():
        return [packed]
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(packed, parts)
    return parts


def _agree(problem: str) -> None:
    """Raises on all ranks if one of them has a problem."""
    problems: list[Any] = [problem]
    if dist.is_initialized():
        problems = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    if first := next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text), ""):
        raise RuntimeError(first)


def _write(leaves: dict[_Path, Any], checkpoint_id: str) -> None:
    """Writes the file beside the one that it replaces, and makes sure of each step before the next."""
    folder = Path(checkpoint_id)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{_FILE}.tmp"
    with temporary.open("wb") as file:
        torch.save(leaves, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / _FILE)
    for name in (folder, folder.parent):
        descriptor = os.open(name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _check(path: _Path, value: Any, held: dict[_Path, Any]) -> None:
    fqn = _fqn(path)
    if isinstance(value, DTensor) and _is_here(value):
        _offsets(path, value)
    if path not in held:
        raise KeyError(f"{fqn} is not in the checkpoint")
    is_tensor, was_tensor = isinstance(value, torch.Tensor), isinstance(held[path], torch.Tensor)
    if is_tensor != was_tensor:
        raise ValueError(f"{fqn} is {'a tensor' if was_tensor else 'no tensor'} in the checkpoint")
    if is_tensor and value.shape != held[path].shape:
        raise ValueError(f"{fqn} is {tuple(held[path].shape)} in the checkpoint, not {tuple(value.shape)}")


def _fill(path: _Path, target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        if not isinstance(target, DTensor):
            target.detach().copy_(source)
        elif _is_here(target):
            local = target.to_local().detach()
            local.copy_(_part(source, _offsets(path, target), local.shape))


BACKEND = EngineBackend("gathered", save, load, absent=("strided-shards",))
