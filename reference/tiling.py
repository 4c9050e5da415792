"""Whether boxes cover a tensor: each element once, at most once, or where not. Integers only, no tensors."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from .boxes import BoxIndex, BoxLike, Integers

__all__ = ["TilingFault", "find_tiling_fault", "tiles"]

_NUM_PLAIN_BOXES = 16


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
    if len(boxes) > _NUM_PLAIN_BOXES:
        index = BoxIndex(boxes)
        if tiles(index.lows, index.highs, size):
            return None
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
    place = [0] * len(size)
    for dim, position in zip(dims, wrong, strict=True):
        place[dim] = position
    return TilingFault(tuple(place), [i for i, box in enumerate(boxes) if _contains(box, place)])


def tiles(lows: Integers, highs: Integers, size: Sequence[int]) -> bool:
    """Whether boxes cover each element of `size` exactly once: `find_tiling_fault` without the evidence, and faster.

    False also where the numbers are too large to tell.

    Args:
        lows: where the boxes begin `[n, number of dims]`; each is in bounds.
        highs: where they end.
        size: shape of the tensor; `()` for a scalar.
    """
    is_cut = ((lows != 0) | (highs != np.array(size, np.int64))).any(axis=0)
    dims = [dim for dim in range(len(size)) if is_cut[dim]]
    if 0 in size or math.prod(size[dim] + 1 for dim in dims) >= 2**62:
        return False
    # Corners as numbers, with their signs: those of the boxes, and with the opposite sign those of the whole.
    corners = np.zeros((1, len(lows) + 1), np.int64)
    signs = np.array([[1] * len(lows) + [-1]])
    for dim in dims:
        edges = [np.append(lows[:, dim], 0), np.append(highs[:, dim], size[dim])]
        corners = np.concatenate([corners * (size[dim] + 1) + edge for edge in edges])
        signs = np.concatenate([signs, -signs])
    order = np.argsort(corners, axis=None, kind="stable")
    ordered = corners.ravel()[order]
    begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    return not np.add.reduceat(signs.ravel()[order], begins).any()


def _find_overlap(boxes: Sequence[BoxLike]) -> TilingFault | None:
    if len(boxes) < 2:
        return None
    index = BoxIndex(boxes)
    rows, positions, begins, _ = index.pairs(index.lows, index.highs)
    later = np.flatnonzero(positions > rows)
    if not len(later):
        return None
    first = later[0]
    return TilingFault(tuple(begins[first].tolist()), [int(rows[first]), int(positions[first])])


def _contains(box: BoxLike, index: Iterable[int]) -> bool:
    return all(offset <= i < offset + length for offset, length, i in zip(box.offsets, box.sizes, index, strict=True))
