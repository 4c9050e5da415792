"""The raw I/O limit: the same bytes by plain calls, from the same memory, one file per rank. Runs on ranks.

One call per tensor, since a checkpoint cannot do with fewer copies, and no format, no CRC, no plan. What is written is
made durable, as a checkpoint is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["read", "write"]


def write(path: Path, contents: Iterable[memoryview]) -> None:
    """Writes ``contents`` one after the other into a new file and makes it durable."""
    with path.open("xb", buffering=0) as stream:
        for content in contents:
            done = 0
            while done < len(content):  # Linux writes at most 2 GiB at a time
                done += stream.write(content[done:])
        os.fsync(stream.fileno())


def read(path: Path, destinations: Iterable[memoryview]) -> None:
    """Fills ``destinations`` one after the other from a file that :func:`write` made.

    Raises:
        EOFError: the file is too short.
    """
    with path.open("rb", buffering=0) as stream:
        for destination in destinations:
            done = 0
            while done < len(destination):
                count = stream.readinto(destination[done:])
                if not count:
                    raise EOFError(f"{path} ends too early.")
                done += count
