"""Which parts of saved chunks fill a box: the arithmetic of planning a load.

In a model many tensors are cut in the same way, on saving and on loading. So what was found for one is remembered, and
serves all others whose chunks are the same objects, as `load_metadata` gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import add, sub
from typing import NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

from .boxes import BoxIndex, Integers
from .layout import LocalBox
from .metadata import MetadataError
from .tiling import TilingFault, find_tiling_fault, tiles

__all__ = ["ChunkPart", "PartFinder"]

_MAX_ONE_BY_ONE = 64


class ChunkPart(NamedTuple):
    """A region that a saved chunk and a box have in common.

    Args:
        position: of the chunk among those of its tensor.
        chunk_offsets: where the chunk begins in the tensor.
        offsets: where the region begins in the box.
        chunk_part_offsets: where it begins in the chunk.
        sizes: its extent.
    """

    position: int
    chunk_offsets: torch.Size
    offsets: torch.Size
    chunk_part_offsets: torch.Size
    sizes: torch.Size


@dataclass(frozen=True)
class _Found:
    """The parts for each box; or, in the first one that is not covered once, where and by which of its parts."""

    parts: list[list[ChunkPart]]
    fault: tuple[int, TilingFault] | None = None


class PartFinder:
    """Finds the parts of chunks that fill boxes, for one load."""

    def __init__(self) -> None:
        self._cuts: dict[tuple[int, int, int], _Cut] = {}

    def parts(self, fqn: str, entry: TensorStorageMetadata, boxes: Sequence[LocalBox]) -> list[list[ChunkPart]]:
        """Return, for each of `boxes`, the parts that fill it, by position; none for an empty box.

        Raises:
            MetadataError: some element of a box is in no chunk, or in several: a checkpoint may be incomplete
                elsewhere, but not where it is needed. Or a chunk has other dims than its tensor.
        """
        found = self._cut(fqn, entry).found(boxes)
        if found.fault is not None:
            number, fault = found.fault
            at = tuple(map(add, boxes[number].offsets, fault.index))
            holders = [tuple(found.parts[number][i].chunk_offsets) for i in fault.positions]
            raise MetadataError(
                f"Expected one chunk for each element of {fqn!r} but got {len(holders)} for the element at {at}"
                f"{f', at offsets {holders}' if holders else ''}. The checkpoint is incomplete or contradicts itself."
            )
        return found.parts

    def _cut(self, fqn: str, entry: TensorStorageMetadata) -> _Cut:
        chunks = entry.chunks
        if not chunks:
            return _Cut(entry)
        key = (len(chunks), id(chunks[0]), id(chunks[-1]))
        cut = self._cuts.get(key)
        # A comparison of lists is quick where the elements are the same objects, as the first and the last one are.
        if cut is None or (cut.chunks is not chunks and cut.chunks != chunks) or cut.size != entry.size:
            num_dims = len(entry.size)
            odd = next((c for c in chunks if not len(c.offsets) == len(c.sizes) == num_dims), None)
            if odd is not None:
                raise MetadataError(
                    f"Expected chunks of {num_dims} dims for {fqn!r} but got offsets={tuple(odd.offsets)} "
                    f"sizes={tuple(odd.sizes)}. The checkpoint contradicts itself."
                )
            cut = self._cuts[key] = _Cut(entry)
        return cut


class _Cut:
    """The chunks of a tensor, and what was found for boxes so far."""

    def __init__(self, entry: TensorStorageMetadata) -> None:
        self.chunks: list[ChunkStorageMetadata] = entry.chunks
        self.size = entry.size
        self._index = BoxIndex(self.chunks)
        self._is_tiling: bool | None = None
        self._found: dict[tuple[tuple[torch.Size, torch.Size], ...], _Found] = {}

    def found(self, boxes: Sequence[LocalBox]) -> _Found:
        key = tuple([(box.offsets, box.sizes) for box in boxes])
        found = self._found.get(key)
        if found is None:
            is_small = len(boxes) * len(self.chunks) <= _MAX_ONE_BY_ONE
            found = self._found[key] = self._find_one_by_one(boxes) if is_small else self._find_together(boxes)
        return found

    def _find_one_by_one(self, boxes: Sequence[LocalBox]) -> _Found:
        found: list[list[ChunkPart]] = []
        for box in boxes:
            found.append([])
            for position, begin, extent in self._index.overlapping(box.offsets, box.sizes):
                chunk = self.chunks[position].offsets
                in_box, in_chunk = _minus(begin, box.offsets), _minus(begin, chunk)
                found[-1].append(ChunkPart(position, chunk, in_box, in_chunk, torch.Size(extent)))
            fault = _fault(found[-1], box.sizes)
            if fault is not None:
                return _Found(found, (len(found) - 1, fault))
        return _Found(found)

    def _find_together(self, boxes: Sequence[LocalBox]) -> _Found:
        lows = np.array([box.offsets for box in boxes], np.int64).reshape(len(boxes), -1)
        highs = lows + np.array([box.sizes for box in boxes], np.int64).reshape(len(boxes), -1)
        rows, positions, begins, ends = self._index.pairs(lows, highs)
        parts = list(
            map(
                ChunkPart,
                positions.tolist(),
                [self.chunks[position].offsets for position in positions.tolist()],
                _sizes(begins - lows[rows]),
                _sizes(begins - self._index.lows[positions]),
                _sizes(ends - begins),
            )
        )
        edges = np.searchsorted(rows, np.arange(len(boxes) + 1)).tolist()
        found = [parts[begin:end] for begin, end in pairwise(edges)]
        if not self._is_covering(lows, highs):
            for number, (own, box) in enumerate(zip(found, boxes, strict=True)):
                fault = _fault(own, box.sizes)
                if fault is not None:
                    return _Found(found, (number, fault))
        return _Found(found)

    def _is_covering(self, lows: Integers, highs: Integers) -> bool:
        """Whether boxes need no look at each: they lie in the tensor, each element of which is in one chunk."""
        if self._is_tiling is None:
            chunks = self._index.lows, self._index.highs
            self._is_tiling = self._are_inside(*chunks) and tiles(*chunks, self.size)
        return self._is_tiling and self._are_inside(lows, highs)

    def _are_inside(self, lows: Integers, highs: Integers) -> bool:
        return bool((lows >= 0).all() and (highs <= np.array(self.size, np.int64)).all())


def _fault(parts: list[ChunkPart], sizes: torch.Size) -> TilingFault | None:
    if len(parts) == 1 and parts[0].sizes == sizes:
        return None
    return find_tiling_fault([_Region(part.offsets, part.sizes) for part in parts], sizes)


@dataclass(frozen=True)
class _Region:
    offsets: torch.Size
    sizes: torch.Size


def _minus(a: Sequence[int], b: Sequence[int]) -> torch.Size:
    return torch.Size(map(sub, a, b))


def _sizes(rows: Integers) -> list[torch.Size]:
    """Return a size for each row; equal ones are one object, since there are few different ones."""
    seen: dict[tuple[int, ...], torch.Size] = {}
    found = []
    for row in map(tuple, rows.tolist()):
        size = seen.get(row)
        if size is None:
            size = seen[row] = torch.Size(row)
        found.append(size)
    return found
