"""Reading DCP's metadata file: half of the codec (see `metadata_codec`).

Reading never runs what the pickle asks for: the classes it names are stood in for by throw-away records, and only what
has the right shape becomes a `Metadata`.
"""

from __future__ import annotations

import functools
import io
import pathlib
import pickle
import reprlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
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
from .pickle_memo import check_memo

__all__ = ["MetadataError", "load_metadata"]

_MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
_DCP_METADATA = "torch.distributed.checkpoint.metadata"
# Where PyTorch before 2.3 had the tensor properties of DCP.
_SHARDED_METADATA = "torch.distributed._shard.sharded_tensor.metadata"
_DCP_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_LAYOUTS = {str(layout): layout for layout in vars(torch).values() if isinstance(layout, torch.layout)}
_ATOMS = frozenset((str, int))
_CONTAINERS = (tuple, list, dict, OrderedDict, set, frozenset)
_INDEX_FIELDS = {"fqn", "offset", "index"}
_STORAGE_INFO_FIELDS = {"relative_path", "offset", "length", "transform_descriptors"}


class MetadataError(ValueError):
    """Metadata that is damaged, hostile, or that contradicts itself."""


@gc_paused()
def load_metadata(raw: bytes, *, trusted_classes: Sequence[type] = ()) -> Metadata:
    """Return the `Metadata` stored in `raw`; nothing that the pickle names is ever called, save plain constructors.

    Equal chunks are one object, whoever wrote the file: where many tensors are cut in the same way, that can be told
    without comparing numbers.

    Args:
        raw: content of a `.metadata` file, from this package or from torch.
        trusted_classes: further classes that may appear, for planners that store their own in `planner_data`.

    Raises:
        MetadataError: the pickle is damaged, or asks for anything outside DCP's data types.
    """
    unpickler = _RestrictedUnpickler(io.BytesIO(raw), trusted_classes)
    try:
        check_memo(raw)
        record = unpickler.load()
        metadata = _Rebuilt().value(record)
    except MetadataError:
        raise
    except Exception as error:
        raise MetadataError(f"Expected a DCP metadata pickle but got unreadable bytes: {error}.") from error
    if not isinstance(metadata, Metadata):
        raise MetadataError(f"Expected a DCP metadata pickle but got a {type(metadata).__name__}.")
    return metadata


class _Record:
    """Stands in for one of DCP's classes while a pickle is read: it has fields, and no behaviour.

    Each load makes its own subclasses, because a pickle may set attributes on a class that it names.
    """

    real: type


class _StatefulRecord(_Record):
    """Stands in for a class whose state is no dict of fields."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves the few globals that DCP metadata consists of, and refuses any other."""

    def __init__(self, stream: io.BytesIO, trusted_classes: Sequence[type]) -> None:
        super().__init__(stream)
        self._known: dict[tuple[str, str], Any] = {
            (module, real.__name__): type(
                real.__name__, (_StatefulRecord if real is TensorProperties else _Record,), {"real": real}
            )
            for module, real in _CLASSES
        }
        self._known |= {(cls.__module__, cls.__qualname__): cls for cls in trusted_classes}
        self._known |= {
            ("torch", "Size"): torch.Size,
            ("torch.serialization", "_get_layout"): lambda name: _LAYOUTS[name],
            (_DCP_METADATA, "_MEM_FORMAT_ENCODING"): lambda number: _MEMORY_FORMATS[number],
            (_SHARDED_METADATA, "MEM_FORMAT_ENCODING"): lambda number: _MEMORY_FORMATS[number],
            ("collections", "OrderedDict"): OrderedDict,
            ("builtins", "set"): set,
            ("builtins", "frozenset"): frozenset,
            ("builtins", "complex"): complex,
        }
        # The name under which a path pickles tells the Python version and the system that wrote it.
        native = type(pathlib.Path())
        for module in ("pathlib", "pathlib._local"):
            for name, pure in (
                ("PosixPath", pathlib.PurePosixPath),
                ("WindowsPath", pathlib.PureWindowsPath),
            ):
                self._known[module, name] = functools.partial(native if issubclass(native, pure) else pure)
                self._known[module, f"Pure{name}"] = functools.partial(pure)

    def find_class(self, module: str, name: str) -> Any:
        known = self._known.get((module, name))
        if known is not None:
            return known
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise MetadataError(
            f"Expected only DCP's data types in a metadata pickle but got global={module + '.' + name!r}. "
            "Do not load checkpoints from a source you do not trust; name your own classes in trusted_classes."
        )

    def persistent_load(self, pid: Any) -> Any:
        raise MetadataError(f"Expected no persistent ids in a metadata pickle but got {pid!r}.")


class _Rebuilt:
    """Turns records into the objects they stand for, once each of their fields is what it must be.

    A record whose fields are all in order becomes the object itself, by a change of its class.
    """

    def __init__(self) -> None:
        self._sizes: dict[torch.Size, torch.Size] = {}
        self._chunks: dict[tuple[torch.Size, torch.Size], ChunkStorageMetadata] = {}
        self._known_chunks: dict[int, ChunkStorageMetadata] = {}  # by the id of their records, which stay alive
        self._known_properties: dict[int, TensorProperties] = {}  # likewise
        self._containers: dict[int, tuple[Any, Any]] = {}  # by id, with the container itself, so that it stays alive

    def value(self, value: Any) -> Any:
        """Return `value` with every record replaced by the object it stands for."""
        kind = type(value)
        if kind is str or kind is int:
            return value
        if kind is tuple and _ATOMS.issuperset(map(type, value)):
            return value
        if issubclass(kind, _Record):
            return _BUILDERS[kind.real](self, value)
        if kind not in _CONTAINERS:
            return value
        # Each container once, however often it is named: a few lists that hold each other twice may stand for millions.
        known = self._containers.get(id(value))
        if known is None:
            known = self._containers[id(value)] = (value, self._container(kind, value))
        return known[1]

    def _container(self, kind: Any, value: Any) -> Any:
        if kind is dict or kind is OrderedDict:
            return kind([(self.value(key), self.value(entry)) for key, entry in value.items()])
        return kind([self.value(entry) for entry in value])

    def size(self, value: Any) -> torch.Size:
        found = self._sizes.get(value) if type(value) is torch.Size else None
        if found is None:
            _expect(
                isinstance(value, torch.Size | tuple | list) and all(type(n) is int and n >= 0 for n in value),
                "a size",
                value,
            )
            found = torch.Size(value)
            self._sizes[found] = found
        return found

    def chunk(self, record: Any) -> ChunkStorageMetadata:
        found = self._known_chunks.get(id(record))
        if found is None:
            fields = _fields(record, ChunkStorageMetadata, "chunks")
            parts = (self.size(fields.get("offsets")), self.size(fields.get("sizes")))
            found = self._chunks.get(parts)
            if found is None:
                found = self._chunks[parts] = ChunkStorageMetadata(*parts)
            self._known_chunks[id(record)] = found
        return found

    def properties(self, record: Any) -> TensorProperties:
        known = self._known_properties.get(id(record))
        if known is None:
            state: Any = _fields(record, TensorProperties, "tensor properties").get("state")
            _expect(isinstance(state, tuple) and len(state) == 5, "tensor properties", state)
            dtype, layout, requires_grad, memory_format, pin_memory = state
            _expect(isinstance(dtype, torch.dtype), "a dtype", dtype)
            _expect(isinstance(layout, torch.layout), "a layout", layout)
            _expect(isinstance(memory_format, torch.memory_format), "a memory format", memory_format)
            known = TensorProperties(dtype, layout, bool(requires_grad), memory_format, bool(pin_memory))
            self._known_properties[id(record)] = known
        properties = TensorProperties.__new__(TensorProperties)
        properties.__dict__.update(known.__dict__)
        return properties

    def tensor(self, record: Any) -> TensorStorageMetadata:
        fields = _fields(record, TensorStorageMetadata, "tensor metadata")
        chunks: Any = fields.get("chunks")
        _expect(isinstance(chunks, list), "chunks", chunks)
        return TensorStorageMetadata(
            self.properties(fields.get("properties")), self.size(fields.get("size")), list(map(self.chunk, chunks))
        )

    def index(self, record: Any) -> MetadataIndex:
        fields = _fields(record, MetadataIndex, "an index")
        offset, hint = fields.get("offset"), fields.get("index")
        if offset is not None:
            fields["offset"] = self.size(offset)
        is_sound = type(fields.get("fqn")) is str and (hint is None or type(hint) is int)
        if not is_sound or not fields.keys() <= _INDEX_FIELDS:
            _expect(False, "an index", fields)
        record.__class__ = MetadataIndex
        index: MetadataIndex = record
        return index

    def storage_info(self, record: Any) -> _StorageInfo:
        fields = _fields(record, _StorageInfo, "a place in storage")
        offset, length = fields.get("offset"), fields.get("length")
        descriptors = fields.get("transform_descriptors")
        is_place = type(offset) is int and type(length) is int and offset >= 0 and length >= 0
        if not is_place or type(fields.get("relative_path")) is not str or not fields.keys() <= _STORAGE_INFO_FIELDS:
            _expect(False, "a place in storage", fields)
        if descriptors is not None:
            _expect(
                isinstance(descriptors, list | tuple) and all(type(name) is str for name in descriptors),
                "names of extensions",
                descriptors,
            )
        record.__class__ = _StorageInfo
        info: _StorageInfo = record
        return info

    def storage_meta(self, record: Any) -> StorageMeta:
        fields = _fields(record, StorageMeta, "storage_meta")
        modules = self.value(fields.get("modules", []))
        _expect(isinstance(modules, list), "modules", modules)
        where = fields.get("checkpoint_id")
        _expect(where is None or isinstance(where, str | pathlib.PurePath), "a checkpoint id", where)
        return StorageMeta(where, self.value(fields.get("save_id")), self.value(fields.get("load_id")), modules)

    def metadata(self, record: Any) -> Metadata:
        fields = _fields(record, Metadata, "metadata")
        entries = self.value(fields.get("state_dict_metadata"))
        _expect(
            isinstance(entries, Mapping)
            and all(isinstance(k, str) for k in entries)
            and all(isinstance(v, TensorStorageMetadata | BytesStorageMetadata) for v in entries.values()),
            "state_dict_metadata",
            entries,
        )
        version = fields.get("version")
        _expect(version is None or isinstance(version, str), "a version", version)
        storage_meta = self.value(fields.get("storage_meta"))
        _expect(storage_meta is None or isinstance(storage_meta, StorageMeta), "storage_meta", storage_meta)
        return Metadata(
            state_dict_metadata=dict(entries),
            planner_data=self.value(fields.get("planner_data")),
            storage_data=self.value(fields.get("storage_data")),
            storage_meta=storage_meta,
            version=version,
        )

    def prefix(self, record: Any) -> _StoragePrefix:
        prefix: Any = _fields(record, _StoragePrefix, "a prefix").get("prefix")
        _expect(isinstance(prefix, str), "a string", prefix)
        return _StoragePrefix(prefix)


def _fields(record: Any, real: type, what: str) -> dict[str, Any]:
    """Return the fields of a record that stands for a `real`; or those that such a record has become already."""
    kind = type(record)
    if kind is not real and getattr(kind, "real", None) is not real:
        _expect(False, what, record)
    fields: dict[str, Any] = record.__dict__
    return fields


def _expect(holds: bool, what: str, value: Any) -> None:
    if not holds:
        raise MetadataError(f"Expected {what} in a metadata pickle but got {_shorten(value)}. The file is damaged.")


def _shorten(value: Any) -> str:
    text = reprlib.repr(value)  # bounded before it is written, not after
    return text if len(text) <= 200 else text[:200] + "…"


_CLASSES = [
    (_DCP_METADATA, Metadata),
    (_DCP_METADATA, TensorStorageMetadata),
    (_DCP_METADATA, BytesStorageMetadata),
    (_DCP_METADATA, ChunkStorageMetadata),
    (_DCP_METADATA, TensorProperties),
    (_SHARDED_METADATA, TensorProperties),
    (_DCP_METADATA, MetadataIndex),
    (_DCP_METADATA, StorageMeta),
    (_DCP_FILESYSTEM, _StorageInfo),
    (_DCP_FILESYSTEM, _StoragePrefix),
]
_BUILDERS: dict[type, Any] = {
    Metadata: _Rebuilt.metadata,
    TensorStorageMetadata: _Rebuilt.tensor,
    BytesStorageMetadata: lambda *_: BytesStorageMetadata(),
    ChunkStorageMetadata: _Rebuilt.chunk,
    TensorProperties: _Rebuilt.properties,
    MetadataIndex: _Rebuilt.index,
    StorageMeta: _Rebuilt.storage_meta,
    _StorageInfo: _Rebuilt.storage_info,
    _StoragePrefix: _Rebuilt.prefix,
}
