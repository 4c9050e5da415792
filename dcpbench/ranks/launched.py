"""Runs in the controller: its handle of the launcher process.

The controller never imports torch; all that needs it happens behind this handle.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Final

from dcpbench.ranks.address import KEY_VARIABLE
from dcpbench.ranks.lifetime import end_session

__all__ = ["Launcher"]

_LOG_TAIL_BYTES: Final = 4096


class Launcher:
    """The launcher process, from its start to its end.

    Attributes:
        channel: readable when the launcher has reported something, or is gone.
        is_lost: it was found to be gone.
        has_worked: it has started ranks before.
    """

    def __init__(self, home: Path, address: str, key: bytes, num_ranks: int) -> None:
        self._log = home / "launcher.log"
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            KEY_VARIABLE: key.hex(),
            "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
            "TMPDIR": str(home),  # whatever multiprocessing or a backend puts there goes away with the pool
        }
        environment.setdefault("OMP_NUM_THREADS", "1")
        # Ranks of one host meet on loopback, whatever the host's name resolves to.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with theirs, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dcpbench.ranks.launcher", str(home), address, str(num_ranks), str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C on the terminal is for the controller alone
            )
        self._life = os.pidfd_open(self._process.pid)
        self.channel = Connection(ours.detach())
        self._exit_codes: dict[int, dict[int, int]] = {}
        self.is_lost = False
        self.has_worked = False

    def request(self, generation: int) -> None:
        """Asks for ranks; they knock at the door when they are ready."""
        self._exit_codes.clear()
        try:
            self.channel.send(generation)
        except OSError:
            self.is_lost = True

    def read(self) -> None:
        """Takes what the launcher has sent, if anything; finds out whether it is lost."""
        try:
            while not self.is_lost and self.channel.poll():
                generation, codes = self.channel.recv()
                self._exit_codes[generation] = codes
        except (EOFError, OSError):
            self.is_lost = True

    def has_ended(self, generation: int) -> bool:
        """Reads as: the launcher has reported that all ranks of the generation are gone."""
        self.read()
        return generation in self._exit_codes

    def exit_codes(self, generation: int, timeout_s: float) -> dict[int, int]:
        """Returns the exit codes of a killed generation by pid; empty where the launcher cannot tell in time."""
        deadline = time.monotonic() + timeout_s
        while not self.has_ended(generation) and not self.is_lost:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not wait([self.channel], remaining):
                break
        return self._exit_codes.get(generation, {})

    def log_tail(self) -> str:
        try:
            data = self._log.read_bytes()[-_LOG_TAIL_BYTES:]
        except OSError:
            return ""
        return data.decode("utf-8", "replace").strip()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the launcher and all that it has started, whatever state they are in."""
        self.channel.close()
        wait([self._life], timeout_s)
        # A launcher that was killed, or does not answer, has left its session behind. It is not yet waited for, so that
        # its pid, which is the session's, cannot have become another's.
        end_session(self._process.pid, awaits_tracker=True)
        self._process.kill()
        self._process.wait()
        os.close(self._life)
