"""Arithmetic on boxes `(offsets, sizes)`: intersect them, find those that overlap; see `tiling` for how they cover.

Used by planning (which chunks feed which shard) and by the metadata invariants. Integers only, no tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["BoxIndex", "BoxLike", "Integers", "intersect", "is_in_bounds"]

Integers = npt.NDArray[np.int64]

_NUM_PLAIN_BOXES = 16
_MAX_CANDIDATES = 1 << 16
"""Pairs that are compared at once: a few MiB."""


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
    """Answers "which of these boxes overlap that one?" without comparing all of them.

    Along each dim the boxes are kept in the order in which they begin, with how far any of them up to there reaches.
    Two searches then bound those that can overlap, along the dim that leaves the fewest, and these are compared. For
    boxes that lie side by side, as shards do, that is about log n plus the number of hits. Empty boxes overlap nothing.
    """

    def __init__(self, boxes: Sequence[BoxLike]) -> None:
        self._boxes = boxes
        self._table: _Table | None = None

    @property
    def lows(self) -> Integers:
        """Where each box begins: `[number of boxes, number of dims]`."""
        return self._numbers.lows

    @property
    def highs(self) -> Integers:
        """Where each box ends."""
        return self._numbers.highs

    def overlapping(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, list[int], list[int]]]:
        """Return `(position, offsets, sizes)` of each non-empty intersection, by position."""
        if len(self._boxes) > _NUM_PLAIN_BOXES:
            lows = np.array([offsets], np.int64)
            _, positions, begins, ends = self.pairs(lows, lows + np.array([sizes], np.int64))
            return list(zip(positions.tolist(), begins.tolist(), (ends - begins).tolist(), strict=True))
        hits: list[tuple[int, list[int], list[int]]] = []
        for i, box in enumerate(self._boxes):
            common = intersect(box.offsets, box.sizes, offsets, sizes)
            if common is not None:
                hits.append((i, *common))
        return hits

    def pairs(self, lows: Integers, highs: Integers) -> tuple[Integers, Integers, Integers, Integers]:
        """Return every overlap with any of several other boxes, by their rows and then by position.

        Args:
            lows: where these begin: `[m, number of dims]`.
            highs: where they end.

        Returns:
            Rows of `lows` `[k]`; positions `[k]`; where each intersection begins and ends `[k, number of dims]`.
        """
        table = self._numbers
        if table.lows.shape[1] != lows.shape[1]:
            raise ValueError(f"Expected boxes of {lows.shape[1]} dims but got some of {table.lows.shape[1]}.")
        order, firsts, counts = table.candidates(lows, highs)
        found = []
        row = 0
        totals = np.cumsum(counts)
        while row < len(lows):
            done = totals[row - 1] if row else 0
            end = max(row + 1, int(np.searchsorted(totals, done + _MAX_CANDIDATES, side="right")))
            found.append(table.compared(lows, highs, order, (row, firsts[row:end], counts[row:end])))
            row = end
        rows, positions, begins, ends = (np.concatenate(parts) for parts in zip(*found, strict=True))
        by_position = np.lexsort((positions, rows))
        return rows[by_position], positions[by_position], begins[by_position], ends[by_position]

    @property
    def _numbers(self) -> _Table:
        if self._table is None:
            self._table = _Table(self._boxes)
        return self._table


class _Table:
    def __init__(self, boxes: Sequence[BoxLike]) -> None:
        num_dims = len(boxes[0].offsets) if boxes else 0
        self.lows = _numbers([box.offsets for box in boxes], num_dims)
        sizes = _numbers([box.sizes for box in boxes], num_dims)
        self.highs = self.lows + sizes
        self._solid = np.flatnonzero(sizes.all(axis=1))
        self._sorted: list[tuple[Integers, Integers, Integers]] = []

    def candidates(self, lows: Integers, highs: Integers) -> tuple[Integers, Integers, Integers]:
        """Return boxes in some order, and for each row the first of those that can overlap it and how many they are."""
        if not self._sorted:
            for dim in range(self.lows.shape[1]):
                order = self._solid[np.argsort(self.lows[self._solid, dim], kind="stable")]
                reach = np.maximum.accumulate(self.highs[order, dim])
                self._sorted.append((order, self.lows[order, dim], reach))
        every = np.full(len(lows), len(self._solid))
        best = self._solid, np.zeros_like(every), every
        for dim, (order, begins, reach) in enumerate(self._sorted):
            firsts = np.searchsorted(reach, lows[:, dim], side="right")
            counts = np.maximum(np.searchsorted(begins, highs[:, dim], side="left") - firsts, 0)
            if counts.sum() < best[2].sum():
                best = order, firsts, counts
        return best

    def compared(
        self, lows: Integers, highs: Integers, order: Integers, candidates: tuple[int, Integers, Integers]
    ) -> tuple[Integers, Integers, Integers, Integers]:
        """Return what of the candidates of some rows does overlap; `candidates`: the first row, firsts and counts."""
        first_row, firsts, counts = candidates
        rows = np.repeat(np.arange(first_row, first_row + len(counts)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = order[np.repeat(firsts, counts) + within]
        begins = np.maximum(self.lows[positions], lows[rows])
        ends = np.minimum(self.highs[positions], highs[rows])
        hits = np.flatnonzero((begins < ends).all(axis=1))
        return rows[hits], positions[hits], begins[hits], ends[hits]


def _numbers(rows: list[Sequence[int]], num_dims: int) -> Integers:
    if rows and set(map(len, rows)) != {num_dims}:
        raise ValueError(f"Expected boxes of {num_dims} dims but got some of {sorted(set(map(len, rows)))}.")
    flat = np.fromiter(itertools.chain.from_iterable(rows), np.int64, len(rows) * num_dims)
    return flat.reshape(len(rows), num_dims)
