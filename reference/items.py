"""The bytes of one item: a `torch.save` zip at an offset of a `.distcp` file.

For one dtype and shape, everything in such a zip but the payload and its CRC is the same from item to item. So a tensor
is written as a computed head, the tensor's own memory, and a computed tail; and on reading, an item that starts with
the expected head needs no parsing. Any other item goes through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import ctypes
import functools
import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "CorruptItemError",
    "Frame",
    "frame_of",
    "load_tensor",
    "memory_of",
    "serialize_object",
    "verify_zip",
]

_ARCHIVE = "archive"
_ALIGNMENT = 64
_MAX_PAYLOAD_BYTES = 2**32 - 2**16
"""Beyond this a zip needs its 64-bit records."""

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_DESCRIPTOR = struct.Struct("<4s3L")
_CENTRAL_HEADER = struct.Struct("<4s6H3L5H2L")
_END_OF_DIRECTORY = struct.Struct("<4s4H2LH")
_END_OF_DIRECTORY_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_DESCRIPTOR_CRC_AT = 4
_CENTRAL_CRC_AT = 16
_FLAG_DESCRIPTOR = 0x0008
_FLAG_UTF8 = 0x0800

_LEGACY_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.complex128: torch.ComplexDoubleStorage,
    torch.complex64: torch.ComplexFloatStorage,
}
_UNTYPED_DTYPES = {
    getattr(torch, name)
    for name in (
        "float8_e5m2",
        "float8_e4m3fn",
        "float8_e5m2fnuz",
        "float8_e4m3fnuz",
        "float8_e8m0fnu",
        "float4_e2m1fn_x2",
        "bits8",
        "bits16",
        "bits1x8",
        "bits2x4",
        "bits4x2",
        "complex32",
        "uint16",
        "uint32",
        "uint64",
    )
    if hasattr(torch, name)
}


class CorruptItemError(ValueError):
    """An item whose bytes are not what was written."""


@dataclass(frozen=True)
class _Entry:
    """One record of the archive: what the zip directory says about it."""

    name: str
    crc: int
    num_bytes: int
    at: int

    def local_header(self) -> bytes:
        """The header in front of the content, padded so that the content is aligned."""
        name = self.name.encode()
        padding = -(self.at + _LOCAL_HEADER.size + len(name) + 4) % _ALIGNMENT
        extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        fixed = _LOCAL_HEADER.pack(b"PK\x03\x04", 0, self._flags, 0, 0, 0, 0, 0, 0, len(name), len(extra))
        return fixed + name + extra

    def descriptor(self) -> bytes:
        """The CRC and lengths behind the content; an empty record has none."""
        if not self.num_bytes:
            return b""
        return _DESCRIPTOR.pack(b"PK\x07\x08", self.crc, self.num_bytes, self.num_bytes)

    def central_header(self) -> bytes:
        """The record's line in the directory at the end."""
        name = self.name.encode()
        sums = (self.crc, self.num_bytes, self.num_bytes)
        return (
            _CENTRAL_HEADER.pack(b"PK\x01\x02", 0, 0, self._flags, 0, 0, 0, *sums, len(name), 0, 0, 0, 0, 0, self.at)
            + name
        )

    @property
    def _flags(self) -> int:
        return _FLAG_UTF8 | (_FLAG_DESCRIPTOR if self.num_bytes else 0)


@dataclass(frozen=True)
class Frame:
    """What surrounds the payload of a contiguous tensor of one dtype and shape.

    Args:
        head: the bytes before the payload.
        num_bytes: length of the payload; 0 for an empty tensor.
    """

    head: bytes
    num_bytes: int
    _leading: tuple[_Entry, ...]
    _payload_at: int

    @property
    def length(self) -> int:
        """Bytes of the whole item."""
        return len(self.head) + self.num_bytes + len(self._blank_tail[0])

    def tail(self, crc: int) -> bytes:
        """Return the bytes after a payload with this CRC-32."""
        return crc.to_bytes(4, "little").join(self._tail_parts)

    @functools.cached_property
    def _tail_parts(self) -> list[bytes]:
        """The tail without the CRC, cut where it belongs."""
        blank, positions = self._blank_tail
        begins = [0, *(position + 4 for position in positions)]
        return [blank[begin:end] for begin, end in zip(begins, [*positions, len(blank)], strict=True)]

    @functools.cached_property
    def _blank_tail(self) -> tuple[bytes, list[int]]:
        """The tail with a CRC of 0, and where in it the CRC belongs."""
        payload = _Entry(f"{_ARCHIVE}/data/0", 0, self.num_bytes, self._payload_at)
        out = bytearray(payload.descriptor())
        positions = [_DESCRIPTOR_CRC_AT] if out else []
        begin = len(self.head) + self.num_bytes
        entries = [*self._leading, payload]
        serialization_id = f"{zlib.crc32(self.head):040d}".encode()
        for name, content in (("version", b"3\n"), (".data/serialization_id", serialization_id)):
            entries.append(_append(out, name, content, begin))
        directory_at = begin + len(out)
        for entry in entries:
            if entry is payload:
                positions.append(len(out) + _CENTRAL_CRC_AT)
            out += entry.central_header()
        end = begin + len(out)
        count, directory_bytes = len(entries), end - directory_at
        out += _END_OF_DIRECTORY_64.pack(
            b"PK\x06\x06", 44, 0x31E, 45, 0, 0, count, count, directory_bytes, directory_at
        )
        out += _LOCATOR_64.pack(b"PK\x06\x07", 0, end, 1)
        out += _END_OF_DIRECTORY.pack(b"PK\x05\x06", 0, 0, count, count, directory_bytes, directory_at, 0)
        return bytes(out), positions

    @property
    def descriptor_bytes(self) -> int:
        """Bytes between the payload and what follows it: its CRC and lengths; none behind an empty tensor."""
        return _DESCRIPTOR.size if self.num_bytes else 0

    def descriptor(self, crc: int) -> bytes:
        """Return these bytes for a payload with this CRC-32."""
        return _DESCRIPTOR.pack(b"PK\x07\x08", crc, self.num_bytes, self.num_bytes) if self.num_bytes else b""


def frame_of(dtype: torch.dtype, size: Sequence[int]) -> Frame | None:
    """Return the frame of a contiguous tensor, byte for byte as `torch.save` lays it out (but for a random-looking id).

    None if only `torch.save` itself can write it: a quantized dtype, or more than 4 GiB.
    """
    return _frame_of(dtype, tuple(size))


@functools.lru_cache(maxsize=4096)
def _frame_of(dtype: torch.dtype, size: tuple[int, ...]) -> Frame | None:
    if dtype not in _LEGACY_STORAGES and dtype not in _UNTYPED_DTYPES:
        return None
    num_elements = 1
    for length in size:
        num_elements *= length
    num_bytes = num_elements * dtype.itemsize
    if num_bytes > _MAX_PAYLOAD_BYTES:
        return None
    out = bytearray()
    leading = tuple(
        _append(out, name, content, 0)
        for name, content in (
            ("data.pkl", _tensor_pickle(dtype, size, num_elements)),
            (".format_version", b"1"),
            (".storage_alignment", str(_ALIGNMENT).encode()),
            ("byteorder", b"little"),
        )
    )
    payload_at = len(out)
    out += _Entry(f"{_ARCHIVE}/data/0", 0, num_bytes, payload_at).local_header()
    return Frame(bytes(out), num_bytes, leading, payload_at)


def _append(out: bytearray, name: str, content: bytes, begin: int) -> _Entry:
    entry = _Entry(f"{_ARCHIVE}/{name}", zlib.crc32(content), len(content), begin + len(out))
    out += entry.local_header() + content + entry.descriptor()
    return entry


class _Storage:
    """Stands for the payload inside the pickle: `torch.load` meets a persistent id."""

    def __init__(self, kind: Any, num_elements: int) -> None:
        self.persistent_id = ("storage", kind, "0", "cpu", num_elements)


class _Rebuild:
    """Pickles as a call of `function(*args)` on loading."""

    def __init__(self, function: Any, args: tuple[Any, ...]) -> None:
        self._call = (function, args)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


class _TensorPickler(pickle._Pickler):
    """The pure-Python pickler, because its output (memo included) is the one that torch.save writes."""

    def persistent_id(self, obj: Any) -> Any:
        return obj.persistent_id if isinstance(obj, _Storage) else None


def _tensor_pickle(dtype: torch.dtype, size: tuple[int, ...], num_elements: int) -> bytes:
    stride = torch.empty(size, device="meta").stride()
    hooks: OrderedDict[str, Any] = OrderedDict()
    if dtype in _LEGACY_STORAGES:
        storage = _Storage(_LEGACY_STORAGES[dtype], num_elements)
        rebuild = _Rebuild(torch._utils._rebuild_tensor_v2, (storage, 0, size, stride, False, hooks))
    else:
        storage = _Storage(torch.UntypedStorage, num_elements * dtype.itemsize)
        rebuild = _Rebuild(torch._utils._rebuild_tensor_v3, (storage, 0, size, stride, False, hooks, dtype))
    out = io.BytesIO()
    _TensorPickler(out, protocol=2).dump(rebuild)
    return out.getvalue()


def memory_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy; writes go to the tensor.

    Args:
        tensor: of any dtype; a scalar gives `itemsize` bytes, an empty tensor none.
    """
    num_bytes = tensor.nbytes
    if not num_bytes:
        return memoryview(bytearray())
    # By its address: a view as numpy array, flat and of bytes, takes several times as long, which shows where tensors
    # are small; nor does every dtype have one.
    memory = _byte_array(num_bytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # alive for as long as its memory is in use
    return memoryview(memory).cast("B")


@functools.lru_cache(maxsize=4096)
def _byte_array(num_bytes: int) -> Any:
    return ctypes.c_char * num_bytes


def serialize_object(value: Any) -> io.BytesIO:
    """Return a BYTE_IO item: `torch.save` of any picklable object."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


def verify_zip(raw: bytes | bytearray | memoryview, what: str, *, check_crc: bool = True) -> None:
    """Check the CRC of every record of a zip.

    Bytes that are not a zip pass, since a planner may store what it likes; so does a zip without CRCs, as torch writes
    it if told to.

    Raises:
        CorruptItemError: a record's content does not match its CRC, the directory is damaged, or a record is
            compressed: `torch.save` compresses nothing, and a few KiB could stand for any number of GiB.
    """
    if bytes(raw[:4]) != b"PK\x03\x04":
        return
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            _refuse_compressed(archive, what)
            if not check_crc or not any(record.CRC for record in archive.infolist()):
                return  # written with torch.serialization.set_crc32_options(False)
            damaged = archive.testzip()
    except CorruptItemError:
        raise
    except (zipfile.BadZipFile, struct.error, EOFError, RuntimeError, ValueError) as error:
        raise CorruptItemError(f"Expected an intact item but got {what} unreadable: {error}.") from error
    if damaged is not None:
        raise CorruptItemError(f"Expected an intact item but got {what} with a wrong CRC in record {damaged!r}.")


def _refuse_compressed(archive: zipfile.ZipFile, what: str) -> None:
    for record in archive.infolist():
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise CorruptItemError(
                f"Expected records as they are but got {what} with record {record.filename!r} compressed, of "
                f"{record.file_size} bytes."
            )


def load_tensor(raw: bytes | bytearray | memoryview, what: str) -> torch.Tensor:
    """Return the tensor of an item in whatever form `torch.save` gave it: strided, expanded, conjugated, quantized.

    Raises:
        CorruptItemError: the bytes are no tensor.
    """
    try:
        value = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CorruptItemError(f"Expected a saved tensor but got {what} unreadable: {error}.") from error
    if not isinstance(value, torch.Tensor):
        raise CorruptItemError(f"Expected a saved tensor but got {what} holding a {type(value).__name__}.")
    return value.detach().resolve_conj().resolve_neg()
