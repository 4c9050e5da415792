"""The raw I/O limit of a benchmark row: the same bytes from the same memory by the fewest plain calls. Runs on ranks.

Each rank writes one file with what it holds, a tensor after the other; of what several ranks hold alike, each writes a
fair part. A load reads what the rank holds, from whichever rank's file has it. There is no format, no CRC, no plan.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dcpbench.bench.state import RankState

__all__ = ["RawFiles"]

_MAX_BUFFERS = 1024
"""Buffers that one call takes (``IOV_MAX``)."""


@dataclass(frozen=True)
class _Part:
    file: int
    offset: int
    memory: memoryview


class RawFiles:
    """The raw files of a state.

    Args:
        state: whose memory is written and read; it must be on the CPU.

    Attributes:
        state: the same.
    """

    def __init__(self, state: RankState) -> None:
        self.state = state
        world_size = state.layout.world_size
        ends = [0] * world_size
        self._rank = state.rank
        self._parts: list[_Part] = []
        for index, tensor in enumerate(state.workload.tensors):
            regions = [state.layout.region(index, tensor.shape, rank) for rank in range(world_size)]
            local = state.locals[index]
            for region in dict.fromkeys(regions):
                assert region is not None
                holders = [rank for rank in range(world_size) if regions[rank] == region]
                writer = holders[index % len(holders)]
                if state.rank in holders and local.numel():
                    self._parts.append(_Part(writer, ends[writer], _memory(local)))
                ends[writer] += region.numel * local.itemsize

    def write(self, folder: Path) -> None:
        """Writes this rank's file into ``folder`` and makes it durable."""
        handle = os.open(folder / f"{self._rank}.raw", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            memories = [part.memory for part in self._parts if part.file == self._rank]
            for start in range(0, len(memories), _MAX_BUFFERS):
                _write_all(handle, memories[start : start + _MAX_BUFFERS])
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self, folder: Path) -> None:
        """Fills the state from the files of all ranks.

        Raises:
            EOFError: a file is too short.
        """
        for file in sorted({part.file for part in self._parts}):
            handle = os.open(folder / f"{file}.raw", os.O_RDONLY)
            try:
                for run in _runs([part for part in self._parts if part.file == file]):
                    _read_all(handle, [part.memory for part in run], run[0].offset)
            finally:
                os.close(handle)


def _runs(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Returns the parts in runs that lie one behind the other, each short enough for one call."""
    runs: list[list[_Part]] = []
    for part in parts:
        last = runs[-1] if runs else None
        if last and len(last) < _MAX_BUFFERS and last[-1].offset + len(last[-1].memory) == part.offset:
            last.append(part)
        else:
            runs.append([part])
    return runs


def _write_all(handle: int, memories: Sequence[memoryview]) -> None:
    left = list(memories)
    while left:
        left = _without(left, os.writev(handle, left))  # Linux writes at most 2 GiB at a time


def _read_all(handle: int, memories: Sequence[memoryview], offset: int) -> None:
    left = list(memories)
    while left:
        count = os.preadv(handle, left, offset)
        if not count:
            raise EOFError("a raw file ends too early")
        offset += count
        left = _without(left, count)


def _without(memories: list[memoryview], count: int) -> list[memoryview]:
    while memories and count >= len(memories[0]):
        count -= len(memories.pop(0))
    return [memories[0][count:], *memories[1:]] if count else memories


def _memory(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
