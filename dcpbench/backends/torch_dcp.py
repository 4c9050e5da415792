"""The backend ``torch``: torch.distributed.checkpoint as it comes."""

from __future__ import annotations

from torch.distributed import checkpoint as dcp

from dcpbench.backends.protocol import StorageBackend

__all__ = ["BACKEND"]

BACKEND = StorageBackend("torch", writer=dcp.FileSystemWriter, reader=dcp.FileSystemReader)
