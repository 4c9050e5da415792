"""Making a folder of whole tensors out of a folder of shards.

Each output file is written once, from front to back: a stretch of a tensor is put together from the shards that overlap
it, in a buffer of bounded size, and written. The folder counts as consolidated once its index is in place.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from operator import sub
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from .boxes import BoxIndex
from .collectives import (
    COORDINATOR,
    Abort,
    Broadcast,
    Failure,
    Ok,
    Protocol,
    attempt,
    membership,
    run_alone,
    run_on_group,
)
from .data_file import DataFile
from .engine import conclude
from .hf_boxes import read_box
from .hf_commit import commit, discard, durable_file, pending_path, sync_folder
from .hf_index import Index, check_file_indices, file_name, next_generation, open_listed
from .hf_metadata import Place, read_folder
from .item_parts import narrowed
from .items import memory_of
from .safetensors_dtypes import stored_as
from .safetensors_header import encode_header
from .slabs import slabs
from .strict_json import SafetensorsError

__all__ = ["consolidate_safetensors_files", "consolidate_safetensors_files_on_every_rank"]

_STEP = "consolidate"
_MAX_OPEN_FILES = 64
_BUFFER_BYTES = 8 << 20


def consolidate_safetensors_files(
    input_dir: str, output_dir: str, fqn_to_index_mapping: dict[str, int], num_threads: int = 1
) -> None:
    """Write the tensors of `input_dir` whole into files in `output_dir`, with an index. One process alone.

    What `output_dir` holds already stays loadable until the new index is in place.

    Args:
        input_dir: safetensors files with shards, as DCP writes them.
        output_dir: a folder; made if needed.
        fqn_to_index_mapping: number of the output file, from 1, of every tensor in `input_dir`.
        num_threads: output files written at once.

    Raises:
        SafetensorsError: the input is damaged or incomplete, or the mapping names other tensors than it holds.

    Source: torch.distributed.checkpoint._consolidate_hf_safetensors.
    """
    job = _Job(Path(input_dir), Path(output_dir), fqn_to_index_mapping, num_threads)
    generation = job.begin()
    job.finish([job.write(generation, set(fqn_to_index_mapping.values()))])


def consolidate_safetensors_files_on_every_rank(
    input_dir: str,
    output_dir: str,
    fqn_to_index_mapping: dict[str, int],
    num_threads: int = 1,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Do the same with the output files spread over ranks. All ranks of the group; without one, this process alone.

    Args:
        input_dir: as above; every rank must see it.
        output_dir: as above; a folder that all ranks share.
        fqn_to_index_mapping: as above, the same on every rank.
        num_threads: output files written at once by each rank.
        process_group: default: the default group.

    Raises:
        CheckpointException: on every rank, with each failing rank's error and traceback.

    Source: torch.distributed.checkpoint._consolidate_hf_safetensors.
    """
    group, rank, world_size = membership(process_group)
    job = _Job(Path(input_dir), Path(output_dir), fqn_to_index_mapping, num_threads)
    protocol = _protocol(job, rank, world_size)
    if world_size == 1:
        run_alone(protocol)
    else:
        run_on_group(protocol, group)


@dataclass(frozen=True)
class _Written:
    """What one rank has written: the files, pending, and what is in them."""

    weight_map: dict[str, str]
    num_bytes: int


class _Job:
    """One consolidation, cut into the steps between which ranks wait for each other."""

    def __init__(
        self, input_dir: Path, output_dir: Path, fqn_to_index_mapping: Mapping[str, int], num_threads: int
    ) -> None:
        self._input = input_dir
        self._output = output_dir
        self._file_of = fqn_to_index_mapping
        self._num_threads = num_threads

    def begin(self) -> int:
        """Check everything, make the folder, and return the generation of the new files. Coordinator only."""
        check_file_indices(self._file_of)
        if self._num_threads < 1:
            raise ValueError(f"Expected at least one thread but got num_threads={self._num_threads!r}. Use 1 or more.")
        entries, _ = self._source
        differing = sorted(entries.keys() ^ self._file_of.keys())
        if differing:
            where = (
                "the files but not in the mapping" if differing[0] in entries else "the mapping but not in the files"
            )
            more = f", and {len(differing) - 1} more differences" if len(differing) > 1 else ""
            raise SafetensorsError(
                f"Expected the same tensors in fqn_to_index_mapping and in {str(self._input)!r} but got "
                f"{differing[0]!r} in {where}{more}."
            )
        missing = [folder for folder in (self._output, *self._output.parents) if not folder.exists()]
        self._output.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)
        return next_generation(self._output)

    def write(self, generation: int, indices: set[int]) -> _Written:
        """Write the files of these numbers, make them durable, and return what is in them. On failure leave none."""
        if not indices:
            return _Written({}, 0)
        entries, places = self._source
        highest = max(self._file_of.values())
        files: dict[str, list[str]] = {}
        for fqn, index in self._file_of.items():
            if index in indices:
                files.setdefault(file_name(index, highest, generation=generation), []).append(fqn)

        finished: list[str] = []

        def write(name: str) -> int:
            chosen = {fqn: entries[fqn] for fqn in files[name]}
            num_bytes = _write_file(pending_path(self._output, name), chosen, places, self._input)
            finished.append(name)
            return num_bytes

        try:
            with ThreadPoolExecutor(self._num_threads) as pool:
                num_bytes = sum(pool.map(write, files))
            sync_folder(self._output)
        except BaseException:
            discard(self._output, finished)
            raise
        return _Written({fqn: name for name, fqns in files.items() for fqn in fqns}, num_bytes)

    def finish(self, parts: Sequence[_Written]) -> None:
        """Commit what all ranks have written. Coordinator only."""
        weight_map = {fqn: name for part in parts for fqn, name in part.weight_map.items()}
        ordered = {fqn: weight_map[fqn] for fqn in self._file_of}
        commit(self._output, Index(ordered), sum(part.num_bytes for part in parts), keeps_shards=True)

    @cached_property
    def _source(self) -> tuple[dict[str, TensorStorageMetadata], dict[MetadataIndex, Place]]:
        metadata, places = read_folder(self._input)
        kept = metadata.state_dict_metadata.items()
        return {fqn: entry for fqn, entry in kept if isinstance(entry, TensorStorageMetadata)}, places

    def indices_of(self, rank: int, world_size: int) -> set[int]:
        """Return the numbers of the files that `rank` writes."""
        return {index for index in self._file_of.values() if index % world_size == rank}


def _protocol(job: _Job, rank: int, world_size: int) -> Protocol[None]:
    is_coordinator = rank == COORDINATOR
    begun: Ok | Failure = yield Broadcast(_STEP, attempt(rank, _STEP, job.begin) if is_coordinator else None)
    if isinstance(begun, Failure):
        raise Abort(_STEP, (begun,)).exception()
    generation = begun.value
    own = attempt(rank, _STEP, lambda: job.write(generation, job.indices_of(rank, world_size)))
    yield from conclude(rank, _STEP, own, job.finish, is_coordinator)


def _write_file(
    path: Path,
    entries: Mapping[str, TensorStorageMetadata],
    places: Mapping[MetadataIndex, Place],
    folder: Path,
) -> int:
    """Write one file of whole tensors, and return the bytes of its tensors."""
    kinds = {fqn: stored_as(entry.properties.dtype, entry.size) for fqn, entry in entries.items()}
    head, ordered = encode_header(kinds, {"format": "pt"})
    inputs = _OpenFiles(folder)
    try:
        with durable_file(path) as stream:
            stream.write(head)
            for fqn in ordered:
                for stretch in _whole(fqn, entries[fqn], places, inputs):
                    stream.write(memory_of(stretch))
    finally:
        inputs.close()
    return sum(entry.end - entry.begin for entry in ordered.values())


def _whole(
    fqn: str, entry: TensorStorageMetadata, places: Mapping[MetadataIndex, Place], inputs: _OpenFiles
) -> Iterator[torch.Tensor]:
    """Yield the whole tensor piece by piece, in the order of its bytes; each piece is valid until the next."""
    chunks, dtype = BoxIndex(entry.chunks), entry.properties.dtype
    buffer = torch.empty(min(_BUFFER_BYTES, math.prod(entry.size) * dtype.itemsize), dtype=torch.uint8)
    for offsets, lengths in slabs(entry.size, _BUFFER_BYTES // dtype.itemsize):
        stretch = buffer[: math.prod(lengths) * dtype.itemsize].view(dtype).reshape(lengths)
        for position, part_offsets, part_lengths in chunks.overlapping(offsets, lengths):
            chunk = entry.chunks[position]
            place = places[MetadataIndex(fqn, chunk.offsets)]
            into = narrowed(stretch, [*map(sub, part_offsets, offsets)], part_lengths)
            inside = [*map(sub, part_offsets, chunk.offsets)]
            read_box(inputs[place.relative_path], place, inside, into)
        yield stretch


class _OpenFiles:
    """Input files by name, opened when first needed; no more than a few dozen at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: OrderedDict[str, DataFile] = OrderedDict()

    def __getitem__(self, name: str) -> DataFile:
        if name not in self._files:
            if len(self._files) == _MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].__exit__()
            self._files[name] = open_listed(self._folder, name, DataFile)
        self._files.move_to_end(name)
        return self._files[name]

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].__exit__()
