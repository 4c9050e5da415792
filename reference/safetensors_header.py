"""The header of a safetensors file: its bytes, and what they must say before anything else in the file is believed.

A file is 8 bytes with the header's length (little-endian), a JSON object, and the tensors' bytes without a gap:

    {"__metadata__": {str: str}, name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

Source: the format's description in the README of huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .safetensors_dtypes import NUM_BITS, ORDER, num_bytes_of
from .strict_json import SafetensorsError, fault, parse_json, shorten

__all__ = ["Header", "TensorEntry", "encode_header", "parse_header", "read_header"]

MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors package sets; also ours for an index."""

MAX_DIM = 2**62
"""Above this, shapes and offsets are refused: sums of two still fit torch's own integers."""

_LENGTH_BYTES = 8
_ALIGNMENT = 8
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Args:
        dtype: the format's name, such as "BF16".
        shape: as the file has it; "F4" counts 4-bit elements, of which torch's dtype holds two in one.
        begin: first byte, counted from the end of the header.
        end: byte after the last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Args:
        tensors: by name, in the order of their bytes.
        metadata: free text by name.
        data_at: where in the file the tensors' bytes begin.
        num_file_bytes: of the whole file.
    """

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_at: int
    num_file_bytes: int


def encode_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Return a file's first bytes, and where each tensor goes, in the order in which they are to be written.

    With at most one key of metadata, these are the bytes that the safetensors package writes.

    Args:
        tensors: dtype name and shape, by name.
        metadata: free text by name; may be empty.

    Raises:
        SafetensorsError: a name that is reserved or not Unicode, a size that is no number of bytes, or too many names.
    """
    if _METADATA in tensors:
        raise SafetensorsError(f"Expected other names than {_METADATA!r} but got a tensor of that name. Rename it.")
    entries: dict[str, TensorEntry] = {}
    at = 0
    for name in sorted(tensors, key=lambda name: (-ORDER[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        end = at + num_bytes_of(dtype, shape, repr(name))
        entries[name] = TensorEntry(dtype, tuple(shape), at, end)
        at = end
    content: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        content[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.begin, entry.end)}
    try:
        raw = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise SafetensorsError(
            f"Expected names that are Unicode but got {error.object[error.start]!r} in one."
        ) from None
    raw += b" " * (-len(raw) % _ALIGNMENT)
    if len(raw) > MAX_HEADER_BYTES:
        raise SafetensorsError(
            f"Expected a header of at most {MAX_HEADER_BYTES} bytes but got {len(raw)}, for {len(tensors)} tensors. "
            "Spread them over more files."
        )
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw, entries


def read_header(path: Path) -> Header:
    """Return the checked header of a file.

    Raises:
        SafetensorsError: the file is not safetensors, or cut short.
    """
    with path.open("rb", buffering=0) as stream:
        num_file_bytes = os.fstat(stream.fileno()).st_size
        first = stream.read(_LENGTH_BYTES)
        if len(first) < _LENGTH_BYTES:
            raise fault(path.name, f"a header after {_LENGTH_BYTES} bytes of length", f"{num_file_bytes} bytes in all")
        num_header_bytes = int.from_bytes(first, "little")
        limit = min(MAX_HEADER_BYTES, num_file_bytes - _LENGTH_BYTES)
        if num_header_bytes > limit:
            raise fault(path.name, f"a header of at most {limit} bytes", f"a length of {num_header_bytes}")
        raw = bytearray()
        while len(raw) < num_header_bytes:
            more = stream.read(num_header_bytes - len(raw))
            if not more:
                raise fault(path.name, f"a header of {num_header_bytes} bytes", f"an end after {len(raw)}")
            raw += more
    return parse_header(bytes(raw), num_file_bytes, path.name)


def parse_header(raw: bytes, num_file_bytes: int, what: str) -> Header:
    """Return what a header says, if all of it holds: names once, sizes that fit dtypes, bytes used once and all.

    Args:
        raw: the JSON alone, without the length before it.
        num_file_bytes: of the whole file.
        what: names the file in errors.

    Raises:
        SafetensorsError: with the first thing that does not hold.
    """
    if not raw.startswith(b"{"):
        raise fault(what, "a header that begins with '{'", repr(raw[:16]))
    content = parse_json(raw, what)
    metadata = content.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fault(what, f"text by name in {_METADATA!r}", shorten(metadata))
    entries = {name: _entry(name, value, what) for name, value in content.items()}
    ordered = dict(sorted(entries.items(), key=lambda pair: (pair[1].begin, pair[1].end)))
    data_at = _LENGTH_BYTES + len(raw)
    at = 0
    for name, entry in ordered.items():
        if entry.begin != at:
            raise fault(what, f"tensors side by side, the next at byte {at}", f"{name!r} at {entry.begin}")
        at = entry.end
    if data_at + at != num_file_bytes:
        raise fault(what, f"{data_at + at} bytes, by its header", f"{num_file_bytes}. The file was cut or added to")
    return Header(ordered, metadata, data_at, num_file_bytes)


def _entry(name: str, value: Any, what: str) -> TensorEntry:
    value = value if isinstance(value, dict) else {}
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in NUM_BITS:
        raise fault(what, "a dtype of safetensors", f"dtype={shorten(dtype)} for {name!r}")
    if not _are_counts(shape):
        raise fault(what, "a shape of whole numbers", f"shape={shorten(shape)} for {name!r}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fault(what, "data_offsets [begin, end]", f"{shorten(offsets)} for {name!r}")
    begin, end = offsets
    num_bytes = num_bytes_of(dtype, shape, f"{name!r} in {what!r}")
    if end - begin != num_bytes:
        raise fault(what, f"{num_bytes} bytes for {dtype} of shape {shape}", f"{end - begin} for {name!r}")
    return TensorEntry(dtype, tuple(shape), begin, end)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(count) is int and 0 <= count <= MAX_DIM for count in value)
