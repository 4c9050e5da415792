"""What a backend is: the plug-in contract, in three sizes.

A *storage backend* is a StorageWriter and a StorageReader; a *planner backend* is a SavePlanner and a LoadPlanner; an
*engine backend* brings its own ``save`` and ``load``. The parts that a backend does not bring are torch's. On each rank
a backend is opened once per case, as a :class:`Session`; only ranks open sessions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

__all__ = ["Backend", "Engine", "EngineBackend", "PlannerBackend", "Session", "StorageBackend"]

StateDict = dict[str, Any]


class Session(Protocol):
    """One rank's use of a backend, from the first step of a case to its last."""

    def save(self, state_dict: StateDict, checkpoint_id: str) -> None:
        """Saves ``state_dict``; all ranks of the step call it."""

    def load(self, state_dict: StateDict, checkpoint_id: str) -> None:
        """Loads into ``state_dict``, in place; all ranks of the step call it."""

    def metadata(self, checkpoint_id: str) -> Metadata | None:
        """Returns what the storage holds as metadata, or None where the backend keeps that to itself."""


@runtime_checkable
class Backend(Protocol):
    """A checkpoint implementation under test."""

    @property
    def name(self) -> str:
        """How reports call it."""

    def open(self, *, reuse: bool) -> Session:
        """Returns a session; with ``reuse`` it keeps its writer and reader objects from one step to the next."""


@dataclass(frozen=True)
class Engine:
    """The functions that carry a save or a load through, with the signatures of DCP's own.

    Source: ``torch.distributed.checkpoint.save`` and ``.load``.
    """

    save: Callable[..., Any]
    load: Callable[..., Any]


TORCH_ENGINE = Engine(save, load)


@dataclass(frozen=True)
class StorageBackend:
    """A backend that brings storage: ``writer(checkpoint_id)`` and ``reader(checkpoint_id)``.

    Args:
        name: how reports call it.
        writer: returns a StorageWriter for a checkpoint_id, which is a path in a fresh folder.
        reader: returns a StorageReader for it.
        engine: what drives them; DCP's own unless given.
        save_planner, load_planner: return planners; the engine's own unless given.
    """

    name: str
    writer: Callable[[str], StorageWriter]
    reader: Callable[[str], StorageReader]
    engine: Engine = TORCH_ENGINE
    save_planner: Callable[[], SavePlanner] | None = None
    load_planner: Callable[[], LoadPlanner] | None = None

    def open(self, *, reuse: bool) -> Session:
        return _StorageSession(self, reuse)


def PlannerBackend(  # noqa: N802  a constructor in all but name: it reads as the kind of backend that it makes
    name: str, save_planner: Callable[[], SavePlanner], load_planner: Callable[[], LoadPlanner]
) -> StorageBackend:
    """Returns a backend that brings planners and uses DCP's engine and filesystem storage."""
    return StorageBackend(
        name,
        writer=FileSystemWriter,
        reader=FileSystemReader,
        save_planner=save_planner,
        load_planner=load_planner,
    )


@dataclass(frozen=True)
class EngineBackend:
    """A backend that brings everything: ``save(state_dict, checkpoint_id)`` and ``load(state_dict, checkpoint_id)``.

    Args:
        name: how reports call it.
        save, load: called on all ranks, with a process group unless there is only one process.
        read_metadata: returns DCP metadata of a checkpoint; without it the tiling rules are not checked.
    """

    name: str
    save: Callable[[StateDict, str], Any]
    load: Callable[[StateDict, str], Any]
    read_metadata: Callable[[str], Metadata] | None = None

    def open(self, *, reuse: bool) -> Session:  # noqa: ARG002  there are no objects that could be kept
        return _EngineSession(self)


class _StorageSession:
    def __init__(self, backend: StorageBackend, reuse: bool) -> None:
        self._backend = backend
        self._reuse = reuse
        self._writer: StorageWriter | None = None
        self._reader: StorageReader | None = None

    def save(self, state_dict: StateDict, checkpoint_id: str) -> None:
        if self._writer is None or not self._reuse:
            self._writer = self._backend.writer(checkpoint_id)
        planner = self._backend.save_planner() if self._backend.save_planner else None
        self._backend.engine.save(state_dict, checkpoint_id=checkpoint_id, storage_writer=self._writer, planner=planner)

    def load(self, state_dict: StateDict, checkpoint_id: str) -> None:
        if self._reader is None or not self._reuse:
            self._reader = self._backend.reader(checkpoint_id)
        planner = self._backend.load_planner() if self._backend.load_planner else None
        self._backend.engine.load(state_dict, checkpoint_id=checkpoint_id, storage_reader=self._reader, planner=planner)

    def metadata(self, checkpoint_id: str) -> Metadata | None:
        return self._backend.reader(checkpoint_id).read_metadata()


class _EngineSession:
    def __init__(self, backend: EngineBackend) -> None:
        self._backend = backend

    def save(self, state_dict: StateDict, checkpoint_id: str) -> None:
        self._backend.save(state_dict, checkpoint_id)

    def load(self, state_dict: StateDict, checkpoint_id: str) -> None:
        self._backend.load(state_dict, checkpoint_id)

    def metadata(self, checkpoint_id: str) -> Metadata | None:
        return self._backend.read_metadata(checkpoint_id) if self._backend.read_metadata else None
