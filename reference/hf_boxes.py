"""Reading boxes of the chunks in safetensors files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from .data_file import DataFile
from .hf_metadata import Place
from .item_parts import SavedTensor, read_part
from .strict_json import SafetensorsError

__all__ = ["read_box"]


def read_box(file: DataFile, place: Place, offsets: Sequence[int], target: torch.Tensor) -> None:
    """Fill `target` from the box at `offsets` of the chunk at `place`; only its bytes are read, and short gaps.

    Args:
        file: the chunk's.
        place: of the chunk.
        offsets: where the box begins in the chunk; `()` for a scalar.
        target: has the box's shape, which may be empty; any strides, dtype and device. Values are converted if its
            dtype is another.

    Raises:
        SafetensorsError: the box reaches out of the chunk.
        EOFError: the file ends within it.
    """
    lengths = target.size()
    is_inside = len(lengths) == len(offsets) == len(place.shape) and all(
        offset >= 0 and offset + length <= extent
        for offset, length, extent in zip(offsets, lengths, place.shape, strict=True)
    )
    if not is_inside:
        raise SafetensorsError(
            f"Expected a box inside shape {tuple(place.shape)} but got offsets={tuple(offsets)} "
            f"lengths={tuple(lengths)} in {place.relative_path!r}. Check the planner's resolve_tensor."
        )
    begin = torch.Size(offsets)
    index = MetadataIndex("", begin)
    read = ReadItem(LoadItemType.TENSOR, index, begin, index, begin, lengths)
    read_part(SavedTensor(file, place.at, place.shape, place.dtype), read, target)
