"""Filling a destination from part of a saved tensor: by byte ranges of its payload, or from a block of elements."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.planner import ReadItem

from .data_file import DataFile
from .items import memory_of
from .slabs import Runs, runs_of, slabs

__all__ = ["SavedTensor", "copy", "fill_from_block", "is_addressable", "narrowed", "read_part"]

_MIN_GAP_BYTES = 8 << 10
"""Bytes that are quicker read and dropped than left out by one more system call."""

_STAGED_BYTES = 1 << 20


@dataclass(frozen=True)
class SavedTensor:
    """Where the elements of a saved tensor lie.

    Args:
        file: the data file.
        at: where the first one begins in it, in bytes.
        size: of the tensor.
        dtype: of the tensor.
    """

    file: DataFile
    at: int
    size: torch.Size
    dtype: torch.dtype


def read_part(saved: SavedTensor, read: ReadItem, target: torch.Tensor) -> None:
    """Read the bytes that `read` needs of a saved tensor and no more, but for short gaps between them.

    Args:
        saved: the tensor.
        read: what to read of it.
        target: where it goes: of shape `read.lengths`, and of any dtype, device and strides.
    """
    if 0 in read.lengths:
        return
    dtype = saved.dtype
    runs = runs_of(saved.size, read.storage_offsets, read.lengths, dtype.itemsize)
    if runs.num_outer and runs.gap_bytes < _MIN_GAP_BYTES:
        _read_with_gaps(saved, runs, target)
    elif is_addressable(target, dtype):
        _read_runs(saved, runs, read.lengths, memory_of(target))
    else:
        for offsets, sizes in slabs(read.lengths, max(1, _STAGED_BYTES // dtype.itemsize)):
            staged = torch.empty(sizes, dtype=dtype)
            begin = [a + b for a, b in zip(read.storage_offsets, offsets, strict=True)]
            piece = runs_of(saved.size, begin, sizes, dtype.itemsize)
            _read_runs(saved, piece, sizes, memory_of(staged))
            copy(narrowed(target, offsets, sizes), staged)


def _read_runs(saved: SavedTensor, runs: Runs, lengths: Sequence[int], memory: memoryview) -> None:
    begin = 0
    for at in _starts(runs, lengths):
        saved.file.read_into(saved.at + at, memory[begin : begin + runs.run_bytes])
        begin += runs.run_bytes


def _read_with_gaps(saved: SavedTensor, runs: Runs, target: torch.Tensor) -> None:
    """Read neighbouring runs together with what lies between them, a bounded number at a time."""
    dim = runs.num_outer - 1
    stride = runs.strides[dim]
    step = max(1, _STAGED_BYTES // stride)
    for outer in itertools.product(*map(range, target.size()[:dim])):
        first = runs.first + sum(i * s for i, s in zip(outer, runs.strides, strict=False))
        for begin in range(0, target.size(dim), step):
            count = min(step, target.size(dim) - begin)
            span = torch.empty((count - 1) * stride + runs.run_bytes, dtype=torch.uint8)
            saved.file.read_into(saved.at + first + begin * stride, memory_of(span))
            rows = target[outer].narrow(0, begin, count)
            strides = [n // saved.dtype.itemsize for n in runs.strides[dim:]]
            copy(rows, span.view(saved.dtype).as_strided(rows.size(), strides))


def _starts(runs: Runs, lengths: Sequence[int]) -> list[int]:
    starts = [runs.first]
    for length, stride in zip(lengths[: runs.num_outer], runs.strides, strict=False):
        starts = [start + i * stride for start in starts for i in range(length)]
    return starts


def fill_from_block(block: torch.Tensor, offsets: Sequence[int], read: ReadItem, target: torch.Tensor) -> None:
    """Copy into `target` what `read` needs of a block of the saved tensor; maybe nothing.

    Args:
        block: some elements of the saved tensor.
        offsets: where the block begins in it.
        read: what `target` holds of the saved tensor.
        target: of shape `read.lengths`.
    """
    wanted = zip(read.storage_offsets, read.lengths, offsets, block.size(), strict=True)
    for dim, (begin, length, block_begin, block_length) in enumerate(wanted):
        low, high = max(begin, block_begin), min(begin + length, block_begin + block_length)
        if low >= high:
            return
        block = block.narrow(dim, low - block_begin, high - low)
        target = target.narrow(dim, low - begin, high - low)
    copy(target, block)


def narrowed(tensor: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """Return the view of `tensor` at `offsets` with extent `sizes`."""
    for dim, (offset, length) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


def is_addressable(target: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the bytes of a saved tensor of `dtype` may be put into the memory of `target` as they are."""
    return (
        type(target) in (torch.Tensor, torch.nn.Parameter)
        and target.dtype == dtype
        and target.is_cpu
        and target.is_contiguous()
        and not target.is_conj()
        and not target.is_neg()
    )


def copy(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy `value` into `target`, of the same shape, whatever the two are."""
    with torch.no_grad():
        if target.dtype == value.dtype and target.itemsize == 1 and not target.is_quantized:
            # the same bytes; torch cannot transpose every dtype of one byte
            target, value = target.view(torch.uint8), value.view(torch.uint8)
        target.copy_(value)
