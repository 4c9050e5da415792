"""The backend ``gathered``: ``torch.save`` on rank 0 of what all ranks hold, as many a training script does it.

Each rank turns its state dict into leaves by path, whole tensors for DTensors; rank 0 writes them to one file, which
every rank reads in full.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from dcpbench.backends.protocol import EngineBackend

__all__ = ["BACKEND", "load", "save"]

_FILE = "checkpoint.pt"
_Path = tuple[Any, ...]


def save(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    """Saves ``state_dict``; all ranks call it. All of them raise where one of them cannot go on."""
    packed, problem = b"", ""
    try:
        whole = [(path, value, _whole(value)) for path, value in _leaves(state_dict) if _is_here(value)]
        packed = _packed({path: full for path, value, full in whole if _is_sent(value)})
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    _agree(problem)
    parts = _gather(packed)
    if parts is not None:
        try:
            _write({path: value for part in reversed(parts) for path, value in _unpacked(part).items()}, checkpoint_id)
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
            _fill(value, held[path])
        else:
            at: Any = state_dict
            for part in path[:-1]:
                at = at[part]
            at[path[-1]] = held[path]


def _leaves(held: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    children = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list) else None
    if children is None or (path and not held):
        yield path, held
        return
    for key, value in children:
        yield from _leaves(value, (*path, key))


def _is_here(value: Any) -> bool:
    return not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is not None


def _is_sent(value: Any) -> bool:
    """Reads as: rank 0 cannot know it without being told, unlike a DTensor of its own, which it has made whole."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return rank == 0 or not isinstance(value, DTensor) or 0 not in value.device_mesh.mesh


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor().detach()
    return value.detach() if isinstance(value, torch.Tensor) else value


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
    fqn = ".".join(map(str, path))
    if path not in held:
        raise KeyError(f"{fqn} is not in the checkpoint")
    is_tensor, was_tensor = isinstance(value, torch.Tensor), isinstance(held[path], torch.Tensor)
    if is_tensor != was_tensor:
        raise ValueError(f"{fqn} is {'a tensor' if was_tensor else 'no tensor'} in the checkpoint")
    if is_tensor and value.shape != held[path].shape:
        raise ValueError(f"{fqn} is {tuple(held[path].shape)} in the checkpoint, not {tuple(value.shape)}")


def _fill(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        if not isinstance(target, DTensor):
            target.detach().copy_(source)
        elif _is_here(target):
            own = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().detach().copy_(own.to_local())


BACKEND = EngineBackend("gathered", save, load)
