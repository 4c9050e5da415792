"""An independent implementation of PyTorch Distributed Checkpoint that reads like the protocol.

It speaks DCP's vocabulary: torch's abstract classes are the plug-in interface, torch's data types are the on-disk
format, and either side loads what the other saved. Every algorithm is its own.

    state_dict_saver, state_dict_loader
                  what a user calls; `open_storage` finds the storage
    engine        the protocol: save and load as generators of collectives; `collectives` drives them
    planner       what to write and what to read: `flatten`, `layout`, `boxes`, `dedup`, `materialize`
    async_saver   the same in the background: `staging`, `staged_copy`, `lanes`; in another process: `process_saver`
    filesystem    where bytes go: files, threads, commit; `file_names`, `items`, `write_items`, `read_items`
    hf_storage    the same as safetensors: `hf_writer`, `hf_reader`, `hf_commit`, `safetensors_header`
    metadata      the index of a checkpoint: its invariants; `metadata_codec`, its bytes
    state_dict    state dicts of models and optimizers, whatever shards them

Modules of torch's names that are not told here, such as `default_planner` or `utils`, only hand names on.
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

from .collectives import CheckpointException
from .filesystem import FileSystemReader, FileSystemWriter
from .hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from .metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from .optimizer import load_sharded_optimizer_state_dict
from .planner import DefaultLoadPlanner, DefaultSavePlanner
from .quantized_hf_storage import QuantizedHuggingFaceStorageReader
from .state_dict_loader import load, load_state_dict
from .state_dict_saver import async_save, save, save_state_dict
from .stateful import Stateful

__all__ = [
    "BytesStorageMetadata",
    "CheckpointException",
    "ChunkStorageMetadata",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "FileSystemReader",
    "FileSystemWriter",
    "HuggingFaceStorageReader",
    "HuggingFaceStorageWriter",
    "LoadItemType",
    "LoadPlan",
    "LoadPlanner",
    "Metadata",
    "MetadataIndex",
    "QuantizedHuggingFaceStorageReader",
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
    "load_sharded_optimizer_state_dict",
    "load_state_dict",
    "save",
    "save_state_dict",
]
