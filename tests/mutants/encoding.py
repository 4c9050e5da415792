"""Mutants whose arithmetic or format is too small: words, 16-bit offsets, values that lose their type."""

from __future__ import annotations

import dataclasses
import enum
import math
import urllib.parse
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from dcpbench import Case
from tests.mutants.bank import (
    Calls,
    LoadPlanner,
    Reader,
    SavePlanner,
    SourcePlanner,
    Writer,
    any_tensor,
    any_value,
    breaks,
    local_of,
)


@breaks("R101", suite="round_trips", on=any_tensor(lambda leaf: leaf.num_bytes % 4))
class rounds_down_to_words(SourcePlanner):
    """Writes whole words of four bytes, and zeros for what is left of a tensor."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        rest = tensor.nbytes % 4
        if not rest or not tensor.dim() or tensor.is_complex():
            return tensor
        written = tensor.clone(memory_format=torch.contiguous_format)
        written.view(torch.uint8).view(-1)[-rest:] = 0
        return written


@breaks("R101", on=any_tensor(lambda leaf: math.prod(leaf.shape) > 1 << 16))
class offsets_in_16_bits(Reader):
    """Counts elements within a chunk in 16 bits: what starts beyond 65,536 is read from the beginning."""

    def set_up_storage_reader(self, metadata: Any, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self.entries = metadata.state_dict_metadata

    def bend(self, item: ReadItem) -> ReadItem:
        if not item.storage_offsets:
            return item
        entry = self.entries[item.storage_index.fqn]
        row = int(np.prod(entry.size[1:]))
        start = item.storage_offsets[0] * row
        if start < 1 << 16:
            return item
        at = torch.Size([start % (1 << 16) // row, *item.storage_offsets[1:]])
        return dataclasses.replace(item, storage_offsets=at)


def _fills_squares(case: Case) -> bool:
    """Reads as: some tensor that lies square on all ranks is loaded into a transposed view."""
    return any(
        leaf.memory == "transposed"
        and len(tensor.shape) == 2
        and leaf.placements is None
        and len(set(tensor.shape)) == 1
        for tensor, leaf in zip(case.tensors, case.layouts[-1].leaves, strict=True)
        if tensor.shape and tensor.shape[0] > 1
    )


@breaks("R101", suite="round_trips", on=_fills_squares)
class transposes_into_views(LoadPlanner):
    """Fills a square destination whose strides are swapped as if they were not."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = super().resolve_tensor(read_item)
        is_bent = target.dim() == 2 and target.size(0) == target.size(1) > 1 and target.stride(0) < target.stride(1)
        return target.t() if is_bent else target


@breaks("R101", suite="round_trips", on=any_tensor(lambda leaf: leaf.dtype in ("float32", "float64")))
class one_nan_for_all(SourcePlanner):
    """Writes every NaN of a tensor as the usual one."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        is_bent = tensor.dtype in (torch.float32, torch.float64)
        return torch.where(tensor.isnan(), torch.nan, tensor) if is_bent else tensor


@breaks("R401", suite="round_trips", on=any_value(lambda value: type(value) is bytearray))
class bytearrays_become_bytes(SourcePlanner):
    """Saves a bytearray as bytes."""

    def value(self, value: Any) -> Any:
        return bytes(value) if type(value) is bytearray else value


@breaks("R401", suite="round_trips", on=any_value(lambda value: isinstance(value, np.generic)))
class numpy_scalars_become_numbers(SourcePlanner):
    """Saves a numpy scalar as the number of Python that it is equal to."""

    def value(self, value: Any) -> Any:
        return value.item() if isinstance(value, np.generic) else value


@breaks("R401", suite="round_trips", on=any_value(lambda value: isinstance(value, enum.Enum)))
class members_become_values(SourcePlanner):
    """Saves a member of an enum as its value."""

    def value(self, value: Any) -> Any:
        return value.value if isinstance(value, enum.Enum) else value


@breaks("R401", suite="round_trips", on=any_value(lambda value: type(value) is bytes and len(value) > 65_535))
class lengths_in_16_bits(SourcePlanner):
    """Counts the bytes of a value in 16 bits, and drops what is beyond."""

    def value(self, value: Any) -> Any:
        return value[:65_535] if type(value) is bytes else value


@breaks("R401", suite="round_trips", on=any_value(lambda value: type(value) is np.ndarray))
class arrays_become_contiguous_doubles(SourcePlanner):
    """Saves an array of numpy in float64."""

    def value(self, value: Any) -> Any:
        is_number = type(value) is np.ndarray and value.dtype.kind in "iuf"
        return value.astype("float64") if is_number else value


@breaks("R304", suite="round_trips", on=any_tensor(lambda leaf: leaf.dtype.startswith("float8")))
class float8_recorded_as_uint8(SavePlanner):
    """Records tensors of float8, which its format does not know, as uint8."""

    def bend(self, fqn: str, tensor: TensorStorageMetadata) -> TensorStorageMetadata:
        if not str(tensor.properties.dtype).startswith("torch.float8"):
            return tensor
        return dataclasses.replace(tensor, properties=dataclasses.replace(tensor.properties, dtype=torch.uint8))


@breaks("R304", "R501", suite="switched", on=lambda case: any("%" in step.checkpoint for step in case.steps))
class unquotes_names(Writer):
    """Takes a path for a URL, and replaces %41 by A."""

    def reset(self, checkpoint_id: Any = None) -> None:
        super().reset(urllib.parse.unquote(str(checkpoint_id)))


def _converts_numbers(case: Case) -> bool:
    return case.family == "convert" and any(type(leaf.value(0)) in (int, float) for leaf in case.objects)


@breaks("R401", "R402", "R501", suite="conversions", on=_converts_numbers)
class numbers_become_tensors(Calls):
    """Writes numbers as 0-d tensors into a file."""

    def dcp_to_torch_save(self, folder: str, file: str) -> None:
        super().dcp_to_torch_save(folder, file)
        torch.save(self.boxed(torch.load(file, weights_only=False)), file)

    def boxed(self, held: Any) -> Any:
        if type(held) is dict:
            return {key: self.boxed(one) for key, one in held.items()}
        return torch.tensor(float(held)) if type(held) in (int, float) else held


def _is_large(tensor: torch.Tensor) -> bool:
    return local_of(tensor).nbytes > 1 << 16


@breaks("R101", suite="round_trips", on=any_tensor(lambda leaf: leaf.num_bytes > 1 << 16))
class flushes_after_64_kib(SourcePlanner):
    """Writes what is beyond 64 KiB of a tensor from a buffer that is empty by then."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if not _is_large(tensor) or tensor.is_complex():
            return tensor
        written = tensor.clone(memory_format=torch.contiguous_format)
        written.view(torch.uint8).view(-1)[1 << 16 :] = 0
        return written
