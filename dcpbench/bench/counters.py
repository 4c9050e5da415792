"""What the operating system counts, and what it shall forget, around a measured call. Runs on ranks."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
from pathlib import Path

import numpy as np

__all__ = ["bytes_read", "evict", "release_memory", "resident_share", "storage_bytes_read"]

_COUNTS = Path("/proc/self/io")


def bytes_read() -> int:
    """Returns the bytes that this process has read by system calls of the read family so far, as the kernel counts.

    Whatever it reads counts: files, pipes, this counter itself (about 100 bytes). What it maps does not.
    """
    return _count("rchar")


def storage_bytes_read() -> int:
    """Returns the bytes that were fetched from a device for this process so far, below the page cache.

    What was in memory already does not count, nor what a file system in memory gives; what it maps does.
    """
    return _count("read_bytes")


def _count(name: str) -> int:
    match = re.search(rf"^{name}: (\d+)$", _COUNTS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def release_memory() -> None:
    """Gives freed memory back to the system, so that a peak counts what a call needs and not what is new to it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def evict(folder: Path) -> None:
    """Drops the pages of all files below ``folder`` from the page cache; they are written first, where need be."""
    for path in _files(folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def resident_share(folder: Path) -> float:
    """Returns the share of the pages of all files below ``folder`` that lie in memory, 0.0 to 1.0."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    num_pages = num_resident = 0
    for path in _files(folder):
        if not path.stat().st_size:
            continue
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            content = np.frombuffer(mapped, dtype=np.uint8)
            pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), dtype=np.uint8)
            if mincore(content.ctypes.data, len(mapped), pages.ctypes.data):
                raise OSError(ctypes.get_errno(), f"mincore of {path}")
            del content  # a mapping that is looked at cannot be closed
            num_pages += len(pages)
            num_resident += int((pages & 1).sum())
    return num_resident / num_pages if num_pages else 0.0


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
