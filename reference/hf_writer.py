"""Writing a checkpoint as safetensors files in a folder that Hugging Face's libraries read; see `hf_commit`."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ._consolidate_hf_safetensors import consolidate_safetensors_files
from .file_names import is_local
from .filesystem_writer import FileSystemWriter
from .hf_commit import commit, discard, pending_path, sync_folder
from .hf_index import INDEX, SHARDED_FOLDER, Index, check_file_indices, file_name, next_generation
from .metadata import check_metadata
from .safetensors_dtypes import stored_as
from .safetensors_write import write_tensors
from .strict_json import SafetensorsError

__all__ = ["HuggingFaceStorageWriter"]


class HuggingFaceStorageWriter(FileSystemWriter):
    """Writes tensors as safetensors files. Objects cannot be stored, and are refused while planning.

    Without `save_distributed` each tensor must be whole on one rank, and each file is written by one rank alone; the
    folder is then what Hugging Face's libraries read. With it, every rank writes its own shards, and such a folder is
    read by DCP only, or consolidated.

    Args:
        path: the folder; made if needed. A local path.
        fqn_to_index_mapping: number of the file, from 1, for each tensor. Default: one file (per rank).
        thread_count: files written at once by each rank.
        save_distributed: every rank writes its own shards.
        enable_consolidation: write to `path/sharded`, then make of it a folder of whole tensors in `path`.
        thread_count_consolidation: consolidated files written at once, by the coordinator.

    Source: torch.distributed.checkpoint.hf_storage.
    """

    def __init__(  # noqa: PLR0917  torch's signature
        self,
        path: str | os.PathLike[str],
        fqn_to_index_mapping: dict[str, int] | None = None,
        thread_count: int = 1,
        save_distributed: bool = False,
        enable_consolidation: bool = False,
        thread_count_consolidation: int = 1,
    ) -> None:
        if thread_count_consolidation < 1:
            raise ValueError(
                "Expected at least one thread but got "
                f"thread_count_consolidation={thread_count_consolidation!r}. Use 1 or more."
            )
        check_file_indices(fqn_to_index_mapping or {})
        super().__init__(path, thread_count=thread_count)
        self.fqn_to_index_mapping = fqn_to_index_mapping
        self.save_distributed = save_distributed
        self.enable_consolidation = enable_consolidation
        self.thread_count_consolidation = thread_count_consolidation
        self.consolidated_output_path: str | None = None
        self._set_folder(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save, into `checkpoint_id` if given. All ranks."""
        super().reset()
        if checkpoint_id:
            self._set_folder(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn this rank's number. All ranks.

        Raises:
            ValueError: ranks want to save each for itself, for which the format has no place.
        """
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if not self.use_collectives:
            raise ValueError("Expected ranks that save together but got use_collectives=False. Omit it.")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what the format cannot hold, make the folder, and note which file names are taken. All ranks.

        Raises:
            SafetensorsError: an object, a dtype that safetensors lacks, or a tensor that no file is named for.
        """
        for item in plan.items:
            self._check_item(item)
        self._make_folder()
        return dataclasses.replace(plan, storage_data=next_generation(self.path))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each rank how to name its files. Coordinator only.

        Raises:
            SafetensorsError: without `save_distributed`, a tensor in parts, or two ranks with tensors for one file.
            MetadataError: chunks that do not make up whole tensors.
        """
        _check_coverage(plans)
        if not self.save_distributed:
            self._check_one_writer(plans)
        generation = max((plan.storage_data for plan in plans if isinstance(plan.storage_data, int)), default=0)
        shared: dict[str, Any] = {"generation": generation}
        if self.fqn_to_index_mapping is not None:
            shared["fqn_to_index_mapping"] = self.fqn_to_index_mapping
        return [
            dataclasses.replace(
                plan, storage_data={**shared, "shard_index": number} if self.save_distributed else shared
            )
            for number, plan in enumerate(plans, start=1)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors, and make them durable. All ranks.

        If it fails, the files that it began are removed.
        """
        files = _split(plan)
        finished: list[str] = []

        def write(name: str) -> list[WriteResult]:
            results = write_tensors(pending_path(self.path, name), name, files[name], planner)
            finished.append(name)
            return results

        try:
            if self.thread_count == 1:
                written = [write(name) for name in files]
            else:
                with ThreadPoolExecutor(self.thread_count) as pool:
                    written = list(pool.map(write, files))
            if files:
                sync_folder(self.path)
        except BaseException:
            discard(self.path, finished)
            raise
        future: Future[list[WriteResult]] = Future()
        future.set_result([result for part in written for result in part])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit: write the index and let it replace the old one in one step; then consolidate. Coordinator only.

        Raises:
            MetadataError: some chunk was planned and never written.
        """
        metadata.storage_meta = self.storage_meta()
        written = [result for part in results for result in part]
        metadata.storage_data = {result.index: result.storage_data for result in written}
        check_metadata(metadata, needs_storage=True)
        by_fqn = {result.index.fqn: result.storage_data.relative_path for result in written}
        if self.save_distributed:
            index = Index(shard_files=sorted({result.storage_data.relative_path for result in written}))
        else:
            index = Index(weight_map=by_fqn)
        commit(self.path, index, sum(result.size_in_bytes for result in written))
        if self.consolidated_output_path is not None and by_fqn:
            mapping = self.fqn_to_index_mapping
            consolidate_safetensors_files(
                str(self.path),
                self.consolidated_output_path,
                {fqn: 1 if mapping is None else mapping[fqn] for fqn in metadata.state_dict_metadata},
                self.thread_count_consolidation,
            )

    @property
    def metadata_path(self) -> str:
        """The index's name."""
        return INDEX

    def _set_folder(self, path: str | os.PathLike[str]) -> None:
        if not is_local(path):
            raise ValueError(f"Expected a local path but got path={str(path)!r}. Save to a folder, then upload it.")
        self.path = Path(path)
        if self.enable_consolidation:
            self.consolidated_output_path = str(self.path)
            self.path /= SHARDED_FOLDER

    def _check_item(self, item: WriteItem) -> None:
        fqn, data = item.index.fqn, item.tensor_data
        if data is None:
            raise SafetensorsError(
                f"Expected tensors only but got {fqn!r}, an object, which safetensors cannot hold. "
                "Leave it out, or make it a tensor."
            )
        try:
            stored_as(data.properties.dtype, data.chunk.sizes)
        except SafetensorsError as error:
            raise SafetensorsError(f"{fqn!r}: {error}") from None
        if self.fqn_to_index_mapping is not None and fqn not in self.fqn_to_index_mapping:
            raise SafetensorsError(
                f"Expected a file for each tensor but got none for {fqn!r} in fqn_to_index_mapping. Add it."
            )

    def _check_one_writer(self, plans: list[SavePlan]) -> None:
        mapping = self.fqn_to_index_mapping
        writers: dict[int, int] = {}
        for rank, plan in enumerate(plans):
            for item in plan.items:
                assert item.tensor_data is not None
                fqn, chunk = item.index.fqn, item.tensor_data.chunk
                if chunk.sizes != item.tensor_data.size:
                    raise SafetensorsError(
                        f"Expected whole tensors but got {fqn!r} of shape {tuple(item.tensor_data.size)} in parts. "
                        "Pass save_distributed=True."
                    )
                file = 1 if mapping is None else mapping[fqn]
                if writers.setdefault(file, rank) != rank:
                    raise SafetensorsError(
                        f"Expected one rank for each file but got ranks {writers[file]} and {rank} for file {file}, "
                        f"which holds {fqn!r}. Pass save_distributed=True, or plan with dedup_save_to_lowest_rank=True."
                    )


def _check_coverage(plans: list[SavePlan]) -> None:
    entries: dict[str, TensorStorageMetadata] = {}
    for plan in plans:
        for item in plan.items:
            data = item.tensor_data
            assert data is not None
            entry = entries.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
            entry.chunks.append(data.chunk)
    # The files do not record a tensor's shape, only its parts: they must reach to its end.
    check_metadata(Metadata(state_dict_metadata=dict(entries)))


def _split(plan: SavePlan) -> dict[str, list[WriteItem]]:
    """Return the items of each file, by its name. In one file each FQN stands once."""
    if not plan.items:
        return {}
    names: dict[str, Any] = plan.storage_data
    mapping: Mapping[str, int] | None = names.get("fqn_to_index_mapping")
    num_files = max(mapping.values()) if mapping is not None else 1
    seen: Counter[str] = Counter()
    files: dict[str, list[WriteItem]] = {}
    for item in plan.items:
        fqn = item.index.fqn
        seen[fqn] += 1
        name = file_name(
            1 if mapping is None else mapping[fqn],
            num_files,
            shard=names.get("shard_index"),
            generation=names["generation"],
            part=seen[fqn],
        )
        files.setdefault(name, []).append(item)
    return files
