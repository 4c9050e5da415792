"""Runs in the controller: one rank as the controller sees it.

A link joins what the rank says (messages), what it prints, whether it lives, and the file into which it dumps its
Python stacks when it crashes or is asked to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from dcpbench.messages import Hello
from dcpbench.ranks import frames
from dcpbench.ranks.lifetime import process_state

__all__ = ["PhaseFile", "RankLink", "stacks_path"]

_OUTPUT_TAIL_BYTES: Final = 4096
_MAX_STACKS_BYTES: Final = 64 * 1024
_READ_BYTES: Final = 1 << 16
_SETTLE_S: Final = 2.0


def stacks_path(stacks_dir: str, generation: int, rank: int) -> Path:
    """Returns the file into which a rank dumps its stacks; known to both sides."""
    return Path(stacks_dir) / f"{generation}-{rank}.txt"


class PhaseFile:
    """Where a rank writes which part of which command it is in.

    A file in memory, not a message: it outlives the rank, and the controller, which shares the cores with the ranks,
    looks at it only where a rank is lost or hangs.
    """

    def __init__(self, stacks: Path) -> None:
        self._path = stacks.with_suffix(".phase")
        self._descriptor = -1

    def write(self, command: int, phase: str) -> None:
        if self._descriptor < 0:
            self._descriptor = os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o600)
        os.pwrite(self._descriptor, f"{command} {phase:<40}".encode(), 0)

    def read(self, command: int) -> str:
        """Returns the last phase of ``command`` that the rank entered; "" if it entered none."""
        try:
            number, phase = self._path.read_text(encoding="ascii").split()
        except (OSError, ValueError):
            return ""
        return phase if int(number) == command else ""

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class RankLink:
    """The controller's end of one rank."""

    def __init__(self, hello: Hello, messages: Connection, stacks_dir: str) -> None:
        """Raises ProcessLookupError if the rank is already gone."""
        self.rank = hello.rank
        self.pid = hello.pid
        self.messages = messages
        self.output: Connection | None = None
        self.life = os.pidfd_open(hello.pid)
        self._printed = bytearray()
        self._stacks = stacks_path(stacks_dir, hello.generation, hello.rank)
        self.phase = PhaseFile(self._stacks)
        self._has_ended_talking = False

    @property
    def sources(self) -> list[Connection | int]:
        """What to wait on: any of them ready means that :meth:`read` has something to do."""
        sources: list[Connection | int] = [self.life]
        if not self._has_ended_talking:
            sources.append(self.messages)
        if self.output is not None:
            sources.append(self.output)
        return sources

    @property
    def is_alive(self) -> bool:
        return process_state(self.pid) not in ("", "Z", "X")

    @property
    def is_stopped(self) -> bool:
        return process_state(self.pid) in ("T", "t")

    def send(self, data: bytes) -> None:
        """Sends a framed command; a rank that is gone is found out by :attr:`life`."""
        with contextlib.suppress(OSError):
            self.messages.send_bytes(data)

    def read(self) -> Iterator[tuple[int, bytes]]:
        """Yields the messages that have come, with their commands' numbers, and takes in what was printed."""
        self.take_output()
        try:
            while not self._has_ended_talking and self.messages.poll():
                yield frames.receive(self.messages)
        except (EOFError, OSError):
            self._has_ended_talking = True

    def take_output(self) -> None:
        """Keeps the last few KiB of what the rank has printed; the rest is dropped, however much it is."""
        if self.output is None:
            return
        try:
            data = os.read(self.output.fileno(), _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._printed = (self._printed + data)[-_OUTPUT_TAIL_BYTES:]
        else:
            self.output.close()
            self.output = None

    def forget_output(self) -> None:
        """What was printed before a command says nothing of it."""
        self._printed.clear()

    def printed(self) -> str:
        """Returns the last few KiB that the rank has printed."""
        num_bytes = -1
        while self.output is not None and num_bytes != len(self._printed):
            num_bytes = len(self._printed)
            self.take_output()
        return self._printed.decode("utf-8", "replace").strip()

    def request_stacks(self) -> None:
        """Asks the rank for the stacks of all its threads; it answers also while it is blocked outside Python."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.life, signal.SIGUSR1)

    def stacks(self) -> str:
        """Returns what the rank has dumped so far, bounded."""
        try:
            data = self._stacks.read_bytes()[:_MAX_STACKS_BYTES]
        except OSError:
            return ""
        return data.decode("utf-8", "replace").strip()

    def settled_stacks(self) -> str:
        """Returns the stacks that :meth:`request_stacks` asked for, or why there are none."""
        deadline = time.monotonic() + _SETTLE_S
        before = ""
        while time.monotonic() < deadline:
            if self.is_stopped:
                return "no stacks: the process is stopped by a signal (SIGSTOP)"
            # A dump has no end mark: it is whole when it has not grown between two looks.
            text = self.stacks()
            if text and text == before:
                return text
            before = text
            time.sleep(0.02)
        return before or f"no stacks: the process did not answer within {_SETTLE_S:g} s"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.life, signal.SIGKILL)

    def close(self) -> None:
        self.messages.close()
        if self.output is not None:
            self.output.close()
            self.output = None
        os.close(self.life)
        with contextlib.suppress(FileNotFoundError):
            self._stacks.unlink()
        self.phase.remove()
