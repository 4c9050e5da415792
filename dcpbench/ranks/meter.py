"""Measures one call on one rank: seconds, and how far memory rose above what was resident before. Runs on ranks."""

from __future__ import annotations

import functools
import os
import re
import time
from types import TracebackType

import torch

from dcpbench.messages import Usage

__all__ = ["Meter"]


class Meter:
    """A context around one call; afterwards ``usage`` says what it cost.

    The high-water mark is the kernel's own (VmHWM), reset before the call, so that a peak within the call counts even
    if all of it is freed again. Where it cannot be reset, the peak is what the mark rose by.
    """

    usage: Usage

    def __init__(self, device: str) -> None:
        self._on_cuda = device != "cpu"

    def __enter__(self) -> Meter:
        if self._on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._device_before = torch.cuda.memory_allocated()
        self._before = _status_bytes(b"VmRSS" if _reset_mark() else b"VmHWM")
        self._wall = time.time()
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._start
        peak = max(0, _status_bytes(b"VmHWM") - self._before)
        device_peak = torch.cuda.max_memory_allocated() - self._device_before if self._on_cuda else 0
        self.usage = Usage(seconds, self._wall, peak, device_peak)


def _reset_mark() -> bool:
    """Sets the high-water mark to what is resident now; False where the kernel does not permit it to this process."""
    try:
        os.pwrite(_opened("/proc/self/clear_refs", os.O_WRONLY), b"5", 0)
    except OSError:  # in some containers
        return False
    return True


def _status_bytes(field: bytes) -> int:
    match = re.search(rb"(?m)^%b:\s+(\d+) kB" % field, os.pread(_opened("/proc/self/status", os.O_RDONLY), 8192, 0))
    return int(match[1]) * 1024 if match else 0


def _opened(path: str, mode: int) -> int:
    """Returns a descriptor that stays open, since opening such a file costs more than what is read from it."""
    return _opened_by(os.getpid(), path, mode)


@functools.lru_cache(maxsize=2)
def _opened_by(_pid: int, path: str, mode: int) -> int:
    return os.open(path, mode | os.O_CLOEXEC)
