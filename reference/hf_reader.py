"""Reading a checkpoint from a folder of safetensors files, whoever wrote them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from .data_file import DataFile
from .file_names import is_local
from .filesystem_reader import FileSystemReader
from .hf_boxes import read_box
from .hf_index import open_listed
from .hf_metadata import Place, read_folder
from .strict_json import SafetensorsError

__all__ = ["HuggingFaceStorageReader"]


class HuggingFaceStorageReader(FileSystemReader):
    """Reads tensors from a folder of safetensors files: the files of an index, or without one every file in it.

    Files that DCP wrote may hold shards; others hold whole tensors. Only the bytes that are needed are read.

    Args:
        path: the folder. A local path.
        thread_count: reads at once on each rank.

    Source: torch.distributed.checkpoint.hf_storage.
    """

    def __init__(self, path: str | os.PathLike[str], thread_count: int = 1) -> None:
        if thread_count < 1:
            raise ValueError(f"Expected at least one thread but got thread_count={thread_count!r}. Use 1 or more.")
        super().__init__(_local(path))
        self.thread_count = thread_count

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load, from `checkpoint_id` if given. All ranks."""
        super().reset(_local(checkpoint_id) if checkpoint_id else None)

    def read_metadata(self) -> Metadata:  # torch's signature: no rank has one of its own
        """Return the metadata that the files' headers and the index amount to. All ranks.

        Raises:
            FileNotFoundError: there is no checkpoint, or a file of it is missing.
            SafetensorsError: a file or the index is damaged.
            MetadataError: chunks overlap or leave a gap.
        """
        metadata, _ = read_folder(self.path)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Check, before anything is changed, that every file that `plan` needs is there and whole. All ranks.

        Raises:
            SafetensorsError: an item has no place in storage, or its file has changed since its header was read.
            FileNotFoundError: a data file is missing.
        """
        places = [self._place(item.storage_index) for item in plan.items]
        sizes = {place.relative_path: place.num_file_bytes for place in places}
        for name, expected in sizes.items():
            size = open_listed(self.path, name, os.stat).st_size
            if size != expected:
                raise SafetensorsError(f"Expected {expected} bytes in {name!r} but got {size}. The file has changed.")
        return plan

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what `plan` names, in each file in the order of its bytes. All ranks."""
        files: dict[str, list[tuple[Place, ReadItem]]] = {}
        for item in plan.items:
            place = self._place(item.storage_index)
            files.setdefault(place.relative_path, []).append((place, item))
        tasks = [(name, part) for name, reads in files.items() for part in self._split(reads)]

        def read(task: tuple[str, list[tuple[Place, ReadItem]]]) -> None:
            name, reads = task
            with open_listed(self.path, name, DataFile) as file:
                for place, item in reads:
                    self._read_item(file, place, item, planner)

        if self.thread_count == 1 or len(tasks) <= 1:
            for task in tasks:
                read(task)
        else:
            with ThreadPoolExecutor(self.thread_count) as pool:
                list(pool.map(read, tasks))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_item(self, file: DataFile, place: Place, item: ReadItem, planner: LoadPlanner) -> None:
        target = self._target(item, planner)
        read_box(file, place, item.storage_offsets, target)
        planner.commit_tensor(item, target)

    def _target(self, item: ReadItem, planner: LoadPlanner) -> torch.Tensor:
        target = planner.resolve_tensor(item).detach()
        if tuple(target.size()) != tuple(item.lengths):
            raise ValueError(
                f"Expected a destination of shape {tuple(item.lengths)} but got {item.dest_index.fqn!r} "
                f"shape={tuple(target.size())}. Check the planner's resolve_tensor."
            )
        return target

    def _place(self, index: MetadataIndex) -> Place:
        place = self.storage_data.get(index)
        if not isinstance(place, Place):
            raise SafetensorsError(
                f"Expected a place in storage for {index.fqn!r} at {index.offset!r} but got {place!r}."
            )
        return place

    def _split(self, reads: list[tuple[Place, ReadItem]]) -> list[list[tuple[Place, ReadItem]]]:
        """Return the reads of one file, in the order of its bytes, in about as many groups as there are threads."""
        reads = sorted(reads, key=lambda read: read[0].at)
        step = -(-len(reads) // self.thread_count)
        return [reads[begin : begin + step] for begin in range(0, len(reads), step)]


def _local(path: str | os.PathLike[str]) -> Path:
    if not is_local(path):
        raise ValueError(f"Expected a local path but got path={str(path)!r}. Download it to a folder first.")
    return Path(path)
