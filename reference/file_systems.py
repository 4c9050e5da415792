"""What torch's file storage asks of a file system, and the local one: for code that brings its own.

The storages here do more than this interface can say (they write from where tensors lie, read byte ranges, and make
names durable), so they do not go through it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from torch.distributed.checkpoint.filesystem import FileSystemBase

from .file_names import is_local

__all__ = ["FileSystem", "FileSystemBase"]

AnyPath = str | os.PathLike[str]


class FileSystem(FileSystemBase):
    """Files of this machine."""

    @contextmanager
    def create_stream(self, path: AnyPath, mode: str) -> Generator[io.IOBase, None, None]:
        """Give the file at `path`, open in `mode`."""
        with Path(path).open(mode) as stream:
            yield cast(io.IOBase, stream)

    def concat_path(self, path: AnyPath, suffix: str) -> AnyPath:
        """Return the path of `suffix` in the folder `path`."""
        return Path(path) / suffix

    def init_path(self, path: AnyPath) -> AnyPath:
        """Return `path` as this class's other methods return paths."""
        return Path(path)

    def rename(self, path: AnyPath, new_path: AnyPath) -> None:
        """Move a file; one that is at `new_path` is replaced."""
        Path(path).replace(new_path)

    def mkdir(self, path: AnyPath) -> None:
        """Make a folder and those above it; one that is there is left alone."""
        Path(path).mkdir(parents=True, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: AnyPath) -> bool:
        """Whether `checkpoint_id` can be a folder here that this process may write."""
        parents = Path(checkpoint_id).absolute().parents
        return is_local(checkpoint_id) and any(p.exists() and os.access(p, os.W_OK) for p in parents)

    def exists(self, path: AnyPath) -> bool:
        """Whether there is a file or folder at `path`."""
        return Path(path).exists()

    def rm_file(self, path: AnyPath) -> None:
        """Remove a file."""
        Path(path).unlink()

    def ls(self, path: AnyPath) -> list[str]:
        """Return the paths of what is in a folder."""
        return [str(entry) for entry in Path(path).iterdir()]
