"""Reading the items of one data file into their destinations."""

from __future__ import annotations

import io
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from .items import DESCRIPTOR_BYTES, CorruptItemError, Frame, frame_of, load_tensor, memory_of, verify_zip

__all__ = ["CheckCrc", "ItemReader"]

CheckCrc = Literal["always", "whole", "never"]

_MIN_RUN_BYTES = 64 * 1024
"""Below this, one read of a span that contains many short runs is cheaper than a read for each."""


class ItemReader:
    """Reads items from one open data file.

    Args:
        path: the data file.
        metadata: tells each item's dtype and shape, from which its frame follows.
        planner: gives destinations and takes objects.
        check_crc: as in `FileSystemReader`.
    """

    def __init__(self, path: Path, metadata: Metadata, planner: LoadPlanner, check_crc: CheckCrc) -> None:
        self._path = path
        self._metadata = metadata
        self._planner = planner
        self._check_crc = check_crc
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __enter__(self) -> ItemReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._handle)

    def read(self, offset: int, length: int, reads: Sequence[ReadItem]) -> None:
        """Satisfy `reads`, which all come from the item at `offset`.

        Raises:
            CorruptItemError: its bytes are not what was written.
            EOFError: the file ends within it.
        """
        tensors = [read for read in reads if read.type != LoadItemType.BYTE_IO]
        for read in reads:
            if read.type == LoadItemType.BYTE_IO:
                self._planner.load_bytes(read, io.BytesIO(self._whole(offset, length, read)))
        if not tensors:
            return
        size, dtype = self._saved_as(tensors[0])
        frame = frame_of(dtype, size)
        if frame is None or frame.length != length or self._pread(offset, len(frame.head)) != frame.head:
            value = load_tensor(self._whole(offset, length, tensors[0]), self._what(tensors[0], offset))
            if tuple(value.size()) != tuple(size):
                raise CorruptItemError(
                    f"Expected shape {tuple(size)} but got {self._what(tensors[0], offset)} "
                    f"of shape {tuple(value.size())}."
                )
            for read in tensors:
                self._fill(read, value)
            return
        self._read_framed(offset, frame, size, dtype, tensors)

    def _read_framed(
        self, offset: int, frame: Frame, size: torch.Size, dtype: torch.dtype, reads: Sequence[ReadItem]
    ) -> None:
        payload_at = offset + len(frame.head)
        is_whole = [tuple(read.lengths) == tuple(size) for read in reads]
        if self._check_crc != "always" and not any(is_whole):
            for read in reads:
                self._read_part(payload_at, size, dtype, read)
            return
        payload: torch.Tensor | None = None
        if len(reads) == 1 and is_whole[0]:
            target = self._planner.resolve_tensor(reads[0]).detach()
            self._check_size(reads[0], target)
            if _is_addressable(target, dtype):
                self._read_payload(payload_at, frame, memory_of(target), reads[0])
                self._planner.commit_tensor(reads[0], target)
                return
        payload = torch.empty(frame.num_bytes, dtype=torch.uint8)
        self._read_payload(payload_at, frame, memory_of(payload), reads[0])
        value = payload.view(dtype).reshape(size)
        for read in reads:
            self._fill(read, value)

    def _read_payload(self, at: int, frame: Frame, memory: memoryview, read: ReadItem) -> None:
        self._pread_into(at, memory)
        if self._check_crc == "never":
            return
        stored = frame.stored_crc(self._pread(at + frame.num_bytes, DESCRIPTOR_BYTES))
        if stored != zlib.crc32(memory):
            raise CorruptItemError(
                f"Expected the CRC that was written but got other bytes for {self._what(read, at - len(frame.head))}. "
                "The file is damaged."
            )

    def _read_part(self, payload_at: int, size: torch.Size, dtype: torch.dtype, read: ReadItem) -> None:
        """Read only the bytes that `read` needs: its contiguous runs, or the span around them if they are short."""
        strides = [math.prod(size[dim + 1 :]) * dtype.itemsize for dim in range(len(size))]
        # The last dims that are read whole join into one run, together with the dim before them.
        split = len(size)
        while split and read.lengths[split - 1] == size[split - 1]:
            split -= 1
        split = max(split - 1, 0)
        run_bytes = math.prod(read.lengths[split:]) * dtype.itemsize
        starts = [0]
        for dim in range(len(size)):
            indices = range(
                read.storage_offsets[dim],
                read.storage_offsets[dim] + (read.lengths[dim] if dim < split else 1),
            )
            starts = [start + i * strides[dim] for start in starts for i in indices]
        target = self._planner.resolve_tensor(read).detach()
        self._check_size(read, target)
        if len(starts) > 1 and run_bytes < _MIN_RUN_BYTES:
            span = torch.empty(starts[-1] + run_bytes - starts[0], dtype=torch.uint8)
            self._pread_into(payload_at + starts[0], memory_of(span))
            elements = [stride // dtype.itemsize for stride in strides]
            _copy(target, _strided(span, dtype, read.lengths, elements))
        elif _is_addressable(target, dtype):
            self._read_runs(payload_at, starts, run_bytes, target)
        else:
            part = torch.empty(read.lengths, dtype=dtype)
            self._read_runs(payload_at, starts, run_bytes, part)
            _copy(target, part)
        self._planner.commit_tensor(read, target)

    def _read_runs(self, payload_at: int, starts: list[int], run_bytes: int, into: torch.Tensor) -> None:
        memory = memory_of(into)
        for position, start in enumerate(starts):
            self._pread_into(payload_at + start, memory[position * run_bytes : (position + 1) * run_bytes])

    def _fill(self, read: ReadItem, value: torch.Tensor) -> None:
        for dim, (offset, length) in enumerate(zip(read.storage_offsets, read.lengths, strict=True)):
            value = value.narrow(dim, offset, length)
        target = self._planner.resolve_tensor(read).detach()
        self._check_size(read, target)
        _copy(target, value)
        self._planner.commit_tensor(read, target)

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

    def _check_size(self, read: ReadItem, target: torch.Tensor) -> None:
        if tuple(target.size()) != tuple(read.lengths):
            raise ValueError(
                f"Expected a destination of shape {tuple(read.lengths)} but got {read.dest_index.fqn!r} "
                f"shape={tuple(target.size())}. Check the planner's resolve_tensor."
            )

    def _what(self, read: ReadItem, offset: int) -> str:
        index = read.storage_index
        where = "" if index.offset is None else f" chunk {tuple(index.offset)}"
        return f"{index.fqn!r}{where} in {self._path.name!r} at byte {offset}"

    def _whole(self, offset: int, length: int, read: ReadItem) -> bytes:
        raw = self._pread(offset, length)
        if self._check_crc != "never":
            verify_zip(raw, self._what(read, offset))
        return raw

    def _pread(self, offset: int, length: int) -> bytes:
        raw = bytearray(length)
        self._pread_into(offset, memoryview(raw))
        return bytes(raw)

    def _pread_into(self, offset: int, memory: memoryview) -> None:
        done = 0
        while done < len(memory):
            count = os.preadv(self._handle, [memory[done:]], offset + done)
            if not count:
                raise EOFError(
                    f"Expected {len(memory)} bytes at byte {offset} of {self._path.name!r} but got {done}. "
                    "The file is cut short."
                )
            done += count


def _is_addressable(target: torch.Tensor, dtype: torch.dtype) -> bool:
    return (
        type(target) in (torch.Tensor, torch.nn.Parameter)
        and target.device.type == "cpu"
        and target.dtype == dtype
        and target.is_contiguous()
        and not target.is_conj()
        and not target.is_neg()
    )


def _strided(span: torch.Tensor, dtype: torch.dtype, lengths: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    return span.view(dtype).as_strided(tuple(lengths), tuple(strides))


def _copy(target: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)
