"""Reading the items of one data file into their destinations.

An item that is needed whole, or nearly so, is read from its first byte to its last and its CRC is checked on the way;
where it fits, its bytes go into the destination itself. Of any other only the bytes that are needed are read.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from .checksums import crc32
from .data_file import DataFile, ItemStream, StoredBytes, TransformedBytes
from .item_parts import SavedTensor, copy, fill_from_block, is_addressable, narrowed, read_part
from .items import CorruptItemError, Frame, frame_of, load_tensor, memory_of, verify_zip
from .slabs import slabs

__all__ = ["CheckCrc", "ItemReader", "Transform"]

CheckCrc = Literal["always", "whole", "never"]
Transform = Callable[[Sequence[str], IO[bytes]], IO[bytes]]
"""Given the names of the extensions that an item went through, and its stored bytes, gives what was written."""

_BLOCK_BYTES = 512 << 10
"""What is read, checked and written at once: it stays in a core's cache from one to the next."""

_STAGED_BYTES = 4 << 20
_NEARLY_WHOLE = 1.1
"""An item is read whole if that takes at most this many times the bytes that are needed of it."""


@dataclass(slots=True)
class _Item:
    """An item of the file, and what is wanted of it."""

    info: _StorageInfo
    size: torch.Size
    dtype: torch.dtype
    reads: Sequence[ReadItem]
    targets: list[torch.Tensor]

    @property
    def num_needed_bytes(self) -> int:
        return sum([math.prod(read.lengths) for read in self.reads]) * self.dtype.itemsize


class ItemReader:
    """Reads items from one open data file.

    Args:
        path: the data file.
        metadata: tells each item's dtype and shape, from which its frame follows.
        planner: gives destinations and takes objects.
        check_crc: as in `FileSystemReader`.
        transform: undoes stream extensions.
    """

    def __init__(
        self, path: Path, metadata: Metadata, planner: LoadPlanner, check_crc: CheckCrc, transform: Transform
    ) -> None:
        self._metadata = metadata
        self._planner = planner
        self._check_crc = check_crc
        self._transform = transform
        self._file = DataFile(path)

    def __enter__(self) -> ItemReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.__exit__()

    def read(self, info: _StorageInfo, reads: Sequence[ReadItem]) -> None:
        """Satisfy `reads`, which all come from the item at `info`.

        Raises:
            CorruptItemError: its bytes are not what was written.
            EOFError: the file ends within it.
        """
        tensors = [read for read in reads if read.type != LoadItemType.BYTE_IO]
        if len(tensors) < len(reads):
            for read in reads:
                if read.type == LoadItemType.BYTE_IO:
                    self._planner.load_bytes(read, io.BytesIO(self._whole(info, read)))
            if not tensors:
                return
        size, dtype = self._saved_as(tensors[0])
        item = _Item(info, size, dtype, tensors, [self._target(read) for read in tensors])
        frame = frame_of(dtype, size)
        if frame is None or not self._read_framed(item, frame):
            what = self._what(tensors[0], info)
            value = load_tensor(self._whole(info, tensors[0]), what)
            if value.size() != size:
                raise CorruptItemError(f"Expected shape {tuple(size)} but got {what} of shape {tuple(value.size())}.")
            for read, target in zip(tensors, item.targets, strict=True):
                copy(target, narrowed(value, read.storage_offsets, read.lengths))
        for read, target in zip(tensors, item.targets, strict=True):
            self._planner.commit_tensor(read, target)

    def _read_framed(self, item: _Item, frame: Frame) -> bool:
        """Read an item that lies between the head and tail of `frame`; False: it does not."""
        info = item.info
        if info.transform_descriptors:
            try:
                return self._read_whole(item, frame, self._transformed(info, item.reads[0]))
            except EOFError:
                return False
        if info.length != frame.length:
            return False
        if self._check_crc == "always" or item.num_needed_bytes * _NEARLY_WHOLE >= frame.num_bytes:
            return self._read_whole(item, frame, StoredBytes(self._file, info.offset))
        if self._file.read(info.offset, len(frame.head)) != frame.head:
            return False
        saved = SavedTensor(self._file, info.offset + len(frame.head), item.size, item.dtype)
        for read, target in zip(item.reads, item.targets, strict=True):
            read_part(saved, read, target)
        return True

    def _read_whole(self, item: _Item, frame: Frame, source: StoredBytes | TransformedBytes) -> bool:
        """Read an item from its first byte to the CRC of its payload; False: it does not begin as `frame` says.

        Targets may then hold something else already.
        """
        head, descriptor = bytearray(len(frame.head)), bytearray(frame.descriptor_bytes)
        target = item.targets[0]
        if len(item.targets) > 1 or target.size() != item.size or not is_addressable(target, item.dtype):
            source.take_into(head)
            crc = self._scatter(item, frame, source) if head == frame.head else None
        elif frame.num_bytes <= _BLOCK_BYTES:
            memory = memory_of(target)
            source.take_into(head, memory, descriptor)
            return head == frame.head and self._checked(item, frame, self._crc(memory), descriptor)
        else:
            source.take_into(head)
            crc = self._fill(memory_of(target), source) if head == frame.head else None
        if crc is None:
            return False
        source.take_into(descriptor)
        return self._checked(item, frame, crc, descriptor)

    def _fill(self, memory: memoryview, source: StoredBytes | TransformedBytes) -> int:
        """Read a payload into its destination, and return its CRC-32."""
        crc = 0
        for begin in range(0, len(memory), _BLOCK_BYTES):
            block = memory[begin : begin + _BLOCK_BYTES]
            source.take_into(block)
            crc = self._crc(block, crc)
        return crc

    def _scatter(self, item: _Item, frame: Frame, source: StoredBytes | TransformedBytes) -> int:
        """Read a payload block by block, copy from each what is wanted, and return the payload's CRC-32."""
        crc = 0
        staged = torch.empty(min(_STAGED_BYTES, frame.num_bytes), dtype=torch.uint8)
        for offsets, sizes in slabs(item.size, max(1, _STAGED_BYTES // item.dtype.itemsize)):
            block = staged[: math.prod(sizes) * item.dtype.itemsize]
            memory = memory_of(block)
            source.take_into(memory)
            crc = self._crc(memory, crc)
            for read, target in zip(item.reads, item.targets, strict=True):
                fill_from_block(block.view(item.dtype).reshape(sizes), offsets, read, target)
        return crc

    def _crc(self, memory: memoryview, crc: int = 0) -> int:
        return 0 if self._check_crc == "never" else crc32(memory, crc)

    def _checked(self, item: _Item, frame: Frame, crc: int, descriptor: bytearray) -> bool:
        if descriptor != frame.descriptor(crc) and self._check_crc != "never":
            raise CorruptItemError(
                f"Expected the CRC that was written but got other bytes for {self._what(item.reads[0], item.info)}. "
                "The file is damaged."
            )
        return True

    def _target(self, read: ReadItem) -> torch.Tensor:
        target = self._planner.resolve_tensor(read).detach()
        if target.size() != read.lengths:
            raise ValueError(
                f"Expected a destination of shape {tuple(read.lengths)} but got {read.dest_index.fqn!r} "
                f"shape={tuple(target.size())}. Check the planner's resolve_tensor."
            )
        return target

    def _saved_as(self, read: ReadItem) -> tuple[torch.Size, torch.dtype]:
        """Return the shape and dtype that the metadata gives for the item's chunk."""
        index = read.storage_index
        entry = self._metadata.state_dict_metadata.get(index.fqn)
        if not isinstance(entry, TensorStorageMetadata):
            raise CorruptItemError(f"Expected tensor metadata for {index.fqn!r} but got {entry!r}.")
        hint = index.index
        if hint is not None and hint < len(entry.chunks) and entry.chunks[hint].offsets == index.offset:
            return entry.chunks[hint].sizes, entry.properties.dtype
        for chunk in entry.chunks:
            if index.offset is None or chunk.offsets == index.offset:
                return chunk.sizes, entry.properties.dtype
        raise CorruptItemError(f"Expected a chunk of {index.fqn!r} at {index.offset!r} but the metadata has none.")

    def _what(self, read: ReadItem, info: _StorageInfo) -> str:
        index = read.storage_index
        where = "" if index.offset is None else f" chunk {tuple(index.offset)}"
        return f"{index.fqn!r}{where} in {self._file.name!r} at byte {info.offset}"

    def _whole(self, info: _StorageInfo, read: ReadItem) -> bytes | bytearray:
        if info.transform_descriptors:
            raw: bytes | bytearray = self._transformed(info, read).take()
        else:
            raw = self._file.read(info.offset, info.length)
        verify_zip(raw, self._what(read, info), check_crc=self._check_crc != "never")
        return raw

    def _transformed(self, info: _StorageInfo, read: ReadItem) -> TransformedBytes:
        descriptors = info.transform_descriptors or ()
        stored = io.BufferedReader(ItemStream(self._file, info.offset, info.length))
        what = f"{self._what(read, info)}, which went through {', '.join(descriptors)},"
        return TransformedBytes(self._transform(descriptors, stored), what)
