"""The safe codec of DCP's metadata file: `dump_metadata` here, `load_metadata` in `metadata_reading`.

`.metadata` is a pickle of torch's data classes.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .gc_pause import gc_paused
from .indices import new_index
from .metadata_reading import MetadataError, load_metadata

__all__ = ["MetadataError", "dump_metadata", "load_metadata"]

_PICKLE_PROTOCOL = 4
_PLAIN_CLASSES = (int, float, complex, bool, bytes, type(None), torch.dtype, _StoragePrefix)


@gc_paused()
def dump_metadata(metadata: Metadata, *, trusted_classes: Sequence[type] = ()) -> bytes:
    """Return the bytes of a `.metadata` file, which torch's FileSystemReader loads too.

    Equal metadata gives equal bytes: a pickle depends on which of its equal parts are one object, so the object graph
    is rebuilt first with that settled. Equal strings, sizes, chunks and tensor properties become one object each, which
    makes the file small where many tensors are cut in the same way.

    Raises:
        MetadataError: some part (usually a planner's own `planner_data`) would be refused on loading.
    """
    shared = _Shared(trusted_classes)
    canonical = Metadata(
        state_dict_metadata={
            shared.text(fqn): shared.entry(entry) for fqn, entry in metadata.state_dict_metadata.items()
        },
        planner_data=shared.value(metadata.planner_data),
        storage_data=shared.value(metadata.storage_data),
        storage_meta=shared.value(metadata.storage_meta),
        version=metadata.version,
    )
    return pickle.dumps(canonical, protocol=_PICKLE_PROTOCOL)


class _Shared:
    """Rebuilds values from parts of which there is one object each, and knows which values may be stored."""

    def __init__(self, trusted_classes: Sequence[type]) -> None:
        self._texts: dict[str, str] = {}
        self._sizes: dict[torch.Size, torch.Size] = {}
        self._chunks: dict[tuple[torch.Size, torch.Size], ChunkStorageMetadata] = {}
        self._properties: dict[tuple[Any, ...], TensorProperties] = {}
        self._storable = {*_PLAIN_CLASSES, *trusted_classes}

    def text(self, value: str) -> str:
        return self._texts.setdefault(value, value)

    def size(self, value: Sequence[int]) -> torch.Size:
        size = value if type(value) is torch.Size else torch.Size(value)
        return self._sizes.setdefault(size, size)

    def entry(self, value: Any) -> Any:
        if type(value) is not TensorStorageMetadata:
            return self.value(value)
        return TensorStorageMetadata(
            self.properties(value.properties), self.size(value.size), [self.chunk(chunk) for chunk in value.chunks]
        )

    def chunk(self, value: ChunkStorageMetadata) -> ChunkStorageMetadata:
        parts = (self.size(value.offsets), self.size(value.sizes))
        found = self._chunks.get(parts)
        if found is None:
            found = self._chunks[parts] = ChunkStorageMetadata(*parts)
        return found

    def properties(self, value: TensorProperties) -> TensorProperties:
        fields = vars(value)
        key = tuple(fields.values())
        found = self._properties.get(key)
        if found is None:
            found = self._properties[key] = TensorProperties.__new__(TensorProperties)
            vars(found).update(fields)
        return found

    def value(self, value: Any) -> Any:
        kind = type(value)
        if kind is str:
            return self.text(value)
        if kind is MetadataIndex:
            offset = value.offset
            return new_index(self.text(value.fqn), None if offset is None else self.size(offset), value.index)
        if kind is _StorageInfo:
            names = value.transform_descriptors
            descriptors = None if names is None else self.value(names)
            return _StorageInfo(self.text(value.relative_path), value.offset, value.length, descriptors)
        if kind in (dict, OrderedDict):
            return kind((self.value(key), self.value(entry)) for key, entry in value.items())
        if kind in (tuple, list, set, frozenset):
            return kind(self.value(entry) for entry in value)
        if kind is torch.Size:
            return self.size(value)
        if kind is TensorStorageMetadata:
            return self.entry(value)
        if kind is BytesStorageMetadata:
            return BytesStorageMetadata()
        if kind is StorageMeta:
            # A path pickles under a name that differs between Python versions; its text does not.
            where = value.checkpoint_id
            return StorageMeta(None if where is None else str(where), value.save_id, value.load_id, list(value.modules))
        if kind in self._storable:
            return value
        raise MetadataError(
            f"Expected plain data in the metadata but got a {kind.__module__}.{kind.__qualname__}, which "
            "could not be loaded again. Name its class in trusted_classes, for writer and reader."
        )
