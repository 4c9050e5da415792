"""An independent implementation of PyTorch Distributed Checkpoint that reads like the protocol.

It speaks DCP's vocabulary: torch's abstract classes are the plug-in interface, torch's data types are the on-disk
format, and either side loads what the other saved. Every algorithm is its own.

    engine        the protocol: save and load as generators of collectives; `collectives` drives them
    planner       what to write and what to read: `flatten`, `layout`, `boxes`, `dedup`, `materialize`
    async_saver   the same in the background: `staging`, `staged_copy`, `lanes`
    filesystem    where bytes go: files, threads, commit; `file_names`, `items`, `write_items`, `read_items`
    metadata      the index of a checkpoint: its invariants; `metadata_codec`, its bytes
"""

from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult

from .async_saver import async_save
from .collectives import CheckpointException
from .engine import load, save
from .filesystem import FileSystemReader, FileSystemWriter
from .metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from .planner import DefaultLoadPlanner, DefaultSavePlanner
from .stateful import Stateful

__all__ = [
    "BytesStorageMetadata",
    "CheckpointException",
    "ChunkStorageMetadata",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "FileSystemReader",
    "FileSystemWriter",
    "LoadItemType",
    "LoadPlan",
    "LoadPlanner",
    "Metadata",
    "MetadataIndex",
    "ReadItem",
    "SavePlan",
    "SavePlanner",
    "Stateful",
    "StorageMeta",
    "StorageReader",
    "StorageWriter",
    "TensorProperties",
    "TensorStorageMetadata",
    "WriteItem",
    "WriteItemType",
    "WriteResult",
    "async_save",
    "load",
    "save",
]
