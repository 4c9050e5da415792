"""Messages as bytes. Plans, results and metadata travel as rows of plain values.

They are what ranks mostly send each other: thousands of small objects, of which each costs a pickle several times what
its few numbers do. Whatever is not of the plainest kind is pickled as it is.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections import ChainMap
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from .indices import new_index

__all__ = ["WriteResults", "dumps"]

Row = tuple[Any, ...]
_WRITE_TYPES = {kind.value: kind for kind in WriteItemType}
_LOAD_TYPES = {kind.value: kind for kind in LoadItemType}


def dumps(message: Any) -> bytes:
    """Return the bytes of `message`, which `pickle.loads` turns into an equal one."""
    stream = io.BytesIO()
    _Pickler(stream, pickle.DEFAULT_PROTOCOL).dump(message)
    return stream.getvalue()


class WriteResults(list[WriteResult]):
    """A list of results that travels as rows."""

    def __reduce__(self) -> Any:
        try:
            return _results, ([_result_row(result) for result in self],)
        except _PlainOnly:
            return list, (list(self),)


class _PlainOnly(Exception):
    """Something is not of the plainest kind."""


class _Properties:
    """The different properties of some tensors, and their positions: most tensors share theirs."""

    def __init__(self) -> None:
        self.known: list[TensorProperties] = []
        self._positions: dict[Row, int] = {}

    def position(self, properties: TensorProperties) -> int:
        _expect(type(properties) is TensorProperties)
        key = tuple(vars(properties).values())
        found = self._positions.get(key)
        if found is None:
            found = self._positions[key] = len(self.known)
            self.known.append(properties)
        return found


class _Sizes(dict[tuple[int, ...], torch.Size]):
    """Sizes by their numbers; None for None."""

    def __missing__(self, numbers: tuple[int, ...] | None) -> torch.Size | None:
        if numbers is None:
            return None
        size = self[numbers] = torch.Size(numbers)
        return size


def _expect(is_plain: bool) -> None:
    if not is_plain:
        raise _PlainOnly


def _copied(properties: TensorProperties) -> TensorProperties:
    copied = TensorProperties.__new__(TensorProperties)
    copied.__dict__.update(properties.__dict__)
    return copied


def _index_row(index: MetadataIndex) -> Row:
    _expect(type(index) is MetadataIndex)
    return index.fqn, None if index.offset is None else tuple(index.offset), index.index


def _result_row(result: Any) -> Row:
    _expect(type(result) is WriteResult)
    return (*_index_row(result.index), result.size_in_bytes, *_info_row(result.storage_data))


def _info_row(info: Any) -> Row:
    _expect(type(info) is _StorageInfo)
    return info.relative_path, info.offset, info.length, info.transform_descriptors


def _write_row(item: Any, properties: _Properties) -> Row:
    _expect(type(item) is WriteItem and item.bytes_io_data is None)
    data = item.tensor_data
    if data is None:
        return (*_index_row(item.index), item.type.value)
    chunk, size = data.chunk, data.size
    _expect(type(data) is TensorWriteData and type(chunk) is ChunkStorageMetadata)
    offsets, sizes = chunk.offsets, chunk.sizes
    _expect(type(offsets) is type(sizes) is type(size) is torch.Size)
    position = properties.position(data.properties)
    return (*_index_row(item.index), item.type.value, tuple(offsets), tuple(sizes), tuple(size), position)


def _write_item(row: Row, properties: list[TensorProperties], sizes: _Sizes) -> WriteItem:
    fqn, offset, hint, kind, *data = row
    index = new_index(fqn, sizes[offset], hint)
    if not data:
        return WriteItem(index, _WRITE_TYPES[kind])
    chunk = ChunkStorageMetadata(sizes[data[0]], sizes[data[1]])
    tensor_data = TensorWriteData(chunk, _copied(properties[data[3]]), sizes[data[2]])
    return WriteItem(index, _WRITE_TYPES[kind], None, tensor_data)


def _read_row(item: Any) -> Row:
    offsets, saved_offsets, lengths = item.dest_offsets, item.storage_offsets, item.lengths
    _expect(type(item) is ReadItem and type(offsets) is type(saved_offsets) is type(lengths) is torch.Size)
    return (
        item.type.value,
        *_index_row(item.dest_index),
        tuple(offsets),
        *_index_row(item.storage_index),
        tuple(saved_offsets),
        tuple(lengths),
    )


def _read_item(row: Row, sizes: _Sizes) -> ReadItem:
    kind, fqn, offset, hint, dest_offsets, saved_fqn, saved_offset, saved_hint, storage_offsets, lengths = row
    return ReadItem(
        _LOAD_TYPES[kind],
        new_index(fqn, sizes[offset], hint),
        sizes[dest_offsets],
        new_index(saved_fqn, sizes[saved_offset], saved_hint),
        sizes[storage_offsets],
        sizes[lengths],
    )


def _entry_row(entry: Any, properties: _Properties) -> Row:
    if type(entry) is BytesStorageMetadata:
        return ()
    _expect(type(entry) is TensorStorageMetadata)
    _expect(set(map(type, entry.chunks)) <= {ChunkStorageMetadata})
    chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    return properties.position(entry.properties), tuple(entry.size), chunks


def _entry(row: Row, properties: list[TensorProperties], sizes: _Sizes) -> TensorStorageMetadata | BytesStorageMetadata:
    if not row:
        return BytesStorageMetadata()
    chunks = [ChunkStorageMetadata(sizes[offsets], sizes[extent]) for offsets, extent in row[2]]
    return TensorStorageMetadata(_copied(properties[row[0]]), sizes[row[1]], chunks)


def _reduce_save_plan(plan: SavePlan) -> Any:
    properties = _Properties()
    try:
        rows = [_write_row(item, properties) for item in plan.items]
    except _PlainOnly:
        return plan.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
    return _save_plan, (rows, properties.known, vars(plan) | {"items": None})


def _save_plan(rows: Iterable[Row], properties: list[TensorProperties], fields: dict[str, Any]) -> SavePlan:
    sizes = _Sizes()
    plan = SavePlan.__new__(SavePlan)
    plan.__dict__.update(fields, items=[_write_item(row, properties, sizes) for row in rows])
    return plan


def _reduce_load_plan(plan: LoadPlan) -> Any:
    try:
        rows = [_read_row(item) for item in plan.items]
    except _PlainOnly:
        return plan.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
    return _load_plan, (rows, vars(plan) | {"items": None})


def _load_plan(rows: Iterable[Row], fields: dict[str, Any]) -> LoadPlan:
    sizes = _Sizes()
    plan = LoadPlan.__new__(LoadPlan)
    plan.__dict__.update(fields, items=[_read_item(row, sizes) for row in rows])
    return plan


def _reduce_metadata(metadata: Metadata) -> Any:
    properties = _Properties()
    stored = metadata.storage_data
    try:
        entries = {fqn: _entry_row(entry, properties) for fqn, entry in metadata.state_dict_metadata.items()}
        _expect(type(stored) is dict)
        places = [(*_index_row(index), *_info_row(info)) for index, info in stored.items()]
    except _PlainOnly:
        return metadata.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
    return _metadata, (
        entries,
        properties.known,
        places,
        vars(metadata) | {"state_dict_metadata": None, "storage_data": None},
    )


def _metadata(
    entries: dict[str, Row], properties: list[TensorProperties], places: Iterable[Row], fields: dict[str, Any]
) -> Metadata:
    sizes = _Sizes()
    state_dict_metadata = {fqn: _entry(row, properties, sizes) for fqn, row in entries.items()}
    storage_data = {new_index(fqn, sizes[offset], hint): _StorageInfo(*info) for fqn, offset, hint, *info in places}
    metadata = Metadata.__new__(Metadata)
    metadata.__dict__.update(fields, state_dict_metadata=state_dict_metadata, storage_data=storage_data)
    return metadata


def _results(rows: Iterable[Row]) -> WriteResults:
    sizes = _Sizes()
    return WriteResults(
        WriteResult(new_index(fqn, sizes[offset], hint), num_bytes, _StorageInfo(*info))
        for fqn, offset, hint, num_bytes, *info in rows
    )


_REDUCTIONS: dict[type, Any] = {
    SavePlan: _reduce_save_plan,
    LoadPlan: _reduce_load_plan,
    Metadata: _reduce_metadata,
}


class _Pickler(pickle.Pickler):
    dispatch_table: Any = ChainMap(_REDUCTIONS, cast(Any, copyreg.dispatch_table))  # noqa: RUF012  as pickle has it
