"""What controller and ranks say to each other: commands one way, observations the other.

All of it is plain frozen data, without slots, since pickle fills those from Python; an `Observation` also goes to JSON,
for the file that explains a failure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dcpbench.case import Case
from dcpbench.geometry import Box

__all__ = [
    "Call",
    "ChunkTable",
    "Done",
    "ErrorReport",
    "Hello",
    "ObjectObservation",
    "Observation",
    "Outcome",
    "Place",
    "RunStep",
    "Stop",
    "TensorObservation",
    "Usage",
    "Welcome",
]

Outcome = Literal["ok", "raised", "died", "hung", "unconnected", "unsupported"]
"""How a step ended on a rank: it returned; it raised; the process was lost; it did not return in time; the ranks could
not connect to each other, so that nothing can be said of the backend; the backend has no such feature."""


@dataclass(frozen=True)
class Hello:
    """A rank reports to the controller."""

    rank: int
    pid: int
    host: str
    generation: int


@dataclass(frozen=True)
class Welcome:
    """The controller's first answer: what a rank must know before any command.

    Attributes:
        sys_path: entries of the controller's import path, so that both import the same modules.
        device: ``cpu`` or ``cuda``.
        stacks_dir: folder for the files into which a rank dumps its Python stacks when asked by a signal.
        connect_timeout_s: how long the ranks may take to connect to each other.
    """

    sys_path: tuple[str, ...]
    device: str
    stacks_dir: str
    connect_timeout_s: float


@dataclass(frozen=True)
class Place:
    """Where checkpoints lie that are no local folders.

    Attributes:
        prefix: of the checkpoint_ids, such as a URL; without a slash behind.
        environ: environment variables by which the backend finds the place.
    """

    prefix: str
    environ: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RunStep:
    """Run one step of a case on this rank.

    Attributes:
        command: number of the command, unique within the pool's life.
        world_size: ranks that take part; this rank's number is below it.
        backend: specification of the backend, resolved on the rank.
        root: folder of the case's own, under which its checkpoints live unless the backend has another place for them.
        place: where the checkpoint_ids lead if not below ``root``; its own for each case.
        keeps_group: the command before it ran on the same ranks and ended well on all: they keep their process group.
    """

    command: int
    world_size: int
    case: Case
    step: int
    backend: str
    root: str
    distributed: bool = True
    keeps_group: bool = False
    place: Place | None = None


@dataclass(frozen=True)
class Call:
    """Run ``target`` (``package.module:function``) with ``arguments`` on each rank; what it returns is observed."""

    command: int
    world_size: int
    target: str
    arguments: dict[str, Any]
    distributed: bool = True


@dataclass(frozen=True)
class Stop:
    """The rank shall end."""


@dataclass(frozen=True)
class ErrorReport:
    """An exception on a rank: the qualified name of its type, its text, its traceback."""

    type: str
    text: str
    traceback: str


@dataclass(frozen=True)
class Usage:
    """What a step cost on one rank.

    Attributes:
        seconds: from the call into the backend to its return.
        start_s: wall-clock time of the call, in seconds since the epoch, on the rank's host.
        peak_bytes: high-water mark of resident host memory during the call, above what was resident before it.
        device_peak_bytes: the same from the device's allocator; 0 on CPU.
    """

    seconds: float
    start_s: float
    peak_bytes: int
    device_peak_bytes: int = 0


@dataclass(frozen=True)
class TensorObservation:
    """A tensor leaf after a step, as one rank found it.

    Attributes:
        fqn: the leaf.
        asked_for: the step's state dict held it; where not, the rest says nothing.
        dtype, shape: of the local tensor; ``shape`` is None where the leaf is gone or no longer a tensor.
        data: bytes of the local tensor, row-major.
        same_tensor: the state dict holds the very tensor object that was given.
        same_storage: that tensor still has the memory that it had.
        outside_intact: every byte of its storage outside the local tensor is unchanged.
    """

    fqn: str
    dtype: str = ""
    shape: tuple[int, ...] | None = None
    data: bytes = b""
    same_tensor: bool = True
    same_storage: bool = True
    outside_intact: bool = True
    asked_for: bool = True


@dataclass(frozen=True)
class ObjectObservation:
    """A value leaf after a step, encoded by :mod:`dcpbench.objects`.

    Attributes:
        present: its key is still there.
        asked_for: the step's state dict held it; where not, the rest says nothing.
    """

    fqn: str
    encoded: Any
    present: bool = True
    asked_for: bool = True


@dataclass(frozen=True)
class ChunkTable:
    """What the metadata of a checkpoint says of one tensor."""

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Box, ...]


@dataclass(frozen=True)
class Observation:
    """What one rank saw of one step.

    Attributes:
        phase: the last part of the step that the rank entered: connect, build, open, then the name of the action,
            disturb, metadata, arrange, observe. Connect, build, disturb, arrange and observe are ours.
        error: what it raised, or for a lost or hung rank what is known of the cause.
        stacks: Python stacks of all threads of the rank, where it was stopped or others were.
        tensors, objects: the state dict after the step: what was loaded, or what a save left of its source.
        keys: paths of all leaves of the state dict after the step, to see what was added.
        tables: the metadata of the checkpoint after a save, or a wait for one; None unless the rank was asked for it
            and could read it.
        bytes_on_storage: size of the checkpoint's files after a save; None where it is not a folder.
        value: what a called program returned.
        lacks: capabilities that the step needs and the backend declares absent (:mod:`dcpbench.capabilities`).
    """

    rank: int
    world_size: int
    step: int
    action: str
    outcome: Outcome
    phase: str = ""
    error: ErrorReport | None = None
    stacks: str = ""
    usage: Usage | None = None
    tensors: tuple[TensorObservation, ...] = ()
    objects: tuple[ObjectObservation, ...] = ()
    keys: tuple[str, ...] | None = None
    tables: tuple[ChunkTable, ...] | None = None
    bytes_on_storage: int | None = None
    value: Any = None
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """A rank has finished a command."""

    command: int
    observation: Observation
