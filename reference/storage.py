"""The storage interface, under torch's module name: torch's own abstract classes."""

from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult

__all__ = ["StorageReader", "StorageWriter", "WriteResult"]
