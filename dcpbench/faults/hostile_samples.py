"""Runs on a rank: hostile checkpoints, each made from a good one in DCP's format.

A sample is a function that changes a `Folder` in place. What it must lead to is in its rule: code that does not run
(R901), files outside that are not read (R902), memory and time that are not taken (R903), nonsense that is refused
(R904).
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

__all__ = ["SAMPLES", "Folder", "Sample", "restore"]

HUGE = 1 << 40
BOMB_BYTES = 1 << 30
DEPTH = 200_000


class Folder:
    """A checkpoint that is about to become hostile.

    Attributes:
        path: the checkpoint's folder.
        outside: a folder beside it that a load must not touch; files in it are copies of the data files.
        canary: a file that must never come to be.
    """

    def __init__(self, path: Path, outside: Path, canary: Path) -> None:
        self.path = path
        self.outside = outside
        self.canary = canary

    def metadata(self) -> Metadata:
        held: Metadata = pickle.loads((self.path / ".metadata").read_bytes())
        return held

    def write(self, value: Any) -> None:
        """Replaces the metadata by any value."""
        (self.path / ".metadata").write_bytes(pickle.dumps(value, protocol=4))

    def write_raw(self, raw: bytes) -> None:
        (self.path / ".metadata").write_bytes(raw)

    def move(self, **fields: Any) -> None:
        """Changes fields of where the first tensor is stored."""
        metadata = self.metadata()
        info = metadata.storage_data[self.first(metadata)]
        for name, value in fields.items():
            setattr(info, name, value)
        self.write(metadata)

    def move_all(self, to: Callable[[str], str]) -> None:
        """Changes the paths of all data files."""
        metadata = self.metadata()
        for info in metadata.storage_data.values():
            info.relative_path = to(info.relative_path)
        self.write(metadata)

    @staticmethod
    def first(metadata: Metadata) -> MetadataIndex:
        held: dict[MetadataIndex, Any] = metadata.storage_data
        return next(i for i in held if isinstance(metadata.state_dict_metadata[i.fqn], TensorStorageMetadata))

    @staticmethod
    def first_tensor(metadata: Metadata) -> TensorStorageMetadata:
        return next(v for v in metadata.state_dict_metadata.values() if isinstance(v, TensorStorageMetadata) and v.size)

    def replace_item(self, kind: type, raw: bytes) -> None:
        """Puts other bytes in place of the first item that is a tensor, or a value, in a file of its own."""
        metadata = self.metadata()
        index = next(i for i in metadata.storage_data if isinstance(metadata.state_dict_metadata[i.fqn], kind))
        info = metadata.storage_data[index]
        (self.path / "__9_0.distcp").write_bytes(raw)
        info.relative_path, info.offset, info.length = "__9_0.distcp", 0, len(raw)
        self.write(metadata)


class Evil:
    """Pickles as a call that makes a file."""

    def __init__(self, canary: Path) -> None:
        self._canary = str(canary)

    def __reduce__(self) -> Any:
        return os.mkdir, (self._canary,)


@dataclass(frozen=True)
class Sample:
    """A hostile checkpoint.

    Attributes:
        name: of the sample.
        rule: that it is about.
        make: changes a good checkpoint into it.
        is_by_format: values that are no tensors are pickles in DCP's format, and every load of one may run code: what
            comes of it is shown, not judged.
    """

    name: str
    rule: str
    make: Callable[[Folder], None]
    is_by_format: bool = False


SAMPLES: dict[str, Sample] = {}


def _sample(rule: str, *, is_by_format: bool = False) -> Callable[[Callable[[Folder], None]], Callable[[Folder], None]]:
    def enter(make: Callable[[Folder], None]) -> Callable[[Folder], None]:
        name = make.__name__.strip("_").replace("_", "-")
        SAMPLES[name] = Sample(name, rule, make, is_by_format)
        return make

    return enter


@_sample("R901")
def _pickle_that_calls(folder: Folder) -> None:
    folder.write(Evil(folder.canary))


@_sample("R901")
def _planner_data_that_calls(folder: Folder) -> None:
    metadata = folder.metadata()
    metadata.planner_data = {"w": Evil(folder.canary)}
    folder.write(metadata)


@_sample("R901")
def _storage_meta_that_calls(folder: Folder) -> None:
    metadata = folder.metadata()
    metadata.storage_meta = Evil(folder.canary)  # type: ignore[assignment]
    folder.write(metadata)


@_sample("R901")
def _key_that_calls(folder: Folder) -> None:
    path = str(folder.canary).encode()
    folder.write_raw(b"\x80\x04}cposix\nmkdir\n(V" + path + b"\ntRK\x01s.")


@_sample("R901")
def _class_that_is_changed(folder: Folder) -> None:
    good = pickle.dumps(folder.metadata(), protocol=4)
    evil = b"cposix\nmkdir\n(V" + str(folder.canary).encode() + b"\ntR0"
    folder.write_raw(good[:2] + evil + good[2:])


@_sample("R901")
def _tensor_item_that_calls(folder: Folder) -> None:
    stream = io.BytesIO()
    torch.save(Evil(folder.canary), stream)
    folder.replace_item(TensorStorageMetadata, stream.getvalue())


@_sample("R901", is_by_format=True)
def _value_item_that_calls(folder: Folder) -> None:
    stream = io.BytesIO()
    torch.save(Evil(folder.canary), stream)
    folder.replace_item(BytesStorageMetadata, stream.getvalue())


@_sample("R902")
def _path_above(folder: Folder) -> None:
    folder.move_all(lambda path: f"../{folder.outside.name}/{path}")


@_sample("R902")
def _path_above_in_the_middle(folder: Folder) -> None:
    (folder.path / "sub").mkdir()
    folder.move_all(lambda path: f"sub/../../{folder.outside.name}/{path}")


@_sample("R902")
def _absolute_path(folder: Folder) -> None:
    folder.move_all(lambda path: str(folder.outside / path))


@_sample("R902")
def _link_to_a_file(folder: Folder) -> None:
    for path in folder.path.glob("*.distcp"):
        path.unlink()
        path.symlink_to(folder.outside / path.name)


@_sample("R902")
def _link_to_a_folder(folder: Folder) -> None:
    (folder.path / "sub").symlink_to(folder.outside)
    folder.move_all(lambda path: f"sub/{path}")


@_sample("R903")
def _pipe(folder: Folder) -> None:
    for path in folder.path.glob("*.distcp"):
        path.unlink()
        os.mkfifo(path)


@_sample("R903")
def _endless_device(folder: Folder) -> None:
    for path in folder.path.glob("*.distcp"):
        path.unlink()
        path.symlink_to("/dev/zero")


@_sample("R903")
def _metadata_is_a_pipe(folder: Folder) -> None:
    (folder.path / ".metadata").unlink()
    os.mkfifo(folder.path / ".metadata")


@_sample("R903")
def _huge_length(folder: Folder) -> None:
    folder.move(length=HUGE)


@_sample("R903")
def _huge_tensor(folder: Folder) -> None:
    metadata = folder.metadata()
    index = folder.first(metadata)
    entry: Any = metadata.state_dict_metadata[index.fqn]
    entry.chunks = [ChunkStorageMetadata(torch.Size([0] * len(entry.size)), torch.Size([HUGE] * len(entry.size)))]
    folder.write(metadata)


@_sample("R903")
def _huge_memo(folder: Folder) -> None:
    folder.write_raw(b"\x80\x02N" + b"r" + (0x07FFFFFF).to_bytes(4, "little") + b".")


@_sample("R903")
def _huge_text(folder: Folder) -> None:
    folder.write_raw(b"\x80\x04\x8d" + HUGE.to_bytes(8, "little") + b"x.")


@_sample("R903")
def _doubling_lists(folder: Folder) -> None:
    metadata = folder.metadata()
    bomb: list[Any] = []
    for _ in range(60):
        bomb = [bomb, bomb]
    metadata.planner_data = bomb
    folder.write(metadata)


@_sample("R903")
def _bomb_in_a_tensor(folder: Folder) -> None:
    folder.replace_item(TensorStorageMetadata, _bomb(torch.zeros(4)))


@_sample("R903")
def _bomb_in_a_value(folder: Folder) -> None:
    folder.replace_item(BytesStorageMetadata, _bomb({"a": 1}))


def _bomb(value: Any) -> bytes:
    """Returns a torch.save of a value in which one record is a gibibyte of zeros, compressed."""
    stream = io.BytesIO()
    torch.save(value, stream)
    out = io.BytesIO()
    with zipfile.ZipFile(stream) as good, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        names = good.namelist()
        largest = next((name for name in names if name.endswith("data/0")), names[0])
        for name in names:
            with bomb.open(name, "w", force_zip64=True) as record:
                record.write(good.read(name))
                if name == largest:
                    for _ in range(BOMB_BYTES >> 20):
                        record.write(bytes(1 << 20))
    return out.getvalue()


@_sample("R903")
def _deep_nesting(folder: Folder) -> None:
    folder.write_raw(b"\x80\x04" + b"(" * DEPTH + b"N" + b"t" * DEPTH + b".")


@_sample("R903")
def _deep_planner_data(folder: Folder) -> None:
    good = pickle.dumps(folder.metadata(), protocol=4)
    folder.write_raw(good[:2] + b"]" * DEPTH + b"a" * (DEPTH - 1) + b"0" + good[2:])


@_sample("R903")
def _cyclic_planner_data(folder: Folder) -> None:
    metadata = folder.metadata()
    circle: list[Any] = []
    circle.append(circle)
    metadata.planner_data = circle
    folder.write(metadata)


@_sample("R903")
def _many_chunks(folder: Folder) -> None:
    metadata = folder.metadata()
    entry = folder.first_tensor(metadata)
    entry.chunks = [ChunkStorageMetadata(c.offsets, c.sizes) for c in entry.chunks for _ in range(20_000)]
    folder.write(metadata)


def _altered(name: str, change: Callable[[Metadata], None]) -> None:
    def make(folder: Folder) -> None:
        metadata = folder.metadata()
        change(metadata)
        folder.write(metadata)

    SAMPLES[name] = Sample(name, "R904", make)


def _tensor(**fields: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        entry = Folder.first_tensor(metadata)
        for name, value in fields.items():
            setattr(entry, name, value(entry) if callable(value) else value)

    return change


def _stored(**fields: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for name, value in fields.items():
            setattr(metadata.storage_data[Folder.first(metadata)], name, value)

    return change


def _whole(**fields: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for name, value in fields.items():
            setattr(metadata, name, value)

    return change


def _numbers(metadata: Metadata) -> None:
    entries: dict[str, Any] = metadata.state_dict_metadata
    entries.update(dict.fromkeys(entries, 5))


def _moved_chunk(entry: TensorStorageMetadata, by: int) -> list[ChunkStorageMetadata]:
    first, *others = entry.chunks
    return [ChunkStorageMetadata(torch.Size([first.offsets[0] + by, *first.offsets[1:]]), first.sizes), *others]


_altered("negative-offset", _stored(offset=-1))
_altered("offset-past-the-end", _stored(offset=1 << 30))
_altered("offset-is-text", _stored(offset="0"))
_altered("length-is-zero", _stored(length=0))
_altered("length-is-negative", _stored(length=-5))
_altered("path-is-a-number", _stored(relative_path=7))
_altered("path-is-empty", _stored(relative_path=""))
_altered("path-with-nul", _stored(relative_path="__0_0\0.distcp"))
_altered("storage-data-is-none", _whole(storage_data=None))
_altered("storage-data-is-a-list", _whole(storage_data=[1, 2]))
_altered("state-dict-metadata-is-none", _whole(state_dict_metadata=None))
_altered("state-dict-metadata-is-a-list", _whole(state_dict_metadata=[]))
_altered("entries-are-numbers", _numbers)
_altered("properties-are-none", _tensor(properties=None))
_altered("size-is-text", _tensor(size="8, 8"))
_altered("size-is-negative", _tensor(size=(-8, 8)))
_altered("chunks-are-none", _tensor(chunks=None))
_altered("chunks-are-numbers", _tensor(chunks=[1, 2, 3]))
_altered("a-chunk-is-missing", _tensor(chunks=lambda entry: entry.chunks[1:]))
_altered("a-chunk-is-there-twice", _tensor(chunks=lambda entry: [*entry.chunks, entry.chunks[0]]))
_altered("a-chunk-is-out-of-bounds", _tensor(chunks=lambda entry: _moved_chunk(entry, 1000)))
_altered(
    "a-chunk-is-too-large", _tensor(chunks=lambda e: [ChunkStorageMetadata(e.chunks[0].offsets, e.size), *e.chunks[1:]])
)
_altered(
    "a-chunk-has-no-dims", _tensor(chunks=lambda e: [ChunkStorageMetadata(torch.Size(), torch.Size()), *e.chunks[1:]])
)


def restore(good: Path, folder: Folder) -> None:
    """Puts the good checkpoint back, and copies of its data files outside."""
    for path in (folder.path, folder.outside):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(good, path)
    if folder.canary.exists():
        folder.canary.rmdir()
