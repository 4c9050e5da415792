"""Loading block-quantized safetensors checkpoints as the numbers that they stand for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import add, sub
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from .data_file import DataFile
from .dequantize import scale_blocks, unpack_mxfp4
from .hf_boxes import read_box
from .hf_index import open_listed
from .hf_metadata import Place
from .hf_reader import HuggingFaceStorageReader
from .item_parts import narrowed
from .slabs import slabs
from .strict_json import SafetensorsError

__all__ = ["QuantizedHuggingFaceStorageReader"]

_WEIGHT, _WEIGHT_SCALE = ".weight", ".weight_scale_inv"
_BLOCKS, _BLOCK_SCALES = "_blocks", "_scales"
_MAX_ELEMENTS = 1 << 19
"""Dequantized at a time, each in about 16 bytes of working memory."""


@dataclass(frozen=True)
class _Quantized:
    """A quantized tensor and its scales, each whole in one file; or why it cannot be loaded."""

    weight: Place
    scale: Place
    is_packed: bool
    fault: str | None


class QuantizedHuggingFaceStorageReader(HuggingFaceStorageReader):
    """Reads safetensors, and quantized tensors as what they stand for: in the metadata and in what is loaded.

    `X.weight` with `X.weight_scale_inv` is a matrix with one scale for each square block. `X_blocks` with `X_scales` is
    MXFP4: groups of 4-bit floats, two in each byte, of which each group has an exponent; the last two dims of
    `X_blocks` become one. A tensor without scales is read as it is, and so are scales that are asked for by name.

    Args:
        path: the folder. A local path.
        thread_count: reads at once on each rank.
        target_dtype: of dequantized tensors; conversion to a destination's dtype comes after.
        block_size: rows and columns of a block of `X.weight`.

    Source: torch.distributed.checkpoint.quantized_hf_storage.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        thread_count: int = 1,
        target_dtype: torch.dtype = torch.float32,
        block_size: int = 128,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"Expected at least one row for each block but got block_size={block_size!r}.")
        super().__init__(path, thread_count)
        self.target_dtype = target_dtype
        self.block_size = block_size
        self._quantized: dict[str, _Quantized] = {}

    def read_metadata(self) -> Metadata:
        """Return the metadata with dequantized tensors in `target_dtype` and in the shape of what they stand for."""
        metadata = super().read_metadata()
        entries: dict[str, Any] = metadata.state_dict_metadata
        storage_data: dict[MetadataIndex, Place] = metadata.storage_data
        places = {index.fqn: place for index, place in storage_data.items()}
        self._quantized = {}
        for fqn, entry in list(entries.items()):
            scale_fqn = _scale_of(fqn)
            if scale_fqn not in entries:
                continue
            is_packed = fqn.endswith(_BLOCKS)
            fault = self._fault(fqn, entry, entries[scale_fqn], is_packed)
            self._quantized[fqn] = _Quantized(places[fqn], places[scale_fqn], is_packed, fault)
            if fault is None:
                size = _unpacked_size(entry.size) if is_packed else entry.size
                origin = torch.Size([0] * len(size))
                chunk = ChunkStorageMetadata(origin, size)
                entries[fqn] = TensorStorageMetadata(TensorProperties(dtype=self.target_dtype), size, [chunk])
                storage_data[MetadataIndex(fqn, origin)] = places[fqn]
        return metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Check the files, and that what is asked for can be dequantized. All ranks.

        Raises:
            SafetensorsError: a quantized tensor in a form that is not known, or whose scales do not fit.
        """
        for item in plan.items:
            quantized = self._quantized.get(item.storage_index.fqn)
            if quantized is not None and quantized.fault is not None:
                raise SafetensorsError(quantized.fault)
        return super().prepare_local_plan(plan)

    def _fault(
        self, fqn: str, entry: TensorStorageMetadata, scale: TensorStorageMetadata, is_packed: bool
    ) -> str | None:
        if len(entry.chunks) != 1 or len(scale.chunks) != 1:
            return f"Expected {fqn!r} and its scales each whole in one file but got parts. Consolidate them first."
        if is_packed:
            expected = tuple(entry.size[:-1])
            if len(entry.size) < 2 or not entry.properties.dtype == scale.properties.dtype == torch.uint8:
                return (
                    f"Expected uint8 groups of uint8 bytes but got {fqn!r} of shape {tuple(entry.size)}, "
                    f"{entry.properties.dtype}, with scales of {scale.properties.dtype}."
                )
        elif len(entry.size) != 2:
            return (
                f"Expected a matrix but got {fqn!r} of shape {tuple(entry.size)}, with scales. Load it with no scales."
            )
        else:
            expected = tuple(-(-extent // self.block_size) for extent in entry.size)
        if tuple(scale.size) != expected:
            return (
                f"Expected scales of shape {expected} for {fqn!r} of shape {tuple(entry.size)}, "
                f"block_size={self.block_size}, but got shape {tuple(scale.size)}."
            )
        return None

    def _read_item(self, file: DataFile, place: Place, item: ReadItem, planner: LoadPlanner) -> None:
        quantized = self._quantized.get(item.storage_index.fqn)
        if quantized is None:
            super()._read_item(file, place, item, planner)
            return
        read = self._read_packed if quantized.is_packed else self._read_scaled
        target = self._target(item, planner)
        with self._scale_file(file, quantized) as scale_file:
            for offsets, lengths in slabs(target.size(), _MAX_ELEMENTS):
                part = narrowed(target, offsets, lengths)
                at = [*map(add, item.storage_offsets, offsets)]
                with torch.no_grad():
                    part.copy_(read(file, scale_file, quantized, at, lengths))
        planner.commit_tensor(item, target)

    def _scale_file(self, file: DataFile, quantized: _Quantized) -> AbstractContextManager[DataFile]:
        name = quantized.scale.relative_path
        return nullcontext(file) if name == quantized.weight.relative_path else open_listed(self.path, name, DataFile)

    def _read_scaled(
        self, file: DataFile, scale_file: DataFile, quantized: _Quantized, at: list[int], lengths: Sequence[int]
    ) -> torch.Tensor:
        first = [begin // self.block_size for begin in at]
        past = [-(-(begin + length) // self.block_size) for begin, length in zip(at, lengths, strict=True)]
        weight = _read(file, quantized.weight, at, lengths)
        scale = _read(scale_file, quantized.scale, first, [*map(sub, past, first)])
        row, column = (begin % self.block_size for begin in at)
        return scale_blocks(weight, scale, (row, column), self.block_size, self.target_dtype)

    def _read_packed(
        self, file: DataFile, scale_file: DataFile, quantized: _Quantized, at: list[int], lengths: Sequence[int]
    ) -> torch.Tensor:
        num_bytes = quantized.weight.shape[-1]
        first = at[-1] // (num_bytes * 2)
        num_groups = -(-(at[-1] + lengths[-1]) // (num_bytes * 2)) - first
        blocks = _read(file, quantized.weight, [*at[:-1], first, 0], [*lengths[:-1], num_groups, num_bytes])
        scales = _read(scale_file, quantized.scale, [*at[:-1], first], [*lengths[:-1], num_groups])
        numbers = unpack_mxfp4(blocks, scales, self.target_dtype)
        return numbers.narrow(-1, at[-1] - first * num_bytes * 2, lengths[-1])


def _scale_of(fqn: str) -> str:
    """Return the name that the scales of `fqn` would have; empty if there can be none."""
    if fqn.endswith(_WEIGHT):
        return fqn.removesuffix(_WEIGHT) + _WEIGHT_SCALE
    return fqn.removesuffix(_BLOCKS) + _BLOCK_SCALES if fqn.endswith(_BLOCKS) else ""


def _unpacked_size(size: torch.Size) -> torch.Size:
    return torch.Size((*size[:-2], size[-2] * size[-1] * 2))


def _read(file: DataFile, place: Place, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    part = torch.empty(lengths, dtype=place.dtype)
    read_box(file, place, offsets, part)
    return part
