"""What keeps processes from outliving the run: parent-death signals, and the end of a whole session.

Used by the launcher, the fork server, the ranks and, if the launcher itself was killed, the controller. The launcher
leads a session of its own, and all that it starts stays in that session, subprocesses of a backend included.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Final

__all__ = ["LAUNCHER_VARIABLE", "adopt_orphans", "die_with_parent", "end_session", "process_state", "reap_children"]

LAUNCHER_VARIABLE: Final = "DCPBENCH_LAUNCHER"
"""Environment variable that tells the fork server the launcher's pid."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when the one with pid ``parent`` is gone, even if that is by SIGKILL."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the kernel knew
        os._exit(1)


def adopt_orphans() -> None:
    """Makes this process the parent of descendants that lose theirs, so that it can wait for each of them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def process_state(pid: int) -> str:
    """Returns the kernel's one-letter state of a process (``T`` is stopped, ``Z`` a zombie), or "" if it is gone."""
    return _stat(pid)[0]


def reap_children() -> None:
    """Waits for children that are gone already, adopted ones too. Only for a process all of whose children are ours."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def end_session(session: int, *, awaits_tracker: bool, deadline_s: float = 5.0) -> None:
    """Kills every process of ``session`` but the caller, and returns when they are gone or the deadline has passed.

    Args:
        session: the pid of its leader.
        awaits_tracker: wait for the resource tracker of multiprocessing, too. It is never killed before the deadline,
            for it unlinks the semaphores of the killed; that it does when the last process that holds its pipe is gone,
            so that a caller who holds it must not wait.
        deadline_s: after so many seconds the tracker is killed like the others.
    """
    deadline = time.monotonic() + deadline_s
    while members := _members(session):
        trackers = {pid for pid in members if _is_resource_tracker(pid)}
        is_late = time.monotonic() > deadline
        for pid in members if is_late else set(members) - trackers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if is_late or (trackers == set(members) and not awaits_tracker):
            return
        time.sleep(0.002)


def _members(session: int) -> list[int]:
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    states = ((pid, *_stat(pid)) for pid in pids if pid != os.getpid())
    return [pid for pid, state, of_session in states if of_session == session and state not in "ZX"]


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _stat(pid: int) -> tuple[str, int]:
    try:
        # The name of the program, in parentheses, may hold spaces and parentheses of its own.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[3])
    except (OSError, IndexError, ValueError):
        return "", -1
