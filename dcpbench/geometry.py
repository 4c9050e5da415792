"""Integer geometry of shards: which global indices a rank holds, as boxes and as index lists.

This is the oracle's own arithmetic, written from the documentation of DTensor's placements. It shares no code with
any backend, `reference` included, so that an error here and an error there do not cancel out.

A *box* is an axis-parallel region of a tensor. A *region* is what one rank holds of one tensor: along every dim a
list of runs of indices. Most regions are one box; a strided shard may need several.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Box", "Region", "TilingFault", "full_region", "split", "split_strided", "tiling_fault"]

Run = tuple[int, int]


@dataclass(frozen=True, order=True)
class Box:
    """An axis-parallel region: ``offsets[d] <= index[d] < offsets[d] + sizes[d]``.

    The box of a 0-d tensor has no dims and one element.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def stops(self) -> tuple[int, ...]:
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    def contains(self, index: Sequence[int]) -> bool:
        return all(o <= i < o + s for i, o, s in zip(index, self.offsets, self.sizes, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """Returns the region that both cover, or None where they share no element."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        stops = tuple(map(min, self.stops, other.stops))
        if any(start >= stop for start, stop in zip(offsets, stops, strict=True)):
            return None
        return Box(offsets, tuple(stop - start for start, stop in zip(offsets, stops, strict=True)))

    def fits(self, shape: Sequence[int]) -> bool:
        """Reads as: this box lies within a tensor of ``shape``."""
        return len(self.offsets) == len(self.sizes) == len(shape) and all(
            offset >= 0 and size >= 0 and offset + size <= extent
            for offset, size, extent in zip(self.offsets, self.sizes, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"offsets={self.offsets} sizes={self.sizes}"


@dataclass(frozen=True)
class Region:
    """What one rank holds of one tensor: along each dim, the runs ``(start, length)`` of global indices, in order.

    The local tensor is the outer product of the dims, in the order of the runs. A run is never empty; a dim without
    runs makes the region empty.
    """

    runs: tuple[tuple[Run, ...], ...]

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the local tensor."""
        return tuple(sum(length for _, length in runs) for runs in self.runs)

    @functools.cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    def indices(self, dim: int) -> list[int]:
        """Returns the global index of every local index along ``dim``."""
        return [i for start, length in self.runs[dim] for i in range(start, start + length)]

    def global_index(self, local: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.indices(dim)[i] for dim, i in enumerate(local))

    def boxes(self) -> Iterator[Box]:
        """Yields the boxes of the global tensor that together are this region; none if it is empty."""
        for runs in itertools.product(*self.runs):
            yield Box(tuple(start for start, _ in runs), tuple(length for _, length in runs))

    def box_of(self, index: Sequence[int]) -> Box:
        """Returns the box that holds the global ``index``.

        Raises:
            ValueError: the region does not hold it.
        """
        for box in self.boxes():
            if box.contains(index):
                return box
        raise ValueError(f"Expected an index of the region but got index={tuple(index)!r}.")


def full_region(shape: Sequence[int]) -> Region:
    """Returns the region that holds a whole tensor of ``shape``."""
    return Region(tuple(((0, size),) if size else () for size in shape))


def split(indices: Sequence[int], num_parts: int, part: int) -> Sequence[int]:
    """Returns part ``part`` of ``indices`` cut into ``num_parts`` as ``Shard`` cuts a dim.

    Each part has ``ceil(n / num_parts)`` indices; the last ones may be shorter or empty.

    Source: ``torch.chunk`` semantics, as documented for ``torch.distributed.tensor.Shard``.
    """
    length = -(-len(indices) // num_parts)
    return indices[part * length : (part + 1) * length]


def split_strided(indices: Sequence[int], split_factor: int, num_parts: int, part: int) -> Sequence[int]:
    """Returns part ``part`` of ``indices`` cut as ``_StridedShard(dim, split_factor=…)`` cuts a dim.

    The dim is first cut into ``split_factor`` pieces, each piece into ``num_parts``; part k holds the k-th of each.

    Source: docstring of ``torch.distributed.tensor.placement_types._StridedShard``.
    """
    pieces = (split(indices, split_factor, piece) for piece in range(split_factor))
    return [i for piece in pieces for i in split(piece, num_parts, part)]


def runs_of(indices: Sequence[int]) -> tuple[Run, ...]:
    """Returns the maximal runs of consecutive indices, in the given order."""
    if isinstance(indices, range):
        return ((indices.start, len(indices)),) if indices else ()
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][0] + runs[-1][1] == index:
            runs[-1][1] += 1
        else:
            runs.append([index, 1])
    return tuple((start, length) for start, length in runs)


@dataclass(frozen=True)
class TilingFault:
    """The first reason why boxes do not tile a tensor.

    Attributes:
        kind: ``out-of-bounds``, ``overlap`` or ``gap``.
        boxes: the one box out of bounds, the two that overlap, or the first box that nobody covers.
    """

    kind: str
    boxes: tuple[Box, ...]


def tiling_fault(shape: Sequence[int], boxes: Sequence[Box]) -> TilingFault | None:
    """Returns why ``boxes`` do not cover each element of a tensor of ``shape`` exactly once, or None if they do.

    Empty boxes cover nothing and disturb nothing, but must lie within the tensor.
    """
    for box in boxes:
        if not box.fits(shape):
            return TilingFault("out-of-bounds", (box,))
    filled = sorted(box for box in boxes if box.numel)
    for i, one in enumerate(filled):
        for other in filled[i + 1 :]:
            if shape and other.offsets[0] >= one.offsets[0] + one.sizes[0]:  # and so are all behind it
                break
            if one.intersect(other) is not None:
                return TilingFault("overlap", (one, other))
    if sum(box.numel for box in filled) == math.prod(shape):
        return None
    cuts = [
        sorted({0, extent, *(b.offsets[d] for b in filled), *(b.stops[d] for b in filled)})
        for d, extent in enumerate(shape)
    ]
    for corner in itertools.product(*(itertools.pairwise(c) for c in cuts)):
        cell = Box(tuple(start for start, _ in corner), tuple(stop - start for start, stop in corner))
        if not any(cell.intersect(box) for box in filled):
            return TilingFault("gap", (cell,))
    raise AssertionError("boxes that do not overlap and leave no cell free have the volume of the tensor")
