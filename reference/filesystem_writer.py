"""Writing a checkpoint into a folder, committed by one atomic rename.

Data files come first and are made durable; then `.metadata` replaces its predecessor in one step; only then do files
that nothing refers to any more disappear. So at any moment the folder holds the previous checkpoint whole, or the new
one whole. New data never goes into a file that a committed checkpoint refers to.
"""

from __future__ import annotations

import dataclasses
import heapq
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import SerializationFormat, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ._extension import StreamTransformExtension
from .dedup import item_bytes
from .file_names import DATA_FILE, METADATA, SUFFIX, metadata_path, next_generation, prefix_for
from .file_systems import FileSystem
from .gc_pause import gc_paused
from .metadata import MetadataError, check_metadata, dump_metadata, load_metadata
from .seals import sealed_metadata
from .staging import BlockingAsyncStager
from .wire import WriteResults
from .write_items import write_file

__all__ = ["FileSystemWriter"]

DCP_VERSION = "1.0.0"


class FileSystemWriter(StorageWriter, BlockingAsyncStager):
    """Writes a checkpoint into a folder, from all ranks at once.

    Args:
        path: the folder; made if needed.
        single_file_per_rank: False makes one file per item.
        sync_files: make files durable (fsync) before the checkpoint counts as committed.
        thread_count: files written at once by each rank.
        per_thread_copy_ahead: bytes that each thread copies at a time of a tensor that cannot be written from where it
            lies: on a device, or not contiguous. At least 1 MiB; no more than that is ever held of such a tensor.
        cache_staged_state_dict: as in `BlockingAsyncStager`, which this is too: `async_save` has it copy the state.
        overwrite: replace a checkpoint that is already in the folder; False refuses. If the save fails, the old one
            stays loadable.
        _extensions: what the bytes of each item go through on their way into the file, the first one first.
        serialization_format: must be `TORCH_SAVE`.
        trusted_classes: classes beyond DCP's own that a custom planner puts into the metadata.
    """

    def __init__(  # noqa: PLR0917  torch's signature
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Sequence[StreamTransformExtension] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
        *,
        trusted_classes: Sequence[type] = (),
    ) -> None:
        if not all(isinstance(extension, StreamTransformExtension) for extension in _extensions or ()):
            raise TypeError(f"Expected stream extensions but got _extensions={_extensions!r}.")
        if serialization_format is not SerializationFormat.TORCH_SAVE:
            raise NotImplementedError(
                f"Expected TORCH_SAVE but got serialization_format={serialization_format!r}. Omit it."
            )
        if thread_count < 1:
            raise ValueError(f"Expected at least one thread but got thread_count={thread_count!r}. Use 1 or more.")
        self.path = Path(path)
        self.single_file_per_rank = single_file_per_rank
        self.sync_files = sync_files
        self.thread_count = thread_count
        self.per_thread_copy_ahead = per_thread_copy_ahead
        BlockingAsyncStager.__init__(self, cache_staged_state_dict)
        self.overwrite = overwrite
        self.trusted_classes = tuple(trusted_classes)
        self._extensions = tuple(_extensions or ())
        self.rank: int | None = None
        self.use_collectives = True
        self.save_id = str(uuid.uuid4())

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save, into `checkpoint_id` if given. All ranks."""
        if checkpoint_id:
            self.path = Path(checkpoint_id)
        self.save_id = str(uuid.uuid4())

    def storage_meta(self) -> StorageMeta:
        """Return what the metadata records of this save: its folder and a fresh id."""
        return StorageMeta(checkpoint_id=str(self.path), save_id=self.save_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Learn this rank's number, and whether ranks save together. All ranks."""
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the folder, and note which file names are taken. All ranks.

        Raises:
            FileExistsError: there is a checkpoint already and `overwrite` is False.
        """
        self._make_folder()
        if not self.overwrite and self._metadata_path().exists():
            raise FileExistsError(
                f"Expected no checkpoint in {str(self.path)!r} but got one, with overwrite=False. "
                "Use another folder, or overwrite=True."
            )
        generation = next_generation(self.path)
        if self.rank is not None and not self.use_collectives:
            return dataclasses.replace(plan, storage_data=prefix_for(self.rank, generation))
        return dataclasses.replace(plan, storage_data=generation)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank a file name prefix that no rank has seen in use. Coordinator only."""
        seen = [plan.storage_data for plan in plans if isinstance(plan.storage_data, int)]
        generation = max(seen) if seen else next_generation(self.path)
        return [
            plan
            if isinstance(plan.storage_data, _StoragePrefix)
            else dataclasses.replace(plan, storage_data=prefix_for(rank, generation))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items, and make them durable. All ranks.

        If it fails, the files that it began are removed.
        """
        groups = _split(plan.items, self.thread_count) if self.single_file_per_rank else [[i] for i in plan.items]
        paths = [self.path / f"{plan.storage_data.prefix}{n}{SUFFIX}" for n in range(len(groups))]
        finished: list[Path] = []

        def write(path: Path, items: list[WriteItem]) -> list[WriteResult]:
            results = write_file(
                path,
                items,
                planner,
                is_synced=self.sync_files,
                copy_ahead_bytes=self.per_thread_copy_ahead,
                extensions=self._extensions,
            )
            finished.append(path)
            return results

        try:
            if self.thread_count == 1:
                written = [write(path, items) for path, items in zip(paths, groups, strict=True)]
            else:
                with ThreadPoolExecutor(self.thread_count) as pool:
                    written = list(pool.map(write, paths, groups))
            if self.sync_files and paths:
                _sync_folder(self.path)
        except BaseException:
            for path in finished:
                with suppress(OSError):
                    path.unlink()
            raise
        future: Future[list[WriteResult]] = Future()
        future.set_result(WriteResults(result for part in written for result in part))
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit: write the metadata and let it replace the old one in one step. Coordinator only.

        Raises:
            MetadataError: some chunk was planned and never written.
        """
        raw = self._completed(metadata, results)
        target = self._metadata_path()
        temporary = target.with_name(f"{target.name}.tmp")
        with temporary.open("wb") as stream:
            stream.write(raw)
            stream.flush()
            if self.sync_files:
                os.fsync(stream.fileno())
        temporary.replace(target)
        if self.sync_files:
            _sync_folder(self.path)
            _sync_folder(self.path.parent)
        self._remove_stale({info.relative_path for info in metadata.storage_data.values()})

    @gc_paused()
    def _completed(self, metadata: Metadata, results: list[list[WriteResult]]) -> bytes:
        """Enter into the metadata what storage has to say, check it, and return its bytes."""
        metadata.version = DCP_VERSION
        metadata.storage_meta = self.storage_meta()
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        check_metadata(metadata, must_cover=False, needs_storage=True)
        return sealed_metadata(dump_metadata(metadata, trusted_classes=self.trusted_classes))

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The folder."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether `checkpoint_id` can be a folder here that this process may write."""
        return FileSystem.validate_checkpoint_id(checkpoint_id)

    def _make_folder(self) -> None:
        """Make the folder and those above it, and make their names durable: a file in a lost folder is lost too."""
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        if self.sync_files:
            for folder in missing:
                _sync_folder(folder.parent)

    def _metadata_path(self) -> Path:
        return metadata_path(self.path, None if self.use_collectives else self.rank)

    def _remove_stale(self, needed: set[str]) -> None:
        """Remove data files that no metadata in this folder refers to; a rank that saves alone only touches its own."""
        stale = []
        for path in self.path.iterdir():
            match = DATA_FILE.fullmatch(path.name)
            is_ours = match is not None and (self.use_collectives or int(match["rank"]) == self.rank)
            if is_ours and path.name not in needed:
                stale.append(path)
        if not stale:
            return
        others = [
            path for path in self.path.iterdir() if path.name.endswith(METADATA) and path != self._metadata_path()
        ]
        try:
            for path in others:
                kept = load_metadata(path.read_bytes(), trusted_classes=self.trusted_classes).storage_data
                needed = needed | {info.relative_path for info in kept.values()}
        except (OSError, MetadataError, AttributeError):
            return  # What cannot be read may refer to anything here.
        for path in stale:
            if path.name not in needed:
                with suppress(OSError):
                    path.unlink()


def _split(items: list[WriteItem], num_files: int) -> list[list[WriteItem]]:
    """Return non-empty groups of about equal bytes; objects come first in each, then tensors in plan order."""
    groups: list[list[int]] = [[] for _ in range(num_files)]
    if num_files == 1:
        groups[0] += range(len(items))
    else:
        loads = [(0, n) for n in range(num_files)]
        for position in sorted(range(len(items)), key=lambda i: -item_bytes(items[i])):
            load, n = loads[0]
            groups[n].append(position)
            heapq.heapreplace(loads, (load + item_bytes(items[position]), n))
    return [
        [items[i] for i in sorted(group, key=lambda i: (items[i].type != WriteItemType.BYTE_IO, i))]
        for group in groups
        if group
    ]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
