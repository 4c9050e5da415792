"""An open data file of a checkpoint, and the bytes of one item in it: as a stream, or from first to last."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import IO, Any

from .items import CorruptItemError

__all__ = ["DataFile", "ItemStream", "StoredBytes", "TransformedBytes"]


class DataFile:
    """A data file that is read at any place, by any number of callers.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._handle)

    def read_into(self, at: int, *memories: bytearray | memoryview) -> None:
        """Fill `memories`, one after the other, from the bytes that begin at byte `at`.

        Raises:
            EOFError: the file ends before they are full.
        """
        wanted = sum(map(len, memories))
        done = os.preadv(self._handle, memories, at) if wanted else 0
        if done == wanted:
            return
        for memory in memories:
            rest = memoryview(memory)[done:]
            done = max(0, done - len(memory))
            while rest:
                place = at + len(memory) - len(rest)
                count = os.preadv(self._handle, [rest], place)
                if not count:
                    raise EOFError(f"Expected {wanted} bytes but {self.name!r} ends at byte {place}: it is cut short.")
                rest = rest[count:]
            at += len(memory)

    def read(self, at: int, length: int) -> bytearray:
        """Return `length` bytes from byte `at` on.

        Raises:
            EOFError: the file ends before.
        """
        memory = bytearray(length)
        self.read_into(at, memory)
        return memory


class ItemStream(io.RawIOBase):
    """The bytes of one item as a stream that can be read and sought in; closing it leaves the file open."""

    def __init__(self, file: DataFile, offset: int, length: int) -> None:
        self._file = file
        self._offset = offset
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place, in bytes from the beginning of the item."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to another place and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, memory: Any) -> int:
        """Fill `memory` as far as the item goes, and return the number of bytes."""
        view = memoryview(memory).cast("B")
        view = view[: max(0, min(len(view), self._length - self._at))]
        self._file.read_into(self._offset + self._at, view)
        self._at += len(view)
        return len(view)


class StoredBytes:
    """Takes the bytes of a file from byte `at` on, as they are.

    Args:
        file: the open file.
        at: where to begin.
    """

    def __init__(self, file: DataFile, at: int) -> None:
        self._file = file
        self._at = at

    def take_into(self, *memories: bytearray | memoryview) -> None:
        """Fill `memories`, one after the other, with the next bytes.

        Raises:
            EOFError: there are not as many.
        """
        self._file.read_into(self._at, *memories)
        self._at += sum(map(len, memories))


class TransformedBytes:
    """Takes the bytes that a stream extension gives.

    Args:
        stream: from the extension; anything that has `read`.
        what: what comes from it, for error messages.
    """

    def __init__(self, stream: IO[bytes], what: str) -> None:
        self._stream = stream
        self._what = what

    def take(self, num_bytes: int = -1) -> bytes:
        """Return up to so many of the next bytes, at least one if there is any; -1: all of them.

        Raises:
            CorruptItemError: the extension cannot make sense of what is stored.
        """
        try:
            return self._stream.read(num_bytes)
        except Exception as error:
            raise CorruptItemError(
                f"Expected what the extensions wrote but got {self._what} unreadable: {error}."
            ) from error

    def take_into(self, *memories: bytearray | memoryview) -> None:
        """Fill `memories`, one after the other, with the next bytes.

        Raises:
            CorruptItemError: the extension cannot make sense of what is stored.
            EOFError: there are not as many.
        """
        for memory in memories:
            rest = memoryview(memory)
            while rest:
                taken = self.take(len(rest))
                if not taken:
                    raise EOFError(f"Expected more bytes from {self._what} but the extensions gave none.")
                rest[: len(taken)] = taken
                rest = rest[len(taken) :]
