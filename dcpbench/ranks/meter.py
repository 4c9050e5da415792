"""Measures one call on one rank: seconds, and how far memory rose above what was resident before. Runs on ranks."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import TracebackType

import torch

from dcpbench.messages import Usage

__all__ = ["Meter"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


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
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:  # no permission in some containers: the mark is then the process's own
            self._before = _status_bytes("VmHWM")
        else:
            self._before = _status_bytes("VmRSS")
        self._wall = time.time()
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._start
        peak = max(0, _status_bytes("VmHWM") - self._before)
        device_peak = torch.cuda.max_memory_allocated() - self._device_before if self._on_cuda else 0
        self.usage = Usage(seconds, self._wall, peak, device_peak)


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
