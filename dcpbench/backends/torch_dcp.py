"""The backend ``torch``: torch.distributed.checkpoint as it comes."""

from __future__ import annotations

from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from dcpbench.backends.protocol import StorageBackend

__all__ = ["BACKEND"]

BACKEND = StorageBackend("torch", writer=FileSystemWriter, reader=FileSystemReader)
