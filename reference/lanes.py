"""Where background saves run: one after the other for each process group, on a communication group of their own.

Collectives match between ranks by the order in which they are called, so two threads must never share a group. Each
process group therefore gets a private gloo group for its saves, and a save waits for the one issued before it. Ranks
that issue their saves in the same order thus run them in the same order, whatever their speed.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch.distributed as dist

from .collectives import Abort, CheckpointException, Ok, attempt

__all__ = ["EXIT_GRACE_S", "Lane", "lane_for"]

EXIT_GRACE_S = 30.0
"""How long a process that ends waits for its saves under way before it abandons them, uncommitted."""

_under_way: set[threading.Thread] = set()
_under_way_lock = threading.Lock()


@dataclass(eq=False)
class Lane:
    """The saves of one process group on this rank, in order.

    Args:
        rank: this rank in the group.
        world_size: 1 for a process that saves alone.
        group: the private group; None if `world_size` is 1.
        helper: the process that saves, once there is one; ended with this process.
    """

    rank: int
    world_size: int
    group: dist.ProcessGroup | None
    helper: Any = None
    _last: threading.Event | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def submit(self, task: Callable[[], Any]) -> Future[Any]:
        """Run `task` in a thread once every task before it is over; the future fails with `CheckpointException` only.

        The future cannot be cancelled, since other ranks may have begun.
        """
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        done = threading.Event()
        with self._lock:
            before, self._last = self._last, done

        def run() -> None:
            try:
                if before is not None:
                    before.wait()
                outcome = attempt(self.rank, "save", task)
            finally:
                done.set()
            if isinstance(outcome, Ok):
                future.set_result(outcome.value)
            elif isinstance(outcome.error, CheckpointException):
                future.set_exception(outcome.error)
            else:
                future.set_exception(Abort("save", (outcome,)).exception())

        # A daemon, so that a save which waits for a rank that never comes cannot keep the process alive.
        thread = threading.Thread(target=run, name="dcp-save", daemon=True)
        with _under_way_lock:
            # Only threads that are over leave: one that still cleans up when the interpreter goes aborts the process.
            _under_way.difference_update([other for other in _under_way if not other.is_alive()])
            thread.start()
            _under_way.add(thread)
        return future


_alone = Lane(0, 1, None)
_lanes: weakref.WeakKeyDictionary[dist.ProcessGroup, Lane] = weakref.WeakKeyDictionary()


def lane_for(group: dist.ProcessGroup | None, rank: int, world_size: int) -> Lane:
    """Return the lane of `group`. The first time, all of its ranks must call this, and wait for each other.

    Args:
        group: None: the default group.
        rank: of this process in the group.
        world_size: of the group; 1 needs no group at all.
    """
    if world_size == 1:
        return _alone
    if group is None:
        group = dist.distributed_c10d._get_default_group()
    lane = _lanes.get(group)
    if lane is None:
        lane = _lanes[group] = Lane(rank, world_size, _private_group(group))
    return lane


def _private_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    members = dist.get_process_group_ranks(group)
    if len(members) == dist.get_world_size():
        return cast("dist.ProcessGroup", dist.new_group(members, backend="gloo"))
    # Ranks outside the group take no part in this. Torch then names the new group after how many groups this rank
    # knows, and members that know different numbers of them would wait for each other under different names.
    counts: list[int] = [0] * len(members)
    dist.all_gather_object(counts, len(dist.distributed_c10d._world.pg_names), group=group)
    own = dist.get_rank()
    missing = max(counts) - counts[members.index(own)]
    padding = [dist.new_group([own], backend="gloo", use_local_synchronization=True) for _ in range(missing)]
    private = cast("dist.ProcessGroup", dist.new_group(members, backend="gloo", use_local_synchronization=True))
    for unused in padding:
        dist.destroy_process_group(unused)
    return private


def _wait_at_exit() -> None:
    deadline = time.monotonic() + EXIT_GRACE_S
    for thread in list(_under_way):
        thread.join(max(0.0, deadline - time.monotonic()))
    is_stuck = any(thread.is_alive() for thread in _under_way)
    for lane in [_alone, *_lanes.values()]:
        if lane.helper is not None:
            (lane.helper.kill if is_stuck else lane.helper.close)()
    if is_stuck:
        sys.stderr.write(
            f"async_save: a save was still under way {EXIT_GRACE_S:g} s after the program's end and is abandoned, "
            "uncommitted. Wait for its future before the program ends.\n"
        )
        return
    # A gloo group that was busy a moment ago and is still there when the process goes may abort it.
    for lane in list(_lanes.values()):
        with suppress(Exception):
            dist.destroy_process_group(lane.group)
        lane.group = None


# Not `atexit`, which comes after thread pools have closed, and a save under way uses those.
threading._register_atexit(_wait_at_exit)  # type: ignore[attr-defined]
