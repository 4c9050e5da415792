"""The safe codec of DCP's metadata file.

`.metadata` is a pickle of torch's data classes. Reading here never runs what the pickle asks for: the classes it names
are stood in for by throw-away records, and only what has the right shape becomes a `Metadata`.
"""

from __future__ import annotations

import functools
import io
import pathlib
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
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

__all__ = ["MetadataError", "dump_metadata", "load_metadata"]

_PICKLE_PROTOCOL = 4
_MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
_PLAIN_CLASSES = (int, float, complex, bool, bytes, type(None), torch.dtype, _StoragePrefix)
_DCP_METADATA = "torch.distributed.checkpoint.metadata"
# Where PyTorch before 2.3 had the tensor properties of DCP.
_SHARDED_METADATA = "torch.distributed._shard.sharded_tensor.metadata"
_DCP_FILESYSTEM = "torch.distributed.checkpoint.filesystem"


class MetadataError(ValueError):
    """Metadata that is damaged, hostile, or that contradicts itself."""


def dump_metadata(metadata: Metadata, *, trusted_classes: Sequence[type] = ()) -> bytes:
    """Return the bytes of a `.metadata` file, which torch's FileSystemReader loads too.

    Equal metadata gives equal bytes: a pickle depends on which of its equal parts are one object, so the object graph
    is rebuilt first with that settled.

    Raises:
        MetadataError: some part (usually a planner's own `planner_data`) would be refused on loading.
    """
    interned = _Interned(trusted_classes)
    canonical = Metadata(
        state_dict_metadata={
            interned(fqn): _canonical(entry, interned) for fqn, entry in metadata.state_dict_metadata.items()
        },
        planner_data=_canonical(metadata.planner_data, interned),
        storage_data=_canonical(metadata.storage_data, interned),
        storage_meta=_canonical(metadata.storage_meta, interned),
        version=metadata.version,
    )
    return pickle.dumps(canonical, protocol=_PICKLE_PROTOCOL)


def load_metadata(raw: bytes, *, trusted_classes: Sequence[type] = ()) -> Metadata:
    """Return the `Metadata` stored in `raw`; nothing that the pickle names is ever called, save plain constructors.

    Args:
        raw: content of a `.metadata` file, from this package or from torch.
        trusted_classes: further classes that may appear, for planners that store their own in `planner_data`.

    Raises:
        MetadataError: the pickle is damaged, or asks for anything outside DCP's data types.
    """
    unpickler = _RestrictedUnpickler(io.BytesIO(raw), trusted_classes)
    try:
        record = unpickler.load()
        metadata = _real(record)
    except MetadataError:
        raise
    except Exception as error:
        raise MetadataError(f"Expected a DCP metadata pickle but got unreadable bytes: {error}.") from error
    if not isinstance(metadata, Metadata):
        raise MetadataError(f"Expected a DCP metadata pickle but got a {type(metadata).__name__}.")
    return metadata


# Writing.


class _Interned:
    """Makes equal strings and sizes one object each, and knows which other values may be stored."""

    def __init__(self, trusted_classes: Sequence[type]) -> None:
        self._seen: dict[Any, Any] = {}
        self.storable = {*_PLAIN_CLASSES, *trusted_classes}

    def __call__(self, value: Any) -> Any:
        return self._seen.setdefault((type(value), value), value)


def _canonical(value: Any, interned: _Interned) -> Any:
    if type(value) in (str, torch.Size):
        return interned(value)
    if type(value) is TensorStorageMetadata:
        properties = TensorProperties.__new__(TensorProperties)
        properties.__dict__.update(value.properties.__dict__)
        chunks = [
            ChunkStorageMetadata(_canonical(c.offsets, interned), _canonical(c.sizes, interned)) for c in value.chunks
        ]
        return TensorStorageMetadata(properties, _canonical(torch.Size(value.size), interned), chunks)
    if type(value) is BytesStorageMetadata:
        return BytesStorageMetadata()
    if type(value) is MetadataIndex:
        return MetadataIndex(interned(value.fqn), _canonical(value.offset, interned), value.index)
    if type(value) is _StorageInfo:
        return _StorageInfo(interned(value.relative_path), value.offset, value.length, value.transform_descriptors)
    if type(value) is StorageMeta:
        # A path pickles under a name that differs between Python versions; its text does not.
        where = value.checkpoint_id
        return StorageMeta(None if where is None else str(where), value.save_id, value.load_id, list(value.modules))
    if type(value) is dict:
        return {_canonical(key, interned): _canonical(entry, interned) for key, entry in value.items()}
    if type(value) is list:
        return [_canonical(entry, interned) for entry in value]
    if type(value) is tuple:
        return tuple(_canonical(entry, interned) for entry in value)
    if type(value) in (OrderedDict, set, frozenset) or type(value) in interned.storable:
        return value
    raise MetadataError(
        f"Expected plain data in the metadata but got a {type(value).__module__}.{type(value).__qualname__}, which "
        "could not be loaded again. Name its class in trusted_classes, for writer and reader."
    )


# Reading.


class _Record:
    """Stands in for one of DCP's classes while a pickle is read: it has fields, and no behaviour.

    Each load makes its own subclasses, because a pickle may set attributes on a class that it names.
    """

    build: Callable[[Any], Any]
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        # Kept whole, not as attributes: a pickle that names a field `build` must not reach the class's own.
        self.state = state


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves the few globals that DCP metadata consists of, and refuses any other."""

    def __init__(self, stream: io.BytesIO, trusted_classes: Sequence[type]) -> None:
        super().__init__(stream)
        self._known: dict[tuple[str, str], Any] = {
            key: type(key[1], (_Record,), {"build": staticmethod(build)}) for key, build in _BUILDERS.items()
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


_LAYOUTS = {str(layout): layout for layout in vars(torch).values() if isinstance(layout, torch.layout)}


def _real(value: Any) -> Any:
    """Return `value` with every record replaced by the object it stands for."""
    if isinstance(value, _Record):
        return type(value).build(value.state)
    if type(value) is dict or type(value) is OrderedDict:
        return type(value)((_real(key), _real(entry)) for key, entry in value.items())
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_real(entry) for entry in value)
    return value


def _fields(state: Any) -> dict[str, Any]:
    if isinstance(state, tuple) and len(state) == 2 and state[0] is None:
        state = state[1]
    if state is None:
        return {}
    _expect(isinstance(state, dict), "fields", state)
    fields: dict[str, Any] = state
    return fields


def _expect(holds: bool, what: str, value: Any) -> None:
    if not holds:
        raise MetadataError(f"Expected {what} in a metadata pickle but got {_shorten(value)}. The file is damaged.")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


def _size(value: Any) -> torch.Size:
    _expect(
        isinstance(value, torch.Size | tuple | list) and all(type(n) is int and n >= 0 for n in value), "a size", value
    )
    return torch.Size(value)


def _text(value: Any) -> str:
    _expect(isinstance(value, str), "a string", value)
    return str(value)


def _build_chunk(state: Any) -> ChunkStorageMetadata:
    fields = _fields(state)
    return ChunkStorageMetadata(_size(fields.get("offsets")), _size(fields.get("sizes")))


def _build_properties(state: Any) -> TensorProperties:
    _expect(isinstance(state, tuple) and len(state) == 5, "tensor properties", state)
    dtype, layout, requires_grad, memory_format, pin_memory = state
    _expect(isinstance(dtype, torch.dtype), "a dtype", dtype)
    _expect(isinstance(layout, torch.layout), "a layout", layout)
    _expect(isinstance(memory_format, torch.memory_format), "a memory format", memory_format)
    return TensorProperties(dtype, layout, bool(requires_grad), memory_format, bool(pin_memory))


def _build_tensor(state: Any) -> TensorStorageMetadata:
    fields = _fields(state)
    properties, chunks = _real(fields.get("properties")), _real(fields.get("chunks"))
    _expect(isinstance(properties, TensorProperties), "tensor properties", properties)
    _expect(
        isinstance(chunks, list) and all(isinstance(c, ChunkStorageMetadata) for c in chunks),
        "chunks",
        chunks,
    )
    return TensorStorageMetadata(properties, _size(fields.get("size")), chunks)


def _build_index(state: Any) -> MetadataIndex:
    fields = _fields(state)
    offset, index = fields.get("offset"), fields.get("index")
    _expect(index is None or type(index) is int, "an index hint", index)
    return MetadataIndex(_text(fields.get("fqn")), None if offset is None else _size(offset), index)


def _build_storage_info(state: Any) -> _StorageInfo:
    fields = _fields(state)
    offset: Any = fields.get("offset")
    length: Any = fields.get("length")
    _expect(type(offset) is int and offset >= 0, "a file offset", offset)
    _expect(type(length) is int and length >= 0, "a length", length)
    descriptors = _real(fields.get("transform_descriptors"))
    return _StorageInfo(_text(fields.get("relative_path")), offset, length, descriptors)


def _build_storage_meta(state: Any) -> StorageMeta:
    fields = _fields(state)
    modules = fields.get("modules", [])
    _expect(isinstance(modules, list), "modules", modules)
    where = fields.get("checkpoint_id")
    _expect(where is None or isinstance(where, str | pathlib.PurePath), "a checkpoint id", where)
    return StorageMeta(where, fields.get("save_id"), fields.get("load_id"), modules)


def _build_metadata(state: Any) -> Metadata:
    fields = _fields(state)
    entries = _real(fields.get("state_dict_metadata"))
    _expect(
        isinstance(entries, Mapping)
        and all(isinstance(k, str) for k in entries)
        and all(isinstance(v, TensorStorageMetadata | BytesStorageMetadata) for v in entries.values()),
        "state_dict_metadata",
        entries,
    )
    version = fields.get("version")
    _expect(version is None or isinstance(version, str), "a version", version)
    storage_meta = _real(fields.get("storage_meta"))
    _expect(storage_meta is None or isinstance(storage_meta, StorageMeta), "storage_meta", storage_meta)
    return Metadata(
        state_dict_metadata=dict(entries),
        planner_data=_real(fields.get("planner_data")),
        storage_data=_real(fields.get("storage_data")),
        storage_meta=storage_meta,
        version=version,
    )


_BUILDERS: dict[tuple[str, str], Callable[[Any], Any]] = {
    (_DCP_METADATA, "Metadata"): _build_metadata,
    (_DCP_METADATA, "TensorStorageMetadata"): _build_tensor,
    (_DCP_METADATA, "BytesStorageMetadata"): lambda _: BytesStorageMetadata(),
    (_DCP_METADATA, "ChunkStorageMetadata"): _build_chunk,
    (_DCP_METADATA, "TensorProperties"): _build_properties,
    (_SHARDED_METADATA, "TensorProperties"): _build_properties,
    (_DCP_METADATA, "MetadataIndex"): _build_index,
    (_DCP_METADATA, "StorageMeta"): _build_storage_meta,
    (_DCP_FILESYSTEM, "_StorageInfo"): _build_storage_info,
    (_DCP_FILESYSTEM, "_StoragePrefix"): lambda state: _StoragePrefix(_text(_fields(state).get("prefix"))),
}
