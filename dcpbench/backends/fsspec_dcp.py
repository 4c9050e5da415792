"""The backend ``fsspec``: torch's fsspec storage on local folders, with torch's engine and planners."""

from __future__ import annotations

from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from dcpbench.backends.protocol import StorageBackend

__all__ = ["BACKEND"]

BACKEND = StorageBackend("fsspec", FsspecWriter, FsspecReader)
