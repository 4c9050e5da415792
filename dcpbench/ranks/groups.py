"""Runs on a rank: the default process group, anew for each command and its world size."""

from __future__ import annotations

import os
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import distributed_c10d

from dcpbench.ranks import meshes

__all__ = ["DefaultGroup"]

_COLLECTIVE_TIMEOUT = timedelta(hours=4)
"""Longer than any step may take: a hang shall be seen as a hang by the controller, not end in a timeout of its own."""

_SWEEP_EVERY = 64

_MAX_ENDING = 8
"""Groups that may be on their way out at a time, so that threads and sockets stay few."""


class DefaultGroup:
    """The default process group of this rank, through the life of the pool.

    Attributes:
        is_broken: a command has raised in it, and may have left something under way.
    """

    def __init__(self, rank: int, device: str, connect_timeout_s: float) -> None:
        self._rank = rank
        self._device = device
        self._connect_timeout = timedelta(seconds=connect_timeout_s)
        self._store: TCPStore | None = None
        self._next_sweep = _SWEEP_EVERY
        self._ending = threading.BoundedSemaphore(_MAX_ENDING)
        self.is_broken = False

    def connect(self, command: int, world_size: int, *, keeps_group: bool = False) -> None:
        """Initialises the group; all ranks of the command call it.

        Args:
            command: its number, unique.
            world_size: ranks 0 to ``world_size`` - 1 are in the group.
            keeps_group: the group of the command before will do, if it is still there.

        Raises:
            Exception: the ranks did not find each other in time.
        """
        if keeps_group and dist.is_initialized() and not self.is_broken and dist.get_world_size() == world_size:
            return
        self.disconnect()
        if self._store is None:
            self._store = self._connect_store()
        if self._rank == 0 and command >= self._next_sweep:
            _sweep(self._store, command)
            self._next_sweep = command + _SWEEP_EVERY
        try:
            store = PrefixStore(_prefix(command), self._store)
            dist.init_process_group(
                self._pg_backend(world_size),
                store=store,
                rank=self._rank,
                world_size=world_size,
                timeout=self._connect_timeout,
            )
            distributed_c10d._set_pg_timeout(_COLLECTIVE_TIMEOUT)
            # Gloo lets a rank go on while others still connect to each other. If it then died at once, they would
            # fail in their connecting, and the backend's failure would pass for the machine's.
            if store.add("arrived", 1) == world_size:
                store.set("all-arrived", "")
            store.wait(["all-arrived"], self._connect_timeout)
        except BaseException:
            self._abort()
            raise

    def disconnect(self) -> None:
        """Destroys the group and all others, if there are any.

        It is done only when the next command comes, since others may not be done with this one.
        """
        if self.is_broken:
            self._abort()
            self.is_broken = False
        if not dist.is_initialized():
            return
        held: list[object] = [*distributed_c10d._world.pg_map, *meshes.forget()]
        dist.destroy_process_group()
        while held:
            self._ending.acquire()
            threading.Thread(target=self._end, args=([held.pop()],), daemon=True).start()

    def _end(self, last: list[object]) -> None:
        """Lets go of a group. Gloo takes 10 to 20 ms to notice that its threads may end, without using the CPU."""
        last.clear()
        self._ending.release()

    def _abort(self) -> None:
        """Drops the group without waiting for what is still under way in it."""
        meshes.forget()
        if dist.is_initialized():
            distributed_c10d._abort_process_group()

    def _pg_backend(self, world_size: int) -> str:
        if self._device == "cpu":
            return "gloo"
        torch.cuda.set_device(self._rank % torch.cuda.device_count())
        # nccl refuses two ranks on one device.
        return "cpu:gloo,cuda:nccl" if world_size <= torch.cuda.device_count() else "gloo"

    def _connect_store(self) -> TCPStore:
        """Returns a client of the store that the launching agent already runs."""
        hosts_it = self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        return TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=hosts_it,
            timeout=self._connect_timeout,
            wait_for_workers=False,
        )


def _sweep(store: TCPStore, command: int) -> None:
    """Deletes what earlier commands have left in the store, some KiB each.

    Every rank had finished them before the controller sent this one. A faster rank may already have written for
    this one, so its own keys stay.
    """
    for key in store.list_keys():
        if key.startswith("command-") and not key.startswith(f"{_prefix(command)}/"):
            store.delete_key(key)


def _prefix(command: int) -> str:
    return f"command-{command}"
