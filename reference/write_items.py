"""Writing the items of one data file."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from ._extension import StreamTransformExtension
from .checksums import crc32
from .gc_pause import gc_paused
from .items import frame_of, memory_of
from .seals import file_seal
from .slabs import slabs

__all__ = ["write_file"]

_BLOCK_BYTES = 512 << 10
"""What is checked and written at once: it stays in a core's cache from one to the other."""

_MIN_STAGED_BYTES = 1 << 20
_GATHERED_BYTES = 64 << 10


def write_file(
    path: Path,
    items: Iterable[WriteItem],
    planner: SavePlanner,
    *,
    is_synced: bool,
    copy_ahead_bytes: int,
    extensions: Sequence[StreamTransformExtension] = (),
) -> list[WriteResult]:
    """Write `items` one after the other into a new file, and return where each lies; on failure leave no file.

    Args:
        path: must not exist.
        items: resolved one at a time, so that no more than one copy is held.
        planner: gives each item's tensor or bytes.
        is_synced: make the file durable before returning.
        copy_ahead_bytes: of a tensor that is not written from where it lies (on a device, not contiguous), so much is
            copied at a time; at least 1 MiB.
        extensions: what the items' bytes go through, the first one first.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    ends = []  # numbers, and only at last objects: the cyclic garbage collector goes by how many of those there are
    try:
        try:
            writer = _ItemWriter(handle, max(copy_ahead_bytes, _MIN_STAGED_BYTES), extensions)
            items = list(items)
            for item in items:
                writer.write(item, planner.resolve_data(item))
                ends.append(writer.file.at)
            writer.file.write(file_seal(path.name))
            writer.file.flush()
            if is_synced:
                os.fsync(handle)
        finally:
            os.close(handle)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    return _results(items, [0, *ends], path.name, writer.descriptors)


@gc_paused()
def _results(
    items: Iterable[WriteItem], edges: list[int], name: str, descriptors: list[str] | None
) -> list[WriteResult]:
    return [
        WriteResult(item.index, end - begin, _StorageInfo(name, begin, end - begin, descriptors))
        for item, (begin, end) in zip(items, pairwise(edges), strict=True)
    ]


class _ItemWriter:
    def __init__(self, handle: int, staged_bytes: int, extensions: Sequence[StreamTransformExtension]) -> None:
        self.file = _Appending(handle)
        self.descriptors = [extension.get_descriptor() for extension in reversed(extensions)] or None
        self._extensions = extensions
        self._staged_bytes = staged_bytes

    def write(self, item: WriteItem, data: torch.Tensor | io.BytesIO) -> None:
        if not self._extensions:
            self._write(item, data, self.file)
            return
        # The last stream that is made is the first that bytes go through; a reader undoes them from the other end.
        stream: Any = _Stream(self.file)
        for extension in reversed(self._extensions):
            stream = extension.transform_to(stream)
        self._write(item, data, _Onward(stream))
        stream.close()

    def _write(self, item: WriteItem, data: torch.Tensor | io.BytesIO, out: _Appending | _Onward) -> None:
        if isinstance(data, io.BytesIO):
            out.write(data.getbuffer())
            return
        if not isinstance(data, torch.Tensor):
            raise TypeError(
                f"Expected a tensor or BytesIO but got {item.index.fqn!r} as a {type(data).__name__}. "
                "Check the planner's resolve_data."
            )
        tensor = data.detach() if data.requires_grad or type(data) is not torch.Tensor else data
        frame = frame_of(tensor.dtype, tensor.size()) if _is_plain(tensor) else None
        if frame is None:
            _write_with_torch(_Stream(out), tensor.cpu())
        elif frame.num_bytes <= _BLOCK_BYTES and _is_in_place(tensor):
            memory = memory_of(tensor)
            out.write(frame.head, memory, frame.tail(crc32(memory)))
        else:
            crc = 0
            out.write(frame.head)
            for block in _blocks(tensor, self._staged_bytes):
                crc = crc32(block, crc)
                out.write(block)
            out.write(frame.tail(crc))


class _Appending:
    """Appends to an open file: what is small is gathered, what is large is written from where it lies.

    Args:
        handle: the file's.
    """

    def __init__(self, handle: int) -> None:
        self.at = 0
        self._handle = handle
        self._gathered = bytearray()

    def write(self, *parts: bytes | bytearray | memoryview) -> None:
        """Append `parts`, which may change afterwards."""
        num_bytes = sum(map(len, parts))
        self.at += num_bytes
        if num_bytes + len(self._gathered) <= _GATHERED_BYTES:
            for part in parts:
                self._gathered += part
        elif self._gathered:
            self._write_through(num_bytes + len(self._gathered), self._gathered, *parts)
            self._gathered.clear()
        else:
            self._write_through(num_bytes, *parts)

    def flush(self) -> None:
        """Hand everything to the system."""
        self._write_through(len(self._gathered), self._gathered)
        self._gathered.clear()

    def _write_through(self, num_bytes: int, *parts: bytes | bytearray | memoryview) -> None:
        done = os.writev(self._handle, parts)
        if done == num_bytes:
            return
        for part in parts:
            rest = memoryview(part)[done:]
            done = max(0, done - len(part))
            while rest:
                rest = rest[os.write(self._handle, rest) :]


class _Onward:
    """Writes to the stream of an extension as to a file."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def write(self, *parts: bytes | bytearray | memoryview) -> None:
        for part in parts:
            self._stream.write(part)


class _Stream(io.RawIOBase):
    """A stream into the file, for code that needs one; closing it leaves the file open, since more items follow."""

    def __init__(self, out: _Appending | _Onward) -> None:
        self._out = out

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        with memoryview(content).cast("B") as view:
            self._out.write(view)
            return len(view)


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and tensor.layout == torch.strided and not tensor.is_quantized


def _is_in_place(tensor: torch.Tensor) -> bool:
    """Whether the bytes to write are the tensor's memory as it is."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _blocks(tensor: torch.Tensor, staged_bytes: int) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in row-major order, in blocks of a bounded size; each is valid until the next."""
    if _is_in_place(tensor):
        memory = memory_of(tensor)
        for begin in range(0, len(memory), _BLOCK_BYTES):
            yield memory[begin : begin + _BLOCK_BYTES]
        return
    if tensor.itemsize == 1:
        tensor = tensor.view(torch.uint8)  # the same bytes; torch cannot transpose every dtype of one byte
    for offsets, sizes in slabs(tensor.size(), max(1, staged_bytes // tensor.itemsize)):
        part = tensor
        for dim, (offset, length) in enumerate(zip(offsets, sizes, strict=True)):
            part = part.narrow(dim, offset, length)
        yield memory_of(part.cpu().resolve_conj().resolve_neg().contiguous())


def _write_with_torch(stream: io.RawIOBase, tensor: torch.Tensor) -> None:
    # Into the file directly, not through memory: these items may be larger than 4 GiB.
    if tensor.layout == torch.strided and tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()  # torch.save writes the whole storage, of which this may be a small view.
    torch.save(tensor, stream)  # type: ignore[arg-type]
