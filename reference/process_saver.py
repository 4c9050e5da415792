"""A save in another process, on this rank's side: the protocol is the engine's, its actions are done over there."""

from __future__ import annotations

import os
import pickle
import socket
import uuid
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from .collectives import COORDINATOR, Ok, Protocol, Request, attempt
from .engine import conclude, saving
from .lanes import Lane
from .save_process import Meeting, SaveProcess
from .shared_arena import Arena
from .shared_pickle import share

__all__ = ["saving_in_process"]


def saving_in_process(
    lane: Lane, staged: Future[dict[str, Any]], arena: Arena | None, setting: bytes, *, use_collectives: bool
) -> Protocol[Metadata]:
    """One rank's part of a save in the lane's process, as a generator of collective requests.

    The first save starts the processes of all ranks; so does one after a process has died.

    Args:
        lane: whose process does it.
        staged: the state dict.
        arena: where its tensors are, if that is known.
        setting: pickled `(checkpoint_id, writer, planner, use_collectives)`.
        use_collectives: as in `save`.
    """
    yield from _start(lane)
    process: SaveProcess = lane.helper
    try:
        actions = _Elsewhere(process, staged, arena, setting)
        raw = yield from saving(actions, lane.rank, lane.world_size, use_collectives=use_collectives)
    finally:
        process.end()
    metadata: Metadata = pickle.loads(raw)
    return metadata


class _Elsewhere:
    """The engine's `SaveActions`, done by the process; plans and results are bytes here."""

    def __init__(
        self, process: SaveProcess, staged: Future[dict[str, Any]], arena: Arena | None, setting: bytes
    ) -> None:
        self._process, self._staged, self._arena, self._setting = process, staged, arena, setting

    def plan(self) -> Any:
        shared = share(self._staged.result(), self._arena)
        self._process.begin(shared, self._setting)
        return self._process.do("plan", "plan")

    def plan_all(self, plans: list[Any]) -> Any:
        return self._process.do("plan", "plan_all", plans)

    def write(self, plan: Any) -> Any:
        return self._process.do("write", "write", plan)

    def finish(self, results: list[Any]) -> Any:
        return self._process.do("write", "finish", results)


def _start(lane: Lane) -> Generator[Request, Any, None]:
    """Make sure that every rank has a process, and that these are in one process group: all ranks, or none."""
    rank, is_coordinator = lane.rank, lane.rank == COORDINATOR
    held: SaveProcess | None = lane.helper
    meeting_id = held.meeting_id if held is not None and held.is_alive else None
    is_ready = yield from conclude(
        rank, "start", Ok(meeting_id), lambda ids: ids[0] is not None and len(set(ids)) == 1, is_coordinator
    )
    if is_ready:
        return
    started = attempt(rank, "start", lambda: _restart(lane))
    place, meeting_id = yield from conclude(rank, "start", started, lambda hosts: _meeting(lane, hosts), is_coordinator)
    connected = attempt(rank, "start", lambda: _connect(lane.helper, place))
    yield from conclude(rank, "start", connected, lambda _: None, is_coordinator)
    lane.helper.meeting_id = meeting_id


def _restart(lane: Lane) -> tuple[str, int]:
    """Start the process, and return this host and, on the coordinator, the port at which all meet."""
    if lane.helper is not None:
        lane.helper.kill()  # It has nothing to do, and may be waiting for others that are gone.
    lane.helper = SaveProcess(lane.rank, lane.world_size)
    if lane.rank == COORDINATOR and lane.world_size > 1:
        place: Meeting = lane.helper.host_meeting()
        return place
    return socket.gethostname(), 0


def _meeting(lane: Lane, hosts: list[tuple[str, int]]) -> tuple[Meeting | None, str]:
    """Return where the processes meet, as all ranks can reach it. Coordinator only."""
    name, port = hosts[COORDINATOR]
    if lane.world_size == 1:
        return None, uuid.uuid4().hex
    if all(host == name for host, _ in hosts):
        name = "localhost"
    elif dist.get_rank() == 0 and "MASTER_ADDR" in os.environ:
        name = os.environ["MASTER_ADDR"]
    else:
        name = socket.getfqdn()
    return (name, port), uuid.uuid4().hex


def _connect(process: SaveProcess, place: Meeting | None) -> None:
    # A process that saves without any process group has none over there either.
    if place is not None or (dist.is_available() and dist.is_initialized()):
        process.connect(place)
