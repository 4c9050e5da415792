"""DCP's metadata: its data types (torch's own), its invariants, and its codec (see `metadata_codec`)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .boxes import is_in_bounds
from .indices import new_index
from .metadata_codec import MetadataError, dump_metadata, load_metadata
from .tiling import find_tiling_fault

__all__ = [
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataError",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "check_metadata",
    "dump_metadata",
    "load_metadata",
    "metadata_faults",
    "warn_if_partial",
]

_MAX_FAULTS_SHOWN = 5


def check_metadata(metadata: Metadata, *, must_cover: bool = True, needs_storage: bool = False) -> None:
    """Check that every tensor's chunks lie in bounds and cover each element exactly once.

    Args:
        metadata: of a whole checkpoint.
        must_cover: False accepts gaps, as in the metadata that one rank writes for itself.
        needs_storage: also require an entry of `storage_data` for every chunk and object.

    Raises:
        MetadataError: with every fault's tensor, chunks and indices (the first few, and how many more).
    """
    faults = metadata_faults(metadata, must_cover=must_cover)
    if needs_storage:
        faults += _missing_in_storage(metadata)
    if faults:
        more = len(faults) - _MAX_FAULTS_SHOWN
        shown = "; ".join(faults[:_MAX_FAULTS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise MetadataError(f"Expected chunks that tile each tensor exactly but got: {shown}.")


def metadata_faults(metadata: Metadata, *, must_cover: bool = True) -> list[str]:
    """Return what `check_metadata` would raise, one sentence per tensor; empty if all is well."""
    faults: list[str] = []
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            faults += _chunk_faults(fqn, entry, must_cover)
    return faults


def warn_if_partial(metadata: Metadata, *, stacklevel: int = 2) -> None:
    """Warn of tensors of which this checkpoint holds a part only: sharded ones that one process saved alone.

    Args:
        metadata: as one process made it for itself, without collectives.
        stacklevel: as in `warnings.warn`.
    """
    partial = [
        fqn
        for fqn, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
        and sum(math.prod(chunk.sizes) for chunk in entry.chunks) < math.prod(entry.size)
    ]
    if partial:
        more = len(partial) - _MAX_FAULTS_SHOWN
        shown = ", ".join(map(repr, partial[:_MAX_FAULTS_SHOWN])) + (f" and {more} more" if more > 0 else "")
        warnings.warn(
            f"Only this process's part of {shown} was saved, since it saved alone: the checkpoint is incomplete. "
            "Call save on all ranks, without no_dist.",
            stacklevel=stacklevel,
        )


def _missing_in_storage(metadata: Metadata) -> list[str]:
    stored = metadata.storage_data or {}
    faults = []
    for fqn, entry in metadata.state_dict_metadata.items():
        offsets = [chunk.offsets for chunk in entry.chunks] if isinstance(entry, TensorStorageMetadata) else [None]
        faults += [
            f"{fqn!r} has no storage data for the chunk at {_spell(offset)}"
            for offset in offsets
            if new_index(fqn, offset, None) not in stored
        ]
    return faults


def _chunk_faults(fqn: str, entry: TensorStorageMetadata, must_cover: bool) -> list[str]:
    if len(entry.chunks) == 1 and entry.chunks[0].sizes == entry.size and not any(entry.chunks[0].offsets):
        return []
    size = tuple(entry.size)
    outside = [chunk for chunk in entry.chunks if not is_in_bounds(chunk, size)]
    if outside:
        return [f"{fqn!r} of shape {size} has a chunk out of bounds: {_spell_chunk(chunk)}" for chunk in outside]
    fault = find_tiling_fault(entry.chunks, size, must_cover=must_cover)
    if fault is None:
        return []
    if not fault.positions:
        return [f"{fqn!r} of shape {size}: no chunk holds the element at {fault.index}"]
    holders = " and ".join(_spell_chunk(entry.chunks[i]) for i in fault.positions[:4])
    return [f"{fqn!r} of shape {size}: {len(fault.positions)} chunks hold the element at {fault.index}: {holders}"]


def _spell_chunk(chunk: ChunkStorageMetadata) -> str:
    return f"offsets={tuple(chunk.offsets)} sizes={tuple(chunk.sizes)}"


def _spell(offset: Sequence[int] | None) -> str:
    return "no offset" if offset is None else f"offset {tuple(offset)}"
