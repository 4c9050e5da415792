"""Handing a state dict to another process: small things pickled, tensors where they are.

`share` pickles; a tensor's memory is only named: which of a few files, and where in it. The other process gets these
files and `take_over` puts the state dict together on the same memory.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .shared_arena import Arena

__all__ = ["Memory", "Shared", "share", "take_over"]


@dataclass(frozen=True)
class Memory:
    """A file that holds tensors."""

    fd: int
    num_bytes: int


@dataclass(frozen=True)
class Shared:
    """A state dict ready to be handed over.

    Args:
        raw: pickled; names tensors' memory by position in `memories`.
        memories: their file descriptors are valid as long as `kept` is.
        kept: what the memory belongs to.
    """

    raw: bytes
    memories: tuple[Memory, ...]
    kept: tuple[Any, ...]


class _Place(NamedTuple):
    memory: int
    offset: int
    num_bytes: int
    dtype: torch.dtype | None


def share(value: Any, arena: Arena | None = None) -> Shared:
    """Return `value` ready to be handed over.

    Memory in `arena`, or that torch already shares between processes, is not copied; other memory is, once.

    Args:
        value: anything that can be pickled; tensors on other devices arrive on the CPU.
        arena: where most of its tensors are.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream, arena or Arena())
    pickler.dump(value)
    return Shared(stream.getvalue(), tuple(pickler.memories), (value, pickler.arena, *pickler.kept))


def take_over(raw: bytes, memories: Sequence[Memory]) -> Any:
    """Return the value that was shared, on the same memory; the file descriptors may be closed afterwards."""
    return _Unpickler(io.BytesIO(raw), [_map(memory) for memory in memories]).load()


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, arena: Arena) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.arena = arena
        self.kept: list[torch.UntypedStorage] = []  # A storage that went would free its address for another.
        self._others: list[Memory] = []
        self._places: dict[int, tuple[int, int]] = {}

    @property
    def memories(self) -> list[Memory]:
        return [Memory(self.arena.fd, self.arena.num_bytes), *self._others]

    def persistent_id(self, value: Any) -> _Place | None:
        if isinstance(value, torch.storage.TypedStorage):
            return self._place(value._untyped_storage, value.dtype)
        if isinstance(value, torch.UntypedStorage):
            return self._place(value, None)
        return None

    def _place(self, storage: torch.UntypedStorage, dtype: torch.dtype | None) -> _Place:
        num_bytes = storage.nbytes()
        if not num_bytes:
            return _Place(0, 0, 0, dtype)
        key = storage._cdata
        if key not in self._places:
            self._places[key] = self._found(storage, num_bytes)
            self.kept.append(storage)
        return _Place(*self._places[key], num_bytes, dtype)

    def _found(self, storage: torch.UntypedStorage, num_bytes: int) -> tuple[int, int]:
        """Return which memory `storage` is in, and where; puts it into the arena if need be."""
        is_cpu = storage.device.type == "cpu"
        offset = self.arena.find(storage) if is_cpu else None
        if offset is not None:
            return 0, offset
        if is_cpu and storage.is_shared():
            fd, _ = storage._share_fd_cpu_()
            self._others.append(Memory(fd, num_bytes))
            return len(self._others), 0
        copied = self.arena.reserve(num_bytes)
        copied.copy_(storage)
        self.kept.append(copied)
        offset = self.arena.find(copied)
        assert offset is not None
        return 0, offset


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, memories: list[torch.Tensor | None]) -> None:
        super().__init__(stream)
        self._memories = memories
        self._storages: dict[tuple[int, int], torch.UntypedStorage] = {}

    def persistent_load(self, pid: _Place) -> Any:
        storage = self._storage(pid)
        if pid.dtype is None:
            return storage
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=pid.dtype, _internal=True)  # type: ignore[no-untyped-call]

    def _storage(self, place: _Place) -> torch.UntypedStorage:
        if not place.num_bytes:
            return torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
        key = (place.memory, place.offset)
        if key not in self._storages:
            whole = self._memories[place.memory]
            assert whole is not None
            # Through numpy, so that each tensor has a storage that is no larger than its own.
            part = whole.numpy()[place.offset : place.offset + place.num_bytes]
            self._storages[key] = torch.from_numpy(part).untyped_storage()
        return self._storages[key]


def _map(memory: Memory) -> torch.Tensor | None:
    if not memory.num_bytes:
        return None
    return torch.from_file(f"/proc/self/fd/{memory.fd}", shared=True, size=memory.num_bytes, dtype=torch.uint8)
