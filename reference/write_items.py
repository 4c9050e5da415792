"""Writing the items of one data file."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from .items import frame_of, memory_of

__all__ = ["write_file"]

_BUFFER_BYTES = 1 << 20
_MIN_PARALLEL_BYTES = 4 << 20


def write_file(path: Path, items: Iterable[WriteItem], planner: SavePlanner, *, is_synced: bool) -> list[WriteResult]:
    """Write `items` one after the other into a new file, and return where each lies; on failure leave no file.

    Args:
        path: must not exist.
        items: resolved one at a time, so that no more than one copy is held.
        planner: gives each item's tensor or bytes.
        is_synced: make the file durable before returning.
    """
    results = []
    stream = path.open("xb", buffering=_BUFFER_BYTES)
    try:
        with stream, ThreadPoolExecutor(1) as hasher:
            at = 0
            for item in items:
                length = _write(stream, planner.resolve_data(item), item, hasher)
                results.append(WriteResult(item.index, length, _StorageInfo(path.name, at, length)))
                at += length
            stream.flush()
            if is_synced:
                os.fsync(stream.fileno())
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    return results


def _write(stream: IO[bytes], data: torch.Tensor | io.BytesIO, item: WriteItem, hasher: Executor) -> int:
    if isinstance(data, io.BytesIO):
        return stream.write(data.getbuffer())
    if not isinstance(data, torch.Tensor):
        raise TypeError(
            f"Expected a tensor or BytesIO but got {item.index.fqn!r} as a {type(data).__name__}. "
            "Check the planner's resolve_data."
        )
    tensor = data.detach().cpu()
    frame = frame_of(tensor.dtype, tensor.size()) if _is_plain(tensor) else None
    if frame is None:
        return _write_with_torch(stream, tensor)
    payload = memory_of(tensor.resolve_conj().resolve_neg().contiguous())
    stream.write(frame.head)
    if len(payload) < _MIN_PARALLEL_BYTES:
        crc = zlib.crc32(payload)
        stream.write(payload)
    else:
        # The CRC comes after the payload, so it can be computed while the payload is being written.
        crc_of_payload = hasher.submit(zlib.crc32, payload)
        stream.write(payload)
        crc = crc_of_payload.result()
    stream.write(frame.tail(crc))
    return frame.length


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and tensor.layout == torch.strided and not tensor.is_quantized


def _write_with_torch(stream: IO[bytes], tensor: torch.Tensor) -> int:
    # Into the file directly, not through memory: these items may be larger than 4 GiB.
    begin = stream.tell()
    if tensor.layout == torch.strided and tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()  # torch.save writes the whole storage, of which this may be a small view.
    torch.save(tensor, stream)
    return stream.tell() - begin
