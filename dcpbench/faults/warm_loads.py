"""Runs on a rank: many loads of small checkpoints, one after the other, each from a folder made for it alone.

What a load raises is its result here, ``BaseException`` included, since DCP's own ``CheckpointException`` is one and
thousands of loads share the process. A load that takes too long is interrupted by a timer; one that cannot be
interrupted, or ends the process, is left to the pool.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from dcpbench.case import Case
from dcpbench.faults.law import LoadSeen
from dcpbench.faults.trees import put_tree
from dcpbench.messages import RunStep
from dcpbench.ranks.execute import run_step

__all__ = ["bounded_load", "identity", "load_trees"]


class _TookTooLongError(BaseException):
    """The time of one load is up."""


def identity(_rank: int, _world_size: int) -> tuple[int, list[int]]:
    """Returns the process id of this rank, and its threads'."""
    return os.getpid(), [int(entry.name) for entry in Path("/proc/self/task").iterdir()]


def load_trees(
    _rank: int,
    _world_size: int,
    *,
    case: Case,
    steps: Mapping[str, int],
    backend: str,
    root: str,
    trees: Sequence[Mapping[str, bytes | None]],
    timeout_s: float,
    max_bytes: int,
) -> list[dict[str, LoadSeen]]:
    """Returns what loads of each tree saw, by name.

    Args:
        case: whose checkpoints the trees hold.
        steps: numbers of load steps, by the name under which they are reported.
        backend: what loads.
        root: folder in which each tree is laid out.
        trees: what the folder shall hold.
        timeout_s: for each load.
        max_bytes: of address space that a load may take beyond what there is.
    """
    seen = []
    with _memory_limit(max_bytes):
        for tree in trees:
            put_tree(Path(root), tree)
            seen.append(
                {
                    name: _load(RunStep(0, 1, case, step, backend, root, distributed=False), timeout_s)
                    for name, step in steps.items()
                }
            )
    return seen


def bounded_load(command: RunStep, timeout_s: float, max_bytes: int) -> LoadSeen:
    """Returns what one load did, within a time and an amount of address space."""
    with _memory_limit(max_bytes):
        return _load(command, timeout_s)


def _load(command: RunStep, timeout_s: float) -> LoadSeen:
    try:
        with _time_limit(timeout_s):
            found = run_step(command, 0, lambda _: None, "cpu")
    except _TookTooLongError:
        return LoadSeen("hung", error=f"not within {timeout_s:g} s")
    except (KeyboardInterrupt, SystemExit) as error:
        return LoadSeen("died", error=type(error).__name__)
    except BaseException as error:
        return LoadSeen("refused", error=f"{type(error).__name__}: {error}")
    return LoadSeen("loaded", (*(one.data for one in found.tensors), *(one.encoded for one in found.objects)))


@contextlib.contextmanager
def _time_limit(timeout_s: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _TookTooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory_limit(max_bytes: int) -> Iterator[None]:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
