"""Runs in the controller: strace, attached to ranks that are already there.

One strace follows all ranks, so that its log has the calls of all in one order. Attaching needs the right to trace
other processes: root, CAP_SYS_PTRACE, or ``kernel.yama.ptrace_scope=0``.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from dcpbench.errors import DcpbenchError
from dcpbench.faults.strace_log import TRACED_CALLS

__all__ = ["Strace", "StraceMissing", "tracing_arguments"]

_ATTACH_TIMEOUT_S = 20.0
_DETACH_TIMEOUT_S = 10.0
_MAX_TEXT = 1 << 24


class StraceMissing(DcpbenchError):
    """System calls cannot be traced here: what needs it is skipped, with this reason."""


def tracing_arguments() -> list[str]:
    """Returns the options of strace with which a log can be read by :func:`dcpbench.faults.strace_log.parse`."""
    return ["-y", "-xx", "-v", "-s", str(_MAX_TEXT), "-e", f"trace={','.join(TRACED_CALLS)}", "-e", "signal=none"]


class Strace:
    """A running strace; a context manager that attaches on entry and lets go at the end.

    Args:
        pids: processes to follow, with all their threads and children.
        arguments: options of strace.
        log: file for what it prints.

    Raises:
        StraceMissing: there is no strace, or it may not attach.
    """

    def __init__(self, pids: Sequence[int], arguments: Sequence[str], log: Path) -> None:
        self._pids = pids
        self._arguments = arguments
        self._log = log
        self._messages = log.with_name(f"{log.name}.messages")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        program = shutil.which("strace")
        if program is None:
            raise StraceMissing("needs strace: apt-get install strace")
        attached = [word for pid in self._pids for word in ("-p", str(pid))]
        with self._messages.open("wb") as messages:
            self._process = subprocess.Popen(
                [program, "-f", *self._arguments, "-o", str(self._log), *attached],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=messages,
            )
        deadline = time.monotonic() + _ATTACH_TIMEOUT_S
        while not all(f"Process {pid} attached" in self.messages() for pid in self._pids):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._stop()
                raise StraceMissing(f"needs strace that may attach to ranks, but: {self.messages().strip()[:300]}")
            time.sleep(0.005)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    def messages(self) -> str:
        """Returns what strace has said so far."""
        return self._messages.read_text(encoding="utf-8", errors="replace")

    def text(self) -> str:
        """Returns the log; complete once strace has let go."""
        return self._log.read_text(encoding="ascii", errors="replace")

    def _stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(_DETACH_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
