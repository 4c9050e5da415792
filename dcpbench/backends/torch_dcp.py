"""The backend ``torch``: torch.distributed.checkpoint as it comes."""

from __future__ import annotations

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from dcpbench.backends.protocol import Formats, StorageBackend

__all__ = ["BACKEND"]

BACKEND = StorageBackend(
    "torch",
    writer=FileSystemWriter,
    reader=FileSystemReader,
    save_planner=DefaultSavePlanner,
    load_planner=DefaultLoadPlanner,
    formats=Formats(dcp_to_torch_save, torch_save_to_dcp),
)
