"""Writing the items of one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlanner, TensorWriteData, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from .hf_commit import durable_file
from .hf_metadata import SHARDING_INFO
from .item_parts import narrowed
from .items import memory_of
from .safetensors_dtypes import stored_as
from .safetensors_header import encode_header
from .slabs import slabs
from .strict_json import SafetensorsError

__all__ = ["write_tensors"]

_STAGED_BYTES = 8 << 20


def write_tensors(path: Path, name: str, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    """Write `items` into a new file, make it durable, and return where each lies; on failure leave no file.

    The header comes first in the file and is made from the plan. If the planner hands over tensors of another dtype,
    the file is written once more, by what they were.

    Args:
        path: must not exist.
        name: of the file in results.
        items: tensors, each FQN once; resolved one at a time.
        planner: gives each item's tensor.

    Raises:
        SafetensorsError: the planner hands over something that the format cannot hold, or not the planned shape.
    """
    by_fqn = {item.index.fqn: item for item in items}
    with durable_file(path) as stream:
        dtypes = {fqn: _data_of(item).properties.dtype for fqn, item in by_fqn.items()}
        results = _write(stream, name, by_fqn, dtypes, planner)
        found = dict(dtypes)
        if results is None:
            results = _write(stream, name, by_fqn, dtypes, planner)
        if results is None:
            raise SafetensorsError(
                f"Expected tensors of the same dtypes each time but got {found} and then {dtypes} for {name!r}. "
                "Check the planner's resolve_data."
            )
    return results


def _write(
    stream: IO[bytes],
    name: str,
    items: Mapping[str, WriteItem],
    dtypes: dict[str, torch.dtype],
    planner: SavePlanner,
) -> list[WriteResult] | None:
    """Write the whole file by the given dtypes; if some were others, put those into `dtypes` and return None."""
    offsets = {fqn: {"saved_offsets": list(_data_of(item).chunk.offsets)} for fqn, item in items.items()}
    head, entries = encode_header(
        {fqn: stored_as(dtypes[fqn], _data_of(item).chunk.sizes) for fqn, item in items.items()},
        {SHARDING_INFO: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"},
    )
    stream.seek(0)
    stream.truncate()
    stream.write(head)
    results = []
    is_as_given = True
    for fqn, entry in entries.items():
        tensor = _resolve(items[fqn], planner)
        is_as_given = is_as_given and tensor.dtype == dtypes[fqn]
        dtypes[fqn] = tensor.dtype
        for block in _blocks(tensor):
            stream.write(block)
        length = entry.end - entry.begin
        results.append(WriteResult(items[fqn].index, length, _StorageInfo(name, len(head) + entry.begin, length)))
    return results if is_as_given else None


def _resolve(item: WriteItem, planner: SavePlanner) -> torch.Tensor:
    fqn, size = item.index.fqn, tuple(_data_of(item).chunk.sizes)
    data = planner.resolve_data(item)
    if not isinstance(data, torch.Tensor):
        raise SafetensorsError(
            f"Expected a tensor but got {fqn!r} as a {type(data).__name__}. Check the planner's resolve_data."
        )
    tensor = data.detach()
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        raise SafetensorsError(
            f"Expected a plain strided tensor but got {fqn!r} as a {type(tensor).__name__}, "
            f"layout={tensor.layout}, dtype={tensor.dtype}. Convert it before saving."
        )
    if tuple(tensor.size()) != size:
        raise SafetensorsError(
            f"Expected {fqn!r} in shape {size} but got {tuple(tensor.size())}. Check the planner's resolve_data."
        )
    return tensor


def _blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in row-major order: its memory, or bounded copies where the layout is another."""
    if tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        yield memory_of(tensor)
        return
    if tensor.itemsize == 1:
        tensor = tensor.view(torch.uint8)  # the same bytes; torch cannot transpose every dtype of one byte
    for offsets, sizes in slabs(tensor.size(), _STAGED_BYTES // tensor.itemsize):
        yield memory_of(narrowed(tensor, offsets, sizes).cpu().resolve_conj().resolve_neg().contiguous())


def _data_of(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data
