"""An engine of its own: full tensors in one pickled file. It knows placements from their documentation only."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

__all__ = ["Broadcasting", "Dense", "fill", "local_of", "raw_of"]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Dense:
    """Gathers full tensors to rank 0, which pickles them into one file; on load each rank cuts out what it holds."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        held, problem = {}, None
        try:
            held = {self.key(path): self.pack(value) for path, value in self.leaves(state_dict)}
            pickle.dumps(held)  # what cannot be sent must not be noticed in the middle of a collective
        except Exception as error:  # every rank shall hear of it
            held, problem = {}, repr(error)
        gathered = _gather(held)
        if _rank() == 0 and problem is None:
            try:
                whole: dict[Any, Any] = {}
                for part in gathered:
                    for key, packed in part.items():
                        self.join(whole, key, packed)
                Path(checkpoint_id).mkdir(parents=True, exist_ok=True)
                (Path(checkpoint_id) / "dense.pkl").write_bytes(pickle.dumps(whole))
            except Exception as error:  # every rank shall hear of it
                problem = repr(error)
        _raise_any(_gather(problem))

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        wanted, problem, whole = list(self.leaves(state_dict)), None, {}
        try:
            whole = self.held_by(Path(checkpoint_id))
            for path, value in wanted:
                self.check(path, value, whole)
        except Exception as error:  # every rank shall hear of it
            problem = repr(error)
        _raise_any(_gather(problem))
        for path, value in wanted:
            self.put(state_dict, path, value, whole[self.key(path)])

    def held_by(self, checkpoint: Path) -> dict[Any, Any]:
        """Returns all that a checkpoint holds, by key."""
        return pickle.loads(self.read(checkpoint / "dense.pkl"))

    def read(self, file: Path) -> bytes:
        return file.read_bytes()

    def leaves(self, value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
        if isinstance(value, dict):
            for key, child in value.items():
                yield from self.leaves(child, (*path, key))
        elif isinstance(value, list) and _is_container(value):
            for index, child in enumerate(value):
                yield from self.leaves(child, (*path, index))
        else:
            yield path, value

    def key(self, path: tuple[Any, ...]) -> Any:
        return path

    def pack(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        places = self.places(value)
        return None if places is None else (value.dtype, tuple(value.shape), places, raw_of(local_of(value)))

    def places(self, tensor: torch.Tensor) -> list[Any] | None:
        """Returns the global indices that this rank holds, along each dim; None if it is no part of the mesh."""
        held = [np.arange(size) for size in tensor.shape]
        if isinstance(tensor, DTensor):
            coordinate = tensor.device_mesh.get_coordinate()
            if coordinate is None:
                return None
            for at, size, placement in zip(coordinate, tensor.device_mesh.shape, tensor.placements, strict=True):
                if not isinstance(placement, Replicate):
                    held[placement.dim] = self.cut(held[placement.dim], placement, size, at)
        return held

    def cut(self, indices: Any, placement: Any, num_parts: int, part: int) -> Any:
        pieces = [indices] if type(placement) is Shard else self.parts(indices, placement.split_factor)
        return np.concatenate([self.parts(piece, num_parts)[part] for piece in pieces])

    def parts(self, indices: Any, num_parts: int) -> list[Any]:
        length = max(1, -(-len(indices) // num_parts))
        return [indices[part * length : (part + 1) * length] for part in range(num_parts)]

    def join(self, whole: dict[Any, Any], key: Any, packed: Any) -> None:
        if not isinstance(packed, tuple) or len(packed) != 4 or not isinstance(packed[0], torch.dtype):
            if packed is not None or key not in whole:
                whole[key] = packed
            return
        dtype, shape, places, raw = packed
        if whole.get(key) is None:
            whole[key] = (dtype, np.zeros((*shape, dtype.itemsize), np.uint8))
        whole[key][1][np.ix_(*places)] = raw

    def check(self, path: tuple[Any, ...], value: Any, whole: dict[Any, Any]) -> None:
        fqn = ".".join(map(str, path))
        if self.key(path) not in whole:
            raise KeyError(f"{fqn} is not in the checkpoint")
        held = whole[self.key(path)]
        if isinstance(value, torch.Tensor) and not (isinstance(held, tuple) and isinstance(held[0], torch.dtype)):
            raise TypeError(f"{fqn} is no tensor in the checkpoint")
        if isinstance(value, torch.Tensor) and whole[self.key(path)][1].shape[:-1] != tuple(value.shape):
            raise ValueError(f"{fqn} has another shape in the checkpoint")

    def put(self, state_dict: Any, path: tuple[Any, ...], value: Any, held: Any) -> None:
        if isinstance(value, torch.Tensor):
            if (places := self.places(value)) is not None:
                fill(local_of(value), held[1][np.ix_(*places)])
            return
        for part in path[:-1]:
            state_dict = state_dict[part]
        state_dict[path[-1]] = held


def _is_container(value: list[Any]) -> bool:
    return any(isinstance(v, dict | torch.Tensor) or (isinstance(v, list) and _is_container(v)) for v in value)


class Broadcasting(Dense):
    """Has rank 0 read the file and send it to the others."""

    def read(self, file: Path) -> bytes:
        held, problem = b"", None
        if _rank() == 0:
            try:
                held = file.read_bytes()
            except OSError as error:  # every rank shall hear of it
                problem = error
        held, problem = _gather((held, problem))[0]
        if problem is not None:
            raise problem
        return held


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def raw_of(tensor: torch.Tensor) -> Bytes:
    """Returns the bytes of a tensor as an array ``[*shape, element size]``."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    plain = plain.view(torch.uint8) if plain.itemsize == 1 else plain
    flat = plain.clone(memory_format=torch.contiguous_format).reshape(-1)
    data = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    return data.reshape(*tensor.shape, tensor.itemsize).copy()


def fill(tensor: torch.Tensor, raw: Bytes) -> None:
    flat = torch.from_numpy(np.ascontiguousarray(raw).reshape(-1))
    if tensor.itemsize == 1:
        tensor.detach().view(torch.uint8).copy_(flat.reshape(tensor.shape))
    else:
        tensor.detach().copy_(flat.view(tensor.dtype).reshape(tensor.shape))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _raise_any(problems: list[str | None]) -> None:
    if found := [problem for problem in problems if problem is not None]:
        raise RuntimeError("; ".join(found))
