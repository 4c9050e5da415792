"""Checkpoints in a folder, in DCP's own on-disk format; see `filesystem_writer` and `filesystem_reader`."""

from torch.distributed.checkpoint.filesystem import SerializationFormat

from .file_systems import FileSystem, FileSystemBase
from .filesystem_reader import FileSystemReader
from .filesystem_writer import FileSystemWriter

__all__ = ["FileSystem", "FileSystemBase", "FileSystemReader", "FileSystemWriter", "SerializationFormat"]
