"""What a folder of safetensors files holds: DCP's metadata, put together from the files' headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint._hf_utils import _HFStorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from .gc_pause import gc_paused
from .hf_index import INDEX, checkpoint_files, open_listed
from .metadata import check_metadata
from .safetensors_dtypes import torch_dtype, torch_size
from .safetensors_header import MAX_DIM, Header, TensorEntry, read_header
from .strict_json import SafetensorsError, fault, parse_json, shorten

__all__ = ["Place", "read_folder"]

SHARDING_INFO = "DCP_SHARDING_INFO"
"""Key of the header's metadata under which torch keeps where each tensor lies in the whole, as JSON."""

_OFFSETS = "saved_offsets"


@dataclass
class Place(_HFStorageInfo):
    """Where one chunk lies: torch's storage info (file name, shape, dtype), and the bytes in that file.

    Args:
        at: first byte in the file.
        num_file_bytes: of the whole file.
    """

    at: int
    num_file_bytes: int


@gc_paused()
def read_folder(folder: Path) -> tuple[Metadata, dict[MetadataIndex, Place]]:
    """Return the metadata of the checkpoint in `folder`, and each chunk's place.

    A file that DCP wrote says which part of each tensor it holds; any other holds whole tensors.

    Raises:
        FileNotFoundError: there is no checkpoint, or a file of it is missing.
        SafetensorsError: a file is damaged, or files contradict each other or the index.
        MetadataError: chunks overlap or leave a gap.
    """
    names, weight_map = checkpoint_files(folder)
    collected = _Collected()
    for name in names:
        header = open_listed(folder, name, read_header)
        offsets_of = _saved_offsets(header, name)
        for fqn, entry in header.tensors.items():
            if weight_map.get(fqn, name) == name:
                collected.add(fqn, entry, offsets_of.get(fqn), name, header)
    for fqn, name in weight_map.items():
        if fqn not in collected.entries:
            raise SafetensorsError(f"Expected {fqn!r} in {name!r}, by {INDEX!r}, but got no such tensor there.")
    metadata = Metadata(state_dict_metadata=dict(collected.entries), storage_data=collected.places)
    check_metadata(metadata)
    return metadata, collected.places


class _Collected:
    """What the headers amount to so far."""

    def __init__(self) -> None:
        self.entries: dict[str, TensorStorageMetadata] = {}
        self.places: dict[MetadataIndex, Place] = {}

    def add(self, fqn: str, entry: TensorEntry, offsets: torch.Size | None, name: str, header: Header) -> None:
        """Take in one tensor of the file `name`: a chunk at `offsets`, or the whole."""
        dtype = torch_dtype(entry.dtype)
        if dtype is None:
            raise SafetensorsError(f"Expected a dtype that torch has but got {entry.dtype!r} for {fqn!r} in {name!r}.")
        size = torch_size(entry.dtype, entry.shape)
        offsets = torch.Size([0] * len(size)) if offsets is None else offsets
        far = torch.Size(map(sum, zip(offsets, size, strict=True)))
        known = self.entries.get(fqn)
        if known is None:
            known = self.entries[fqn] = TensorStorageMetadata(TensorProperties(dtype=dtype), far, [])
        elif known.properties.dtype != dtype or len(known.size) != len(far):
            raise SafetensorsError(
                f"Expected parts of {fqn!r} as {known.properties.dtype} with {len(known.size)} dims but got "
                f"{dtype} with {len(far)} in {name!r}."
            )
        known.size = torch.Size(map(max, known.size, far))
        if 0 in size and known.chunks:
            return  # a rank without elements; only of a tensor that is empty as a whole one such chunk is kept
        index = MetadataIndex(fqn, offsets)
        previous = self.places.get(index)
        if previous is not None and 0 not in previous.shape:
            raise SafetensorsError(
                f"Expected {fqn!r} at {tuple(offsets)} once but got it in {previous.relative_path!r} and in {name!r}. "
                "The folder holds more than one checkpoint."
            )
        known.chunks.append(ChunkStorageMetadata(offsets, size))
        self.places[index] = Place(name, size, dtype, header.data_at + entry.begin, header.num_file_bytes)


def _saved_offsets(header: Header, name: str) -> Mapping[str, torch.Size]:
    """Return where each tensor of the file begins in the whole one; empty if the file does not come from DCP."""
    text = header.metadata.get(SHARDING_INFO)
    if not text:
        return {}
    info = parse_json(text.encode(), f"{SHARDING_INFO} of {name}")
    found = {}
    for fqn, entry in header.tensors.items():
        value = info.get(fqn)
        offsets = value.get(_OFFSETS) if isinstance(value, dict) else None
        is_sound = isinstance(offsets, list) and all(
            type(offset) is int and 0 <= offset <= MAX_DIM for offset in offsets
        )
        if not is_sound or len(offsets) != len(entry.shape):  # type: ignore[arg-type]
            expected = f"{_OFFSETS} with {len(entry.shape)} numbers for {fqn!r}"
            raise fault(f"{SHARDING_INFO} of {name}", expected, shorten(value))
        found[fqn] = torch.Size(offsets)  # type: ignore[arg-type]
    return found
