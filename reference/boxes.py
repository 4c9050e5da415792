"""Arithmetic on boxes `(offsets, sizes)`: intersect, find overlapping ones, tell whether they tile a tensor.

Used by planning (which chunks feed which shard) and by the metadata invariants. Integers only, no tensors.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

__all__ = ["BoxIndex", "BoxLike", "TilingFault", "find_tiling_fault", "intersect", "is_in_bounds"]

_LEAF_SIZE = 8
_NUM_PLAIN_QUESTIONS = 3


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

    A k-d tree with bounding boxes: nodes are halved along the dim in which they are most spread out. Empty boxes
    overlap nothing and are left out. The first few questions are answered by looking at every box, since a tree that
    serves one question only does not pay.
    """

    def __init__(self, boxes: Sequence[BoxLike]) -> None:
        self._boxes = boxes
        self._members = [i for i, box in enumerate(boxes) if 0 not in box.sizes]
        self._root: _Node | None = None
        self._num_questions = 0

    def overlapping(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, list[int], list[int]]]:
        """Return `(position, offsets, sizes)` of each non-empty intersection, by position."""
        self._num_questions += 1
        if self._num_questions > _NUM_PLAIN_QUESTIONS and self._root is None and self._members:
            self._root = _Node(self._boxes, self._members)
        hits: list[tuple[int, list[int], list[int]]] = []
        for i in self._members if self._root is None else self._root.candidates(offsets, sizes):
            common = intersect(self._boxes[i].offsets, self._boxes[i].sizes, offsets, sizes)
            if common is not None:
                hits.append((i, *common))
        return hits


class _Node:
    __slots__ = ("children", "members", "offsets", "sizes")

    def __init__(self, boxes: Sequence[BoxLike], members: list[int]) -> None:
        num_dims = len(boxes[members[0]].offsets)
        lows = [min(boxes[i].offsets[d] for i in members) for d in range(num_dims)]
        highs = [max(boxes[i].offsets[d] + boxes[i].sizes[d] for i in members) for d in range(num_dims)]
        self.offsets = lows
        self.sizes = [high - low for low, high in zip(lows, highs, strict=True)]
        self.members = members
        self.children: list[_Node] = []
        if len(members) > _LEAF_SIZE and num_dims:
            spread = [max(boxes[i].offsets[d] for i in members) - lows[d] for d in range(num_dims)]
            dim = spread.index(max(spread))
            ordered = sorted(members, key=lambda i: boxes[i].offsets[dim])
            middle = len(ordered) // 2
            self.members = []
            self.children = [_Node(boxes, ordered[:middle]), _Node(boxes, ordered[middle:])]

    def candidates(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Return, in order, the boxes below nodes that overlap the given box."""
        found: list[int] = []
        pending = [self]
        while pending:
            node = pending.pop()
            if intersect(node.offsets, node.sizes, offsets, sizes) is not None:
                found += node.members
                pending += node.children
        return sorted(found)


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
    if not must_cover:
        return _find_overlap(boxes)
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
