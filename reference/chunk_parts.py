"""Which parts of saved chunks fill a box: the arithmetic of planning a load.

In a model many tensors are cut in the same way, on saving and on loading. So what was found for one is remembered, and
serves all others whose chunks are the same objects, as `load_metadata` gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add, sub

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

from .boxes import BoxIndex, Integers, TilingFault, find_tiling_fault, tiles
from .layout import LocalBox
from .metadata import MetadataError

__all__ = ["ChunkPart", "PartFinder"]

_NUM_ONE_BY_ONE = 16


@dataclass(frozen=True, slots=True)
class ChunkPart:
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
    parts: list[ChunkPart]
    fault: TilingFault | None


class PartFinder:
    """Finds the parts of chunks that fill boxes, for one load."""

    def __init__(self) -> None:
        self._cuts: dict[tuple[int, int, int], _Cut] = {}

    def parts(self, fqn: str, entry: TensorStorageMetadata, box: LocalBox) -> list[ChunkPart]:
        """Return the parts that fill `box`, by position; none for an empty box.

        Raises:
            MetadataError: some element of the box is in no chunk, or in several: a checkpoint may be incomplete
                elsewhere, but not where it is needed.
        """
        found = self._cut(entry.chunks).found(box.offsets, box.sizes)
        if found.fault is not None:
            at = tuple(map(add, box.offsets, found.fault.index))
            holders = [tuple(found.parts[i].chunk_offsets) for i in found.fault.positions]
            raise MetadataError(
                f"Expected one chunk for each element of {fqn!r} but got {len(holders)} for the element at {at}"
                f"{f', at offsets {holders}' if holders else ''}. The checkpoint is incomplete or contradicts itself."
            )
        return found.parts

    def _cut(self, chunks: list[ChunkStorageMetadata]) -> _Cut:
        if not chunks:
            return _Cut(chunks)
        key = (len(chunks), id(chunks[0]), id(chunks[-1]))
        cut = self._cuts.get(key)
        # A comparison of lists is quick where the elements are the same objects, as the first and the last one are.
        if cut is None or cut.chunks != chunks:
            cut = self._cuts[key] = _Cut(chunks)
        return cut


class _Cut:
    """The chunks of a tensor, and what was found for boxes so far."""

    def __init__(self, chunks: list[ChunkStorageMetadata]) -> None:
        self.chunks = chunks
        self._index = BoxIndex(chunks)
        self._found: dict[tuple[torch.Size, torch.Size], _Found] = {}

    def found(self, offsets: torch.Size, sizes: torch.Size) -> _Found:
        found = self._found.get((offsets, sizes))
        if found is None:
            found = self._found[offsets, sizes] = self._find(offsets, sizes)
        return found

    def _find(self, offsets: torch.Size, sizes: torch.Size) -> _Found:
        if len(self.chunks) == 1 and self.chunks[0].sizes == sizes and self.chunks[0].offsets == offsets:
            zero = torch.Size([0] * len(sizes))
            return _Found([ChunkPart(0, offsets, zero, zero, sizes)] if 0 not in sizes else [], None)
        if len(self.chunks) > _NUM_ONE_BY_ONE:
            positions, begins, ends = self._index.overlaps(offsets, sizes)
            if len(positions) > _NUM_ONE_BY_ONE:
                return self._found_many(positions, begins, ends, offsets, sizes)
        parts = []
        for position, begin, extent in self._index.overlapping(offsets, sizes):
            chunk = self.chunks[position]
            in_box, in_chunk = _minus(begin, offsets), _minus(begin, chunk.offsets)
            parts.append(ChunkPart(position, chunk.offsets, in_box, in_chunk, torch.Size(extent)))
        if len(parts) == 1 and parts[0].sizes == sizes:
            return _Found(parts, None)
        return _Found(parts, _fault(parts, sizes))

    def _found_many(
        self, positions: Integers, begins: Integers, ends: Integers, offsets: torch.Size, sizes: torch.Size
    ) -> _Found:
        chunk_offsets = [self.chunks[position].offsets for position in positions.tolist()]
        in_box = begins - np.array(offsets, np.int64)
        in_chunk = begins - np.array(chunk_offsets, np.int64)
        parts = list(
            map(
                ChunkPart,
                positions.tolist(),
                chunk_offsets,
                map(torch.Size, in_box.tolist()),
                _shared_sizes(in_chunk),
                _shared_sizes(ends - begins),
            )
        )
        is_tiled = tiles(in_box, in_box + (ends - begins), sizes)
        return _Found(parts, None if is_tiled else _fault(parts, sizes))


def _fault(parts: list[ChunkPart], sizes: torch.Size) -> TilingFault | None:
    return find_tiling_fault([_Region(part.offsets, part.sizes) for part in parts], sizes)


def _shared_sizes(rows: Integers) -> list[torch.Size]:
    """Return a size for each row; equal ones are one object, since most are."""
    seen: dict[tuple[int, ...], torch.Size] = {}
    found = []
    for row in map(tuple, rows.tolist()):
        size = seen.get(row)
        if size is None:
            size = seen[row] = torch.Size(row)
        found.append(size)
    return found


@dataclass(frozen=True)
class _Region:
    offsets: torch.Size
    sizes: torch.Size


def _minus(a: Sequence[int], b: Sequence[int]) -> torch.Size:
    return torch.Size(map(sub, a, b))
