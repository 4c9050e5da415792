"""Storages that put items elsewhere: all into one file, padded, mapped into memory, through a compressing stream."""

from __future__ import annotations

import fcntl
import io
import json
import mmap
import zlib
from pathlib import Path
from typing import IO, Any

from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension

from tests.odd_backends.storage import Items

__all__ = ["Mapped", "OneFile", "Padded", "compressing_reader", "compressing_writer"]

_BLOCK = 512


class OneFile(Items):
    """All items of all ranks in one file, one behind the other; a second file says where, and the last word counts."""

    def put(self, folder: Path, name: str, raw: bytes, itemsize: int) -> None:
        with (folder / "all.bin").open("ab") as items, (folder / "all.idx").open("ab") as index:
            fcntl.flock(items, fcntl.LOCK_EX)
            items.seek(0, io.SEEK_END)
            index.write(json.dumps([name, items.tell(), len(raw)]).encode() + b"\n")
            items.write(raw)
            items.flush()
            index.flush()

    def get(self, folder: Path, name: str, itemsize: int) -> bytes:
        entries = [json.loads(line) for line in (folder / "all.idx").read_bytes().splitlines()]
        _, start, length = next(entry for entry in reversed(entries) if entry[0] == name)
        with (folder / "all.bin").open("rb") as items:
            items.seek(start)
            return items.read(length)


class Padded(Items):
    """Whole blocks, as direct I/O wants them, with the true length at the end."""

    def put(self, folder: Path, name: str, raw: bytes, itemsize: int) -> None:
        rest = -(len(raw) + 8) % _BLOCK
        (folder / name).write_bytes(raw + b"\xa5" * rest + len(raw).to_bytes(8, "little"))

    def get(self, folder: Path, name: str, itemsize: int) -> bytes:
        held = (folder / name).read_bytes()
        return held[: int.from_bytes(held[-8:], "little")]


class Mapped(Items):
    """Files that are mapped into memory, and read when the bytes are needed."""

    def get(self, folder: Path, name: str, itemsize: int) -> bytes:
        path = folder / name
        if not path.stat().st_size:
            return b""
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
            return bytes(held)


class _Deflating(io.RawIOBase):
    def __init__(self, output: IO[bytes]) -> None:
        self.output, self.packer = output, zlib.compressobj(1)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.output.write(self.packer.compress(data))
        return len(memoryview(data).cast("B"))

    def flush(self) -> None:
        if self.packer is not None:
            self.output.write(self.packer.flush(zlib.Z_FULL_FLUSH))

    def close(self) -> None:
        if self.packer is not None:
            self.output.write(self.packer.flush())
            self.packer = None  # IOBase.close() flushes once more
        super().close()


class Deflate(StreamTransformExtension):
    """DCP's own way to transform what is written: a stream that compresses."""

    @staticmethod
    def from_descriptor(version: str) -> Deflate:
        return Deflate()

    @staticmethod
    def registry_name() -> str:
        return "tests.deflate"

    def get_descriptor(self) -> str:
        return f"{self.registry_name()}/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return _Deflating(output)  # type: ignore[return-value]

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        return io.BytesIO(zlib.decompressobj().decompress(input.read()))


def compressing_writer(path: str) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(path, _extensions=[Deflate()])


def compressing_reader(path: str) -> dcp.FileSystemReader:
    registry = ExtensionRegistry()
    registry.register(Deflate)
    return dcp.FileSystemReader(path, _extension_registry=registry)
