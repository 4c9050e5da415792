"""Arithmetic on boxes `(offsets, sizes)`: intersect, find overlapping ones, tell whether they tile a tensor.

Used by planning (which chunks feed which shard) and by the metadata invariants. Integers only, no tensors.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["BoxIndex", "BoxLike", "Integers", "TilingFault", "find_tiling_fault", "intersect", "is_in_bounds", "tiles"]

Integers = npt.NDArray[np.int64]

_NUM_PLAIN_BOXES = 16
_LEAF_SIZE = 128
_NUM_SCANS = 8


class BoxLike(Protocol):
    """Anything with `offsets` and `sizes` of equal length; both empty for a scalar, which has volume 1."""

    @property
    def offsets(self) -> Sequence[int]: ...

    @property
    def sizes(self) -> Sequence[int]: ...


def intersect(
    a_offsets: Sequence[int], a_sizes: Sequence[int], b_offsets: Sequence[int], b_sizes: Sequence[int]
) -> tuple[list[int], list[int]] | None:
    """Return `(offsets, sizes)` of the common box, or None if no element is common."""
    offsets, sizes = [], []
    for a, a_len, b, b_len in zip(a_offsets, a_sizes, b_offsets, b_sizes, strict=True):
        low = max(a, b)
        high = min(a + a_len, b + b_len)
        if high <= low:
            return None
        offsets.append(low)
        sizes.append(high - low)
    return offsets, sizes


def is_in_bounds(box: BoxLike, size: Sequence[int]) -> bool:
    """Whether `box` has the rank of `size` and lies inside it; an empty box may sit at the far edge."""
    return len(box.offsets) == len(box.sizes) == len(size) and all(
        offset >= 0 and length >= 0 and offset + length <= extent
        for offset, length, extent in zip(box.offsets, box.sizes, size, strict=True)
    )


class BoxIndex:
    """Answers "which of these boxes overlap that one?" in about log n plus the number of hits.

    Empty boxes overlap nothing. Few boxes are looked at one by one. Many are put into a table of numbers, which the
    first few questions scan as a whole; then a k-d tree is made over it, since one that serves a question or two only
    does not pay.
    """

    def __init__(self, boxes: Sequence[BoxLike]) -> None:
        self._boxes = boxes
        self._table: _Table | None = None
        self._root: _Node | None = None
        self._num_questions = 0

    def overlapping(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, list[int], list[int]]]:
        """Return `(position, offsets, sizes)` of each non-empty intersection, by position."""
        if len(self._boxes) > _NUM_PLAIN_BOXES:
            positions, lows, highs = self.overlaps(offsets, sizes)
            return list(zip(positions.tolist(), lows.tolist(), (highs - lows).tolist(), strict=True))
        hits: list[tuple[int, list[int], list[int]]] = []
        for i, box in enumerate(self._boxes):
            common = intersect(box.offsets, box.sizes, offsets, sizes)
            if common is not None:
                hits.append((i, *common))
        return hits

    def overlaps(self, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[Integers, Integers, Integers]:
        """Return the same as arrays: positions `[k]`; where each intersection begins and ends `[k, number of dims]`."""
        if self._table is None:
            self._table = _Table.of(self._boxes)
        lows, highs = np.array(offsets, np.int64), np.array(offsets, np.int64) + np.array(sizes, np.int64)
        if self._table.lows.shape[1] != len(lows):
            raise ValueError(f"Expected boxes of {len(lows)} dims but got some of {self._table.lows.shape[1]}.")
        self._num_questions += 1
        if self._root is None and self._num_questions > _NUM_SCANS and len(self._table.positions) > _LEAF_SIZE:
            self._root = _Node(self._table)
        tables = [self._table] if self._root is None else self._root.candidates(lows, highs)
        found = [table.overlapping(lows, highs) for table in tables]
        if len(found) == 1:
            return found[0]
        if not found:
            return self._table.overlapping(lows, lows)
        positions, begins, ends = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(positions)
        return positions[order], begins[order], ends[order]


@dataclass(frozen=True)
class _Table:
    """Boxes as arrays: positions `[n]`, where each begins and ends `[n, number of dims]`."""

    positions: Integers
    lows: Integers
    highs: Integers

    @staticmethod
    def of(boxes: Sequence[BoxLike]) -> _Table:
        num_dims = len(boxes[0].offsets)
        lows, sizes = (_numbers([getattr(box, name) for box in boxes], num_dims) for name in ("offsets", "sizes"))
        solid = np.flatnonzero(sizes.all(axis=1))
        return _Table(solid, lows[solid], lows[solid] + sizes[solid])

    def take(self, rows: Integers) -> _Table:
        return _Table(self.positions[rows], self.lows[rows], self.highs[rows])

    def overlapping(self, lows: Integers, highs: Integers) -> tuple[Integers, Integers, Integers]:
        begins, ends = np.maximum(self.lows, lows), np.minimum(self.highs, highs)
        rows = np.flatnonzero((begins < ends).all(axis=1))
        return self.positions[rows], begins[rows], ends[rows]


def _numbers(rows: list[Sequence[int]], num_dims: int) -> Integers:
    if set(map(len, rows)) != {num_dims}:
        raise ValueError(f"Expected boxes of {num_dims} dims but got some of {sorted(set(map(len, rows)))}.")
    flat = np.fromiter(itertools.chain.from_iterable(rows), np.int64, len(rows) * num_dims)
    return flat.reshape(len(rows), num_dims)


class _Node:
    """A part of a table, halved along the dim in which its boxes are most spread out, with a bounding box."""

    __slots__ = ("children", "highs", "lows", "table")

    def __init__(self, table: _Table) -> None:
        self.table = table
        self.lows, self.highs = table.lows.min(axis=0), table.highs.max(axis=0)
        self.children: list[_Node] = []
        if len(table.positions) > _LEAF_SIZE and table.lows.shape[1]:
            dim = int(np.ptp(table.lows, axis=0).argmax())
            order = np.argsort(table.lows[:, dim], kind="stable")
            middle = len(order) // 2
            self.children = [_Node(table.take(np.sort(rows))) for rows in (order[:middle], order[middle:])]

    def candidates(self, lows: Integers, highs: Integers) -> list[_Table]:
        """Return the leaves whose bounding boxes overlap the given box."""
        found: list[_Table] = []
        pending = [self]
        while pending:
            node = pending.pop()
            if (np.maximum(node.lows, lows) < np.minimum(node.highs, highs)).all():
                if node.children:
                    pending += node.children
                else:
                    found.append(node.table)
        return found


class TilingFault:
    """One element that is not covered exactly once.

    Args:
        index: the element's global index.
        positions: positions of the boxes that cover it; empty means a gap.
    """

    def __init__(self, index: tuple[int, ...], positions: list[int]) -> None:
        self.index = index
        self.positions = positions


def find_tiling_fault(boxes: Sequence[BoxLike], size: Sequence[int], *, must_cover: bool = True) -> TilingFault | None:
    """Return an element that `boxes` do not cover exactly once, or None if they tile `size`.

    The coverage count is a sum of box indicators, and each indicator is the running sum of +1 and -1 at the box's
    corners. So the boxes tile the tensor exactly if, and only if, their signed corners cancel to those of the whole:
    linear in the number of boxes, with no pair of boxes ever compared. Where they do not cancel, the first corner left
    over is itself an element with the wrong count.

    Args:
        boxes: all in bounds of `size`; empty ones are ignored.
        size: shape of the tensor; `()` for a scalar.
        must_cover: False accepts gaps and only looks for elements that are covered twice.
    """
    if len(boxes) == 1 and tuple(boxes[0].sizes) == tuple(size):
        return None
    if not must_cover:
        return _find_overlap(boxes)
    if len(boxes) > _NUM_PLAIN_BOXES:
        table = _Table.of(boxes)
        if tiles(table.lows, table.highs, size):
            return None
    solid = [box for box in boxes if 0 not in box.sizes]
    # Where every box spans the whole dim, that dim cannot be where things go wrong.
    dims = [dim for dim, extent in enumerate(size) if any(box.sizes[dim] != extent for box in solid)]
    signs = [-1 if sum(picks) % 2 else 1 for picks in itertools.product((0, 1), repeat=len(dims))]
    corners: dict[tuple[int, ...], int] = defaultdict(int)
    for box in solid:
        edges = [(box.offsets[dim], box.offsets[dim] + box.sizes[dim]) for dim in dims]
        for corner, sign in zip(itertools.product(*edges), signs, strict=True):
            corners[corner] += sign
    if 0 not in size:
        for corner, sign in zip(itertools.product(*((0, size[dim]) for dim in dims)), signs, strict=True):
            corners[corner] -= sign
    wrong = min((corner for corner, count in corners.items() if count), default=None)
    if wrong is None:
        return None
    index = [0] * len(size)
    for dim, position in zip(dims, wrong, strict=True):
        index[dim] = position
    return TilingFault(tuple(index), [i for i, box in enumerate(boxes) if _contains(box, index)])


def tiles(lows: Integers, highs: Integers, size: Sequence[int]) -> bool:
    """Whether boxes cover each element of `size` exactly once: `find_tiling_fault` without the evidence, and faster.

    False also where the numbers are too large to tell.

    Args:
        lows: where the boxes begin `[n, number of dims]`; each is in bounds.
        highs: where they end.
        size: shape of the tensor; `()` for a scalar.
    """
    extent = np.array(size, np.int64)
    is_cut = ((lows != 0) | (highs != extent)).any(axis=0)
    dims = [dim for dim in range(len(size)) if is_cut[dim]]
    strides = [math.prod(size[later] + 1 for later in dims[place + 1 :]) for place in range(len(dims))]
    if 0 in size or math.prod(size[dim] + 1 for dim in dims) >= 2**62:
        return False
    corners, signs = [], []
    for picks in itertools.product((0, 1), repeat=len(dims)):
        at = sum(
            (
                (highs if pick else lows)[:, dim] * stride
                for pick, dim, stride in zip(picks, dims, strides, strict=True)
            ),
            np.zeros(len(lows), np.int64),
        )
        whole = sum(size[dim] * stride for pick, dim, stride in zip(picks, dims, strides, strict=True) if pick)
        sign = -1 if sum(picks) % 2 else 1
        corners += [at, np.array([whole])]
        signs += [np.full(len(at), sign), np.array([-sign])]
    order = np.argsort(corners_ := np.concatenate(corners), kind="stable")
    ordered = corners_[order]
    begins = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    return not np.add.reduceat(np.concatenate(signs)[order], begins).any()


def _find_overlap(boxes: Sequence[BoxLike]) -> TilingFault | None:
    if len(boxes) < 2:
        return None
    index = BoxIndex(boxes)
    for i, box in enumerate(boxes):
        for other, offsets, _ in index.overlapping(box.offsets, box.sizes):
            if other > i:
                return TilingFault(tuple(offsets), [i, other])
    return None


def _contains(box: BoxLike, index: Iterable[int]) -> bool:
    return all(offset <= i < offset + length for offset, length, i in zip(box.offsets, box.sizes, index, strict=True))
