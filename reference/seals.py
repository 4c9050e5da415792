"""Seals: a few bytes behind what DCP's format has, by which damage shows that the format itself does not show.

A zip's CRCs tell damaged bytes, but not a whole file in the place of another one; a pickle has no CRC at all. torch
reads neither seal, since both lie behind what it looks at, and files of its own are read here without one.
"""

from __future__ import annotations

import struct
from pathlib import Path
from zlib import crc32

from .items import CorruptItemError
from .metadata_reading import MetadataError

__all__ = ["check_file_seal", "check_metadata_seal", "file_seal", "sealed_metadata"]

_MAGIC = b"\0dcpseal"
_METADATA_SEAL = struct.Struct("<L8s")
_FILE_SEAL = struct.Struct("<LH8s")


def sealed_metadata(raw: bytes) -> bytes:
    """Return a metadata pickle with the CRC of its bytes behind it."""
    return raw + _METADATA_SEAL.pack(crc32(raw), _MAGIC)


def check_metadata_seal(raw: bytes) -> None:
    """Check the bytes of a metadata file, if they carry a seal.

    Raises:
        MetadataError: they are not what was written.
    """
    if raw.endswith(_MAGIC) and len(raw) >= _METADATA_SEAL.size:
        crc, _ = _METADATA_SEAL.unpack(raw[-_METADATA_SEAL.size :])
        if crc != crc32(raw[: -_METADATA_SEAL.size]):
            raise MetadataError("Expected the CRC that was written but got other bytes. The metadata is damaged.")


def file_seal(name: str) -> bytes:
    """Return what stands at the end of the data file of that name."""
    encoded = name.encode()
    return encoded + _FILE_SEAL.pack(crc32(encoded), len(encoded), _MAGIC)


def check_file_seal(path: Path) -> None:
    """Check that a data file that carries a seal is the one that was written under its name.

    Raises:
        CorruptItemError: it is another one.
    """
    longest = len(path.name.encode()) + 64
    with path.open("rb", buffering=0) as stream:
        stream.seek(max(0, stream.seek(0, 2) - longest))
        end = stream.read(longest) or b""
    if not end.endswith(_MAGIC) or len(end) < _FILE_SEAL.size:
        return
    crc, length, _ = _FILE_SEAL.unpack(end[-_FILE_SEAL.size :])
    name = end[: -_FILE_SEAL.size][-length:] if length else b""
    if crc == crc32(name) and name != path.name.encode():
        raise CorruptItemError(
            f"Expected the data file {path.name!r} but got that which was written as {name.decode(errors='replace')!r}."
        )
