"""What ranks say to each other, and the drivers that carry it.

The engine's generators yield one of three requests and receive the answer. A driver fulfils them: `run_alone` for one
process, `run_on_group` on a process group; a simulator may drive many generators in one process in any order.

| request | every rank gives | answer |
| --- | --- | --- |
| `Gather(step, message)` | its message | coordinator: all messages, by rank; others: None |
| `Scatter(step, messages)` | coordinator: one message per rank; others: None | its own message |
| `Broadcast(step, message)` | coordinator: one message; others: None | that message |

Messages are values or failures, never exceptions in flight, so that a rank on which something went wrong still takes
part in the next collective and no other rank is left waiting. What cannot be pickled turns into a failure on the way.
Only an interrupt that strikes inside a collective itself cannot be told to the others: their timeout is what ends it.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from .gc_pause import gc_paused
from .wire import dumps

__all__ = [
    "Abort",
    "Broadcast",
    "CheckpointException",
    "FailedElsewhereError",
    "Failure",
    "Gather",
    "Message",
    "Ok",
    "Protocol",
    "Request",
    "Scatter",
    "attempt",
    "checked_coordinator",
    "membership",
    "pack",
    "run_alone",
    "run_on_group",
    "unpack",
]

COORDINATOR = 0
T = TypeVar("T")
_Frame = traceback.FrameSummary | tuple[str, int, str, str | None]


@dataclass(frozen=True)
class Ok:
    """A step that worked."""

    value: Any = None


@dataclass(frozen=True)
class Failure:
    """A step that failed on one rank."""

    rank: int
    step: str
    error: BaseException
    trace: traceback.StackSummary = field(default_factory=traceback.StackSummary)


@dataclass(frozen=True)
class Abort:
    """The coordinator's verdict that everybody stops; goes to all ranks alike."""

    step: str
    failures: tuple[Failure, ...]

    def exception(self) -> CheckpointException:
        """Return what every rank raises: torch's class, with the failing ranks, their errors and tracebacks."""
        ranks = ", ".join(str(failure.rank) for failure in self.failures)
        raised = CheckpointException(
            f"{self.step} failed on rank {ranks}",
            {failure.rank: (failure.error, failure.trace) for failure in self.failures},
        )
        raised.__cause__ = self.failures[0].error
        return raised


Message = Ok | Failure | Abort


@dataclass(frozen=True)
class Gather:
    step: str
    message: Message


@dataclass(frozen=True)
class Scatter:
    step: str
    messages: list[Message] | None


@dataclass(frozen=True)
class Broadcast:
    step: str
    message: Message | None


Request = Gather | Scatter | Broadcast
Protocol = Generator[Request, Any, T]


class FailedElsewhereError(BaseException):
    """Raised by an action whose work was done in another process and failed there; `attempt` returns that failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


def membership(group: dist.ProcessGroup | None, no_dist: bool = False) -> tuple[dist.ProcessGroup | None, int, int]:
    """Return the group, this rank in it, and how many ranks it has; `(None, 0, 1)` for a process that acts alone.

    Raises:
        ValueError: this rank is not in the group.
    """
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return None, 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            f"Expected a process_group that this rank belongs to but got {group!r} on rank {dist.get_rank()}. "
            "Only members of the group may call this."
        )
    return group, rank, dist.get_world_size(group)


def checked_coordinator(coordinator_rank: int, world_size: int) -> int:
    """Return the coordinator's rank: `coordinator_rank`, or 0 for a process that acts alone.

    Raises:
        ValueError: the group has no such rank.
    """
    if world_size == 1:
        return COORDINATOR
    if not 0 <= coordinator_rank < world_size:
        raise ValueError(f"Expected a rank of a group of {world_size} but got coordinator_rank={coordinator_rank!r}.")
    return coordinator_rank


def attempt(rank: int, step: str, action: Callable[[], Any]) -> Ok | Failure:
    """Return the outcome of `action`; an interrupt or `SystemExit` is one too, since others wait for this rank."""
    try:
        return Ok(action())
    except FailedElsewhereError as elsewhere:
        return elsewhere.failure
    except BaseException as error:
        _note(error, f"(step {step!r} on rank {rank})")
        return Failure(rank, step, error, _plain_trace(error))


@gc_paused()
def pack(message: Message, rank: int, step: str) -> tuple[bytes, Message]:
    """Return the bytes of `message`, and the message that these bytes stand for.

    They differ if `message` cannot be pickled: what is sent then is a failure of `rank`.
    """
    try:
        return dumps(_to_wire(message)), message
    except BaseException as error:
        refusal = TypeError(f"Expected a message that can be pickled but got {_text(error)}.")
        _note(refusal, f"(step {step!r} on rank {rank})")
        failed = Failure(rank, step, refusal, _plain_trace(error))
        return pickle.dumps(_to_wire(failed)), failed


@gc_paused()
def unpack(raw: bytes, rank: int, step: str) -> Message:
    """Return the message in `raw`; if it cannot be read here, a failure of `rank`."""
    try:
        message: Message = _from_wire(pickle.loads(raw))
    except BaseException as error:
        _note(error, f"(unpickling a message of step {step!r} from or for rank {rank})")
        return Failure(rank, step, error, _plain_trace(error))
    return message


def run_alone(protocol: Protocol[T]) -> T:
    """Drive one protocol without any process group; nothing is pickled."""
    answer: Any = None
    try:
        while True:
            request = protocol.send(answer)
            match request:
                case Gather():
                    answer = [request.message]
                case Scatter():
                    assert request.messages is not None
                    answer = request.messages[0]
                case Broadcast():
                    answer = request.message
    except StopIteration as stop:
        result: T = stop.value
        return result


def run_on_group(protocol: Protocol[T], group: dist.ProcessGroup | None, coordinator: int = COORDINATOR) -> T:
    """Drive one protocol on `group` (None: the default group); all of its ranks must call this.

    Works on any backend with object collectives; with NCCL each rank must have set its own current device.

    Args:
        protocol: this rank's part.
        group: whose ranks take part.
        coordinator: its rank in `group`.
    """
    wire = _Wire(group, coordinator)
    answer: Any = None
    try:
        while True:
            request = protocol.send(answer)
            match request:
                case Gather():
                    answer = wire.gather(request)
                case Scatter():
                    answer = wire.scatter(request)
                case Broadcast():
                    answer = wire.broadcast(request)
    except StopIteration as stop:
        result: T = stop.value
        return result


class _Wire:
    """Object collectives of one group, between any coordinator and the others."""

    def __init__(self, group: dist.ProcessGroup | None, coordinator: int) -> None:
        self._group, self._coordinator = group, coordinator
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._is_coordinator = self._rank == coordinator
        self._source = dist.get_global_rank(group, coordinator) if group is not None else coordinator

    def gather(self, request: Gather) -> list[Message] | None:
        raw, own = pack(request.message, self._rank, request.step)
        received: list[Any] | None = [None] * self._world_size if self._is_coordinator else None
        dist.gather_object(raw, received, dst=self._source, group=self._group)
        if received is None:
            return None
        return [own if i == self._rank else unpack(received[i], i, request.step) for i in range(self._world_size)]

    def scatter(self, request: Scatter) -> Message:
        packed = [pack(message, self._coordinator, request.step) for message in request.messages or ()]
        received: list[Any] = [None]
        to_send = [raw for raw, _ in packed] if self._is_coordinator else None
        dist.scatter_object_list(received, to_send, src=self._source, group=self._group)
        return packed[self._rank][1] if packed else unpack(received[0], self._rank, request.step)

    def broadcast(self, request: Broadcast) -> Message:
        if request.message is not None:
            raw, own = pack(request.message, self._coordinator, request.step)
            dist.broadcast_object_list([raw], src=self._source, group=self._group)
            return own
        received: list[Any] = [None]
        dist.broadcast_object_list(received, src=self._source, group=self._group)
        return unpack(received[0], self._rank, request.step)


@dataclass(frozen=True)
class _WireFailure:
    """A failure that any process can unpickle: the error travels as text too, in case its class does not."""

    rank: int
    step: str
    text: str
    frames: list[_Frame]
    error: bytes | None


@dataclass(frozen=True)
class _WireAbort:
    step: str
    failures: list[_WireFailure]


def _to_wire(message: Message) -> Any:
    if isinstance(message, Failure):
        frames = _frames(message.trace)
        return _WireFailure(message.rank, message.step, _text(message.error), frames, _error_bytes(message.error))
    if isinstance(message, Abort):
        return _WireAbort(message.step, [_to_wire(failure) for failure in message.failures])
    return message


def _from_wire(wire: Any) -> Any:
    if isinstance(wire, _WireAbort):
        return Abort(wire.step, tuple(_from_wire(failure) for failure in wire.failures))
    if not isinstance(wire, _WireFailure):
        return wire
    error: BaseException = RuntimeError(wire.text)
    if wire.error is not None:
        with suppress(BaseException):  # The text stands in for an error whose class this process lacks.
            error = pickle.loads(wire.error)
    return Failure(wire.rank, wire.step, error, traceback.StackSummary.from_list(wire.frames))


def _error_bytes(error: BaseException) -> bytes | None:
    """Return the pickled error, or None if it does not come back as itself."""
    try:
        raw = pickle.dumps(error)
        back = pickle.loads(raw)
        return raw if type(back) is type(error) and str(back) == str(error) else None
    except BaseException:
        return None


def _text(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception_only(type(error), error)).strip()
    except BaseException:
        return type(error).__qualname__


def _plain_trace(error: BaseException) -> traceback.StackSummary:
    # Only file, line and name: newer Pythons hang code objects on frames, which cannot be pickled.
    return traceback.StackSummary.from_list(_frames(traceback.extract_tb(error.__traceback__)))


def _frames(trace: traceback.StackSummary) -> list[_Frame]:
    return [(frame.filename, frame.lineno or 0, frame.name, frame.line) for frame in trace]


def _note(error: BaseException, text: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(text)
