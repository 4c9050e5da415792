"""The process that saves in the background: the program that it runs, and the handle by which it is told what to do.

    parent (a thread of training)                      child
    connect   the children of all ranks' processes     joins a process group of their own
    begin     a state dict, by its memory              puts it together
    plan, plan_all, write, finish                      does it, with planner and storage
    end                                                lets go of everything

The child never talks to other ranks by itself: what ranks exchange in a save goes through the parents, so a child that
dies is a failure like any other. Its process group is there for planners and storage that want one.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import torch.distributed as dist

from .collectives import COORDINATOR, FailedElsewhereError, Failure, Message, attempt, pack, unpack
from .engine import SaveActions, save_actions
from .open_storage import open_writer
from .shared_pickle import Memory, Shared, take_over

__all__ = ["Meeting", "SaveProcess"]

CONNECT_TIMEOUT = timedelta(seconds=300)
_END_GRACE_S = 5.0

Meeting = tuple[str, int]
"""Host and port of the store at which the children meet."""


class SaveProcess:
    """One child, from the side of its parent; used by one thread at a time.

    Args:
        rank: of this process in the group that saves.
        world_size: of that group.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, rank, world_size, os.getpid()), name="dcp-save", daemon=True
        )
        try:
            self._process.start()
        except BaseException:
            self._pipe.close()
            raise
        finally:
            theirs.close()  # So that the pipe breaks when the child dies.
        self.meeting_id: str | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it can be told something."""
        return not self._pipe.closed and self._process.is_alive()

    def host_meeting(self) -> Meeting:
        """Let the child open the store at which all children meet, and return where."""
        place: Meeting = self.do("start", "host")
        return place

    def connect(self, place: Meeting | None) -> None:
        """Let the child join the others at `place`; None: a group of its own."""
        self.do("start", "connect", place)

    def begin(self, shared: Shared, setting: bytes) -> None:
        """Hand over the state dict, and `setting`: pickled `(checkpoint_id, writer, planner, use_collectives)`."""
        self._tell("plan", "begin", (setting, [memory.num_bytes for memory in shared.memories]))
        try:
            self._pipe.send_bytes(shared.raw)
            for memory in shared.memories:
                send_handle(self._pipe, memory.fd, self._process.pid)
        except OSError as error:
            raise self._gone() from error
        self._answer("plan")

    def do(self, step: str, name: str, argument: Any = None) -> Any:
        """Let the child do `name`, and return what came of it.

        Raises:
            FailedElsewhereError: it failed there.
            RuntimeError: the child is gone.
        """
        self._tell(step, name, argument)
        return self._answer(step)

    def end(self) -> None:
        """Let the child forget the state dict; nothing happens if it is gone."""
        try:
            self.do("end", "end")
        except (FailedElsewhereError, RuntimeError):
            self.close()

    def close(self) -> None:
        """End the child: it goes when the pipe breaks; if it is stuck, it is killed."""
        self._pipe.close()
        self._process.join(_END_GRACE_S)
        self.kill()

    def kill(self) -> None:
        """End the child at once, whatever it does."""
        self._pipe.close()
        self._process.kill()
        self._process.join()

    def _tell(self, step: str, name: str, argument: Any) -> None:
        try:
            self._pipe.send((step, name, argument))
        except OSError as error:
            raise self._gone() from error

    def _answer(self, step: str) -> Any:
        try:
            raw = self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        message = unpack(raw, self._rank, step)
        if isinstance(message, Failure):
            raise FailedElsewhereError(message)
        return getattr(message, "value", None)

    def _gone(self) -> RuntimeError:
        self._process.join(_END_GRACE_S)
        return RuntimeError(
            f"Expected the process that saves for rank {self._rank} to answer but it ended with exit code "
            f"{self._process.exitcode}. A negative one is the signal that killed it."
        )


def _serve(pipe: Connection, rank: int, world_size: int, parent: int) -> None:
    """Run in the child until the parent closes the pipe, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # A terminal sends it to all; the parent decides what it means.
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    # State dicts hold meshes of groups that this process has not, and does not need.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    child = _Child(rank, world_size)
    try:
        while True:
            step, name, argument = pipe.recv()
            if name == "begin":
                setting, lengths = argument
                argument = (setting, pipe.recv_bytes(), [Memory(recv_handle(pipe), length) for length in lengths])
            message: Message = attempt(rank, step, _bound(child, name, argument))
            pipe.send_bytes(pack(message, rank, step)[0])
    except (EOFError, OSError):
        pass  # The parent has no more to say.
    finally:
        child.leave()


def _bound(child: _Child, name: str, argument: Any) -> Callable[[], Any]:
    method: Callable[[Any], Any] = getattr(child, name)
    return lambda: method(argument)


class _Child:
    """What the child does, one method per command."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._store: Any = None
        self._actions: Any = None

    def host(self, _: None) -> Meeting:
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            "localhost", 0, self._world_size, is_master=True, wait_for_workers=False, timeout=CONNECT_TIMEOUT
        )
        return socket.gethostname(), self._store.port

    def connect(self, place: Meeting | None) -> None:
        if self._store is None and place is None:
            self._store = dist.HashStore()  # type: ignore[attr-defined]
        elif self._store is None:
            assert place is not None
            host, port = place
            self._store = dist.TCPStore(host, port, is_master=False, timeout=CONNECT_TIMEOUT)  # type: ignore[attr-defined]
        dist.init_process_group(
            "gloo", store=self._store, rank=self._rank, world_size=self._world_size, timeout=CONNECT_TIMEOUT
        )

    def begin(self, argument: tuple[bytes, bytes, list[Memory]]) -> None:
        setting, raw, memories = argument
        try:
            state_dict = take_over(raw, memories)
        finally:
            for memory in memories:
                os.close(memory.fd)
        checkpoint_id, writer, planner, use_collectives = pickle.loads(setting)
        self._actions = save_actions(
            state_dict,
            rank=self._rank,
            open_storage=lambda: open_writer(writer, checkpoint_id),
            planner=planner,
            use_collectives=use_collectives,
            is_coordinator=self._rank == COORDINATOR,
            asks_stateful=False,
        )

    # Plans and results stay pickled where they only pass through: on the parents' side.

    def plan(self, _: None) -> bytes:
        return pickle.dumps(self._held().plan())

    def plan_all(self, plans: list[bytes]) -> list[bytes]:
        return [pickle.dumps(plan) for plan in self._held().plan_all([pickle.loads(plan) for plan in plans])]

    def write(self, plan: bytes) -> bytes:
        return pickle.dumps(self._held().write(pickle.loads(plan)))

    def finish(self, results: list[bytes]) -> bytes:
        return pickle.dumps(self._held().finish([pickle.loads(result) for result in results]))

    def end(self, _: None) -> None:
        self._actions = None

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _held(self) -> SaveActions:
        actions: SaveActions = self._actions
        return actions


def _end_with_parent(parent: int) -> None:
    # Whoever else has inherited the parent's end of the pipe keeps it open; but this process gets another parent.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
