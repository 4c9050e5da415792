"""Runs in the controller: starts the ranks, replaces them as a whole, ends them.

A generation is a full set of ranks that were started together. A rank that is lost takes its generation with it; the
next one is ready in a fraction of a second, since the fork server has imported torch already.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import time
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

from dcpbench.errors import RanksUnavailable
from dcpbench.messages import Hello, Welcome
from dcpbench.ranks.address import Door, OutputOf
from dcpbench.ranks.launched import Launcher
from dcpbench.ranks.link import RankLink

__all__ = ["Crew"]

_MIN_FREE_BYTES: Final = 1 << 30
_MAX_FOLDER_LENGTH: Final = 64
"""A Unix socket's path has room for 107 bytes; those of multiprocessing lie two folders deep in ours."""

_START_TIMEOUT_S: Final = 120.0
"""Longer than imports take on a busy machine: a failed start shows by processes that end, not by the clock."""

_MAX_FAILED_STARTS: Final = 3
_EXIT_CODES_TIMEOUT_S: Final = 5.0


class Crew:
    """The ranks of a pool with their launcher, their folder and the door at which they knock."""

    def __init__(self, size: int, device: str, connect_timeout_s: float) -> None:
        self._size = size
        self._device = device
        self._connect_timeout_s = connect_timeout_s
        self._generations = count(1)
        self._generation = 0
        self._links: dict[int, RankLink] = {}
        self._home: Path | None = None
        self._door: Door | None = None
        self._launcher: Launcher | None = None

    def start(self) -> Path:
        """Starts the launcher unless it runs, and returns the folder in which cases may have theirs, at once."""
        if self._home is None:
            key = secrets.token_bytes(32)
            self._home = _make_home()
            try:
                (self._home / "stacks").mkdir()
                self._door = Door(str(self._home / "door"), key, self._size)
                self._launcher = Launcher(self._home, self._door.address, key, self._size)
            except BaseException:
                self.close()
                raise
            self._request()
        return self._home

    def close(self) -> None:
        """Ends all processes, whatever they are doing, and removes the folder."""
        self._close_links()
        if self._door is not None:
            self._door.close()
            self._door = None
        if self._launcher is not None:
            self._launcher.stop()
            self._launcher = None
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None

    def muster(self, *, as_they_are: bool = False) -> list[RankLink]:
        """Returns the links of all ranks, in rank order, as soon as they are ready.

        Args:
            as_they_are: do not replace ranks that were lost since the last command; their loss belongs to what ran.

        Raises:
            RanksUnavailable: they could not be started; the text has the end of the launcher's log.
        """
        if self._is_complete() and not as_they_are and wait([link.life for link in self._links.values()], 0):
            self.renew()
        if not self._is_complete():
            self._await_ranks()
        return [self._links[rank] for rank in range(self._size)]

    def end_generation(self) -> dict[int, int] | None:
        """Kills all ranks and returns their exit codes by pid; None if the launcher is lost as well."""
        assert self._launcher is not None
        for link in self._links.values():
            link.kill()
        codes = self._launcher.exit_codes(self._generation, _EXIT_CODES_TIMEOUT_S)
        return None if self._launcher.is_lost else codes

    def renew(self) -> None:
        """Kills all ranks and asks for the next generation, without waiting for it."""
        for link in self._links.values():
            link.kill()
        self._close_links()
        if self._launcher is not None and self._launcher.is_lost:
            self.close()
        else:
            self._request()

    def _request(self) -> None:
        assert self._launcher is not None
        self._generation = next(self._generations)
        self._launcher.request(self._generation)

    def _is_complete(self) -> bool:
        return len(self._links) == self._size and all(link.output is not None for link in self._links.values())

    def _await_ranks(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        failed_starts = 0
        while not self._is_complete():
            self.start()
            assert self._launcher is not None
            assert self._door is not None
            if self._launcher.has_ended(self._generation):
                failed_starts += 1
                self._fail_if(failed_starts >= _MAX_FAILED_STARTS, "they ended before they could report")
                self._close_links()
                self._request()
            if self._launcher.is_lost:
                # One that has worked before was killed from outside; one that has not will not work the next time.
                self._fail_if(not self._launcher.has_worked, "their launcher ended")
                self.close()
                continue
            remaining = deadline - time.monotonic()
            self._fail_if(remaining <= 0, f"they did not report within {_START_TIMEOUT_S:g} s")
            if self._door.fileno() in wait([self._door.fileno(), self._launcher.channel], remaining):
                self._admit(self._door)
        assert self._launcher is not None
        self._launcher.has_worked = True

    def _admit(self, door: Door) -> None:
        accepted = door.accept()
        if accepted is None:
            return
        connection, first = accepted
        try:
            if not self._is_admitted(connection, first):
                connection.close()
        except OSError:  # the rank is gone again; the launcher will tell
            connection.close()

    def _is_admitted(self, connection: Connection, first: Any) -> bool:
        if isinstance(first, Hello) and first.generation == self._generation:
            stacks_dir = str(self.start() / "stacks")
            connection.send(Welcome(tuple(sys.path), self._device, stacks_dir, self._connect_timeout_s))
            self._links[first.rank] = RankLink(first, connection, stacks_dir)
            return True
        if isinstance(first, OutputOf) and first.generation == self._generation and first.rank in self._links:
            os.set_blocking(connection.fileno(), False)
            self._links[first.rank].output = connection
            return True
        return False

    def _fail_if(self, is_so: bool, reason: str) -> None:
        if is_so:
            log = self._launcher.log_tail() if self._launcher is not None else ""
            self.close()
            raise RanksUnavailable(
                f"The {self._size} ranks could not be started: {reason}. Last lines of their log:\n{log}"
            )

    def _close_links(self) -> None:
        for link in self._links.values():
            link.close()
        self._links = {}


def _make_home() -> Path:
    """Returns a new private folder, in memory where there is room, with a path short enough for sockets."""
    folder = tempfile.gettempdir()
    memory = "/dev/shm"  # noqa: S108  (mkdtemp makes a private folder of a random name in it)
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _MIN_FREE_BYTES:
        folder = memory
    elif len(folder) > _MAX_FOLDER_LENGTH:
        folder = "/tmp"  # noqa: S108
    return Path(tempfile.mkdtemp(prefix="dcpbench-", dir=folder))
