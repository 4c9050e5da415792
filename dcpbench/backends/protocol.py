"""What a backend is: the plug-in contract, in three sizes.

A *storage backend* is a StorageWriter and a StorageReader; a *planner backend* is a SavePlanner and a LoadPlanner; an
*engine backend* brings its own ``save`` and ``load``. The parts that a backend does not bring are torch's. On each rank
a backend is opened once per case, as a :class:`Session`; only ranks open sessions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch.distributed.checkpoint.state_dict as torch_state_dict
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from dcpbench.backends import options

__all__ = [
    "Backend",
    "Engine",
    "EngineBackend",
    "Formats",
    "Location",
    "PlannerBackend",
    "Session",
    "StateDictFunctions",
    "StorageBackend",
    "state_dict_functions",
]

StateDict = dict[str, Any]

Location = Callable[[], AbstractContextManager[str]]
"""Gives a place for checkpoints, such as ``s3://bucket/prefix``, that is there until the context is left.

It is entered once in a run, in a process of its own, so it may start a server and stop it; what it puts into
``os.environ`` the ranks get as well. Without one, a checkpoint_id is a path in a fresh local folder.
"""


class Session(Protocol):
    """One rank's use of a backend, from the first step of a case to its last.

    A session may have more: ``takes``, names of keyword arguments and of features; ``async_save`` and ``convert``, if
    they are among those. Without, its backend is called with what stands here alone, and cases that need more are not
    judged.
    """

    def save(self, state_dict: StateDict, checkpoint_id: str | Path) -> None:
        """Saves ``state_dict``; all ranks of the step call it."""

    def load(self, state_dict: StateDict, checkpoint_id: str | Path) -> None:
        """Loads into ``state_dict``, in place; all ranks of the step call it."""

    def metadata(self, checkpoint_id: str) -> Metadata | None:
        """Returns what the storage holds as metadata, or None where the backend keeps that to itself."""


@runtime_checkable
class Backend(Protocol):
    """A checkpoint implementation under test.

    A backend may have more: ``absent``, names of the capabilities that it lacks (:mod:`dcpbench.capabilities`), and
    ``location``, a :data:`Location`.
    """

    @property
    def name(self) -> str:
        """How reports call it."""

    def open(self, *, reuse: bool) -> Session:
        """Returns a session; with ``reuse`` it keeps its writer and reader objects from one step to the next."""


class StateDictFunctions(Protocol):
    """A module or namespace with the functions that read and set the state of models and optimizers.

    Source: ``torch.distributed.checkpoint.state_dict``.
    """

    StateDictOptions: Callable[..., Any]
    get_model_state_dict: Callable[..., Any]
    get_optimizer_state_dict: Callable[..., Any]
    get_state_dict: Callable[..., Any]
    set_model_state_dict: Callable[..., Any]
    set_optimizer_state_dict: Callable[..., Any]
    set_state_dict: Callable[..., Any]


TORCH_STATE_DICT = cast("StateDictFunctions", torch_state_dict)


def state_dict_functions(backend: Backend) -> StateDictFunctions:
    """Returns the state-dict functions that ``backend`` brings, or torch's."""
    return cast("StateDictFunctions", getattr(backend, "state_dict", TORCH_STATE_DICT))


@dataclass(frozen=True)
class Engine:
    """The functions that carry a save or a load through, with the signatures of DCP's own.

    Attributes:
        async_save: returns a future, or a response whose ``upload_completion`` is one; None if there is no such thing.
        state_dict: the functions that read and set the state of models and optimizers.

    Source: ``torch.distributed.checkpoint.save``, ``.load`` and ``.async_save``.
    """

    save: Callable[..., Any]
    load: Callable[..., Any]
    async_save: Callable[..., Any] | None = None
    state_dict: StateDictFunctions = TORCH_STATE_DICT


TORCH_ENGINE = Engine(save, load, async_save)


@dataclass(frozen=True)
class Formats:
    """The functions that convert between a checkpoint's folder and a ``torch.save`` file, in one process.

    Source: ``torch.distributed.checkpoint.format_utils``.
    """

    dcp_to_torch_save: Callable[[str, str], Any]
    torch_save_to_dcp: Callable[[str, str], Any]


@dataclass(frozen=True)
class StorageBackend:
    """A backend that brings storage: ``writer(checkpoint_id)`` and ``reader(checkpoint_id)``.

    Args:
        name: how reports call it.
        writer: returns a StorageWriter for a checkpoint_id, which is a path in a fresh folder.
        reader: returns a StorageReader for it.
        engine: what drives them; DCP's own unless given.
        save_planner, load_planner: return planners; the engine's own unless given.
        formats: convert checkpoints of this storage; None if nothing does.
        absent: names of capabilities that the backend lacks; it then refuses on all ranks what needs them.
        location: a place for checkpoints other than local folders.

    Where ``writer`` or a planner names an option of DCP's in its own signature (``thread_count``,
    ``flatten_state_dict`` and the like), cases may use it; a constructor that a class only inherits does not count.
    """

    name: str
    writer: Callable[..., StorageWriter]
    reader: Callable[[str], StorageReader]
    engine: Engine = TORCH_ENGINE
    save_planner: Callable[..., SavePlanner] | None = None
    load_planner: Callable[..., LoadPlanner] | None = None
    formats: Formats | None = None
    absent: tuple[str, ...] = ()
    location: Location | None = None

    @property
    def state_dict(self) -> StateDictFunctions:
        """The engine's."""
        return self.engine.state_dict

    @functools.cached_property
    def takes(self) -> frozenset[str]:
        """Names of the options and features that cases may use."""
        found = options.taken_by(
            self.writer,
            self.save_planner,
            self.load_planner,
            has_async_save=self.engine.async_save is not None,
            has_formats=self.formats is not None,
        )
        return options.without(found, self.absent)

    def open(self, *, reuse: bool) -> Session:
        return _StorageSession(self, reuse)


def PlannerBackend(  # noqa: N802  a constructor in all but name: it reads as the kind of backend that it makes
    name: str,
    save_planner: Callable[[], SavePlanner],
    load_planner: Callable[[], LoadPlanner],
    absent: tuple[str, ...] = (),
) -> StorageBackend:
    """Returns a backend that brings planners and uses DCP's engine and filesystem storage."""
    return StorageBackend(
        name,
        writer=FileSystemWriter,
        reader=FileSystemReader,
        save_planner=save_planner,
        load_planner=load_planner,
        absent=absent,
    )


@dataclass(frozen=True)
class EngineBackend:
    """A backend that brings everything: ``save(state_dict, checkpoint_id)`` and ``load(state_dict, checkpoint_id)``.

    Args:
        name: how reports call it.
        save, load: called on all ranks, with a process group unless there is only one process. Where both name
            ``process_group``, or ``load`` names ``allow_partial_load``, cases may use it.
        async_save: as ``save``, and returns a future, or a response whose ``upload_completion`` is one.
        read_metadata: returns DCP metadata of a checkpoint; without it the tiling rules are not checked.
        state_dict: reads and sets the state of models and optimizers; torch's functions unless given.
        absent: names of capabilities that the backend lacks; it then refuses on all ranks what needs them.
        present: names of closed capabilities that it has and that its functions do not show, such as ``statefuls``.
        location: a place for checkpoints other than local folders.
    """

    name: str
    save: Callable[..., Any]
    load: Callable[..., Any]
    async_save: Callable[..., Any] | None = None
    read_metadata: Callable[[str], Metadata] | None = None
    state_dict: StateDictFunctions = TORCH_STATE_DICT
    absent: tuple[str, ...] = ()
    present: tuple[str, ...] = ()
    location: Location | None = None

    @functools.cached_property
    def takes(self) -> frozenset[str]:
        """Names of the options and features that cases may use."""
        found = options.taken_by_engine(self.save, self.load, self.async_save, self.present)
        return options.without(found, self.absent)

    def open(self, *, reuse: bool) -> Session:  # noqa: ARG002  there are no objects that could be kept
        return _EngineSession(self)


class _StorageSession:
    def __init__(self, backend: StorageBackend, reuse: bool) -> None:
        self._backend = backend
        self._reuse = reuse
        self._writer: StorageWriter | None = None
        self._reader: StorageReader | None = None
        self.takes = backend.takes
        options.forget_plans()

    def save(self, state_dict: StateDict, checkpoint_id: str | Path, **wanted: Any) -> None:
        self._backend.engine.save(state_dict, **self._saving(checkpoint_id, wanted))

    def async_save(self, state_dict: StateDict, checkpoint_id: str | Path, **wanted: Any) -> Any:
        """Starts a save in the background and returns what the engine returns for it."""
        assert self._backend.engine.async_save is not None
        return self._backend.engine.async_save(state_dict, **self._saving(checkpoint_id, wanted))

    def load(self, state_dict: StateDict, checkpoint_id: str | Path, **wanted: Any) -> None:
        if self._reader is None or not self._reuse:
            self._reader = self._backend.reader(str(checkpoint_id))
        planner = options.make(self._backend.load_planner, wanted, options.LOAD_PLANNER)
        self._backend.engine.load(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_reader=self._reader,
            planner=planner,
            **options.pick(wanted, options.CALL),
        )

    def metadata(self, checkpoint_id: str) -> Metadata | None:
        return self._backend.reader(checkpoint_id).read_metadata()

    def convert(self, checkpoint_id: str | Path, file: str, target: str) -> None:
        """Turns a checkpoint into a file, and the file into another checkpoint."""
        assert self._backend.formats is not None
        self._backend.formats.dcp_to_torch_save(str(checkpoint_id), file)
        self._backend.formats.torch_save_to_dcp(file, target)

    def import_file(self, file: str, checkpoint_id: str | Path) -> None:
        """Turns a file into a checkpoint."""
        assert self._backend.formats is not None
        self._backend.formats.torch_save_to_dcp(file, str(checkpoint_id))

    def _saving(self, checkpoint_id: str | Path, wanted: dict[str, Any]) -> dict[str, Any]:
        if self._writer is None or not self._reuse:
            self._writer = self._backend.writer(str(checkpoint_id), **options.pick(wanted, options.WRITER))
        planner = options.make(self._backend.save_planner, wanted, options.SAVE_PLANNER)
        given = {"checkpoint_id": checkpoint_id, "storage_writer": self._writer, "planner": planner}
        return {**given, **options.pick(wanted, options.CALL)}


class _EngineSession:
    def __init__(self, backend: EngineBackend) -> None:
        self._backend = backend
        self.takes = backend.takes

    def save(self, state_dict: StateDict, checkpoint_id: str | Path, **wanted: Any) -> None:
        self._backend.save(state_dict, str(checkpoint_id), **wanted)

    def async_save(self, state_dict: StateDict, checkpoint_id: str | Path, **wanted: Any) -> Any:
        """Starts a save in the background and returns what the engine returns for it."""
        assert self._backend.async_save is not None
        return self._backend.async_save(state_dict, str(checkpoint_id), **wanted)

    def load(self, state_dict: StateDict, checkpoint_id: str | Path, **wanted: Any) -> None:
        self._backend.load(state_dict, str(checkpoint_id), **wanted)

    def metadata(self, checkpoint_id: str) -> Metadata | None:
        return self._backend.read_metadata(checkpoint_id) if self._backend.read_metadata else None
