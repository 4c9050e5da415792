"""Cutting a region of a row-major tensor into pieces that lie together in its bytes. Integers only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Runs", "runs_of", "slabs"]

Box = tuple[tuple[int, ...], tuple[int, ...]]


def slabs(size: Sequence[int], max_elements: int) -> Iterator[Box]:
    """Yield `(offsets, sizes)` of boxes that cover a tensor one after the other in row-major order.

    Args:
        size: of the tensor; `()` for a scalar, which is one box; nothing for one without elements.
        max_elements: that a box may have; at least 1.
    """
    if 0 in size:
        return
    dim = next((d for d in range(len(size)) if math.prod(size[d + 1 :]) <= max_elements), None)
    if dim is None:
        yield (), ()
        return
    inner = tuple(size[dim + 1 :])
    step = max_elements // math.prod(inner)
    for outer in itertools.product(*map(range, size[:dim])):
        for begin in range(0, size[dim], step):
            offsets = (*outer, begin, *(0 for _ in inner))
            yield offsets, (*(1 for _ in outer), min(step, size[dim] - begin), *inner)


@dataclass(frozen=True)
class Runs:
    """The stretches of bytes that a region has in its tensor, all of one length, in row-major order.

    Args:
        num_outer: how many dims, from the first, tell the runs apart; 0 means one run.
        run_bytes: length of each.
        gap_bytes: between two neighbours along the last of these dims.
        first: where the first one begins in the tensor's bytes.
        strides: of all dims, in bytes.
    """

    num_outer: int
    run_bytes: int
    gap_bytes: int
    first: int
    strides: tuple[int, ...]


def runs_of(size: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], element_bytes: int) -> Runs:
    """Return the runs of the region at `offsets` with extent `lengths`, which has elements, in a tensor of `size`."""
    strides = [element_bytes] * len(size)
    for dim in range(len(size) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * size[dim]
    # The last dims that the region spans join into one run, together with the dim before them.
    split = len(size)
    while split and lengths[split - 1] == size[split - 1]:
        split -= 1
    num_outer = max(split - 1, 0)
    # Dims of which there is one index only make no further runs.
    while num_outer and lengths[num_outer - 1] == 1:
        num_outer -= 1
    run_bytes = math.prod(lengths[num_outer:]) * element_bytes
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    gap_bytes = strides[num_outer - 1] - run_bytes if num_outer else 0
    return Runs(num_outer, run_bytes, gap_bytes, first, tuple(strides))
