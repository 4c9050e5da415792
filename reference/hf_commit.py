"""Committing a folder of safetensors files: one atomic rename of the index.

The files that the index lists are durable by then, as `NAME.pending`. After the rename they take their names, and only
then do files go that belonged to the checkpoint before. So at any moment the index in the folder is the previous one,
with its files untouched, or the new one, with all of its files; see `hf_index.open_listed` for the moment in between.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .hf_index import DATA_FILE, INDEX, PENDING, SUFFIX, Index, dump_index, read_index
from .strict_json import SafetensorsError

__all__ = ["commit", "discard", "durable_file", "pending_path", "sync_folder"]

_BUFFER_BYTES = 1 << 20


def pending_path(folder: Path, name: str) -> Path:
    """Return where a data file is written, before the index lists it."""
    return folder / f"{name}{PENDING}"


def commit(folder: Path, index: Index, total_size: int, *, keeps_shards: bool = False) -> None:
    """Make the pending files that `index` lists the checkpoint of `folder`. One process alone.

    Args:
        folder: where they lie.
        index: what the checkpoint consists of.
        total_size: of all tensors' bytes.
        keeps_shards: leave shards of a previous checkpoint in the folder: they are not what is being replaced.
    """
    previous = _files_before(folder)
    temporary = folder / f"{INDEX}.tmp"
    with temporary.open("wb") as stream:
        stream.write(dump_index(index, total_size))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(folder / INDEX)
    sync_folder(folder)
    sync_folder(folder.parent)
    for name in index.files:
        pending_path(folder, name).replace(folder / name)
    sync_folder(folder)
    _remove_stale(folder, previous, set(index.files), keeps_shards)


@contextmanager
def durable_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file to write, and make it durable in the end; on failure leave none.

    Raises:
        FileExistsError: there is one already, which stays.
    """
    stream = path.open("xb", buffering=_BUFFER_BYTES)
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def discard(folder: Path, names: list[str]) -> None:
    """Remove files of a save that failed, once written."""
    for name in names:
        with suppress(OSError):
            pending_path(folder, name).unlink()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files_before(folder: Path) -> set[str]:
    try:
        index = read_index(folder)
    except (SafetensorsError, OSError):
        return set()  # what cannot be read may list anything
    return set(index.files) if index is not None else set()


def _remove_stale(folder: Path, previous: set[str], needed: set[str], keeps_shards: bool) -> None:
    """Remove what belonged to the previous checkpoint, by its index or by the names that DCP gives; nothing else."""
    stale = []
    for path in folder.iterdir():
        match = DATA_FILE.fullmatch(path.name)
        was_listed = path.name in previous and path.name.endswith(SUFFIX)
        if path.name in needed or not (match or was_listed):
            continue
        if keeps_shards and (match is None or match["shard"]):
            continue
        stale.append(path)
    for path in stale:
        with suppress(OSError):
            path.unlink()
