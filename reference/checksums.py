"""CRC-32 as zip archives have it, by the fastest implementation there is.

zlib needs about as long for it as a copy of the bytes does, several times what reading them from the page cache takes;
ISA-L, with vector instructions, a tenth of that. The value is the same.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["CRC32_NAME", "crc32"]

crc32: Callable[..., int]
"""`crc32(bytes, start=0)`; with `start` the checksum of what came before, that of both together."""

try:
    from isal.isal_zlib import crc32

    CRC32_NAME = "isal"
except ImportError:
    from zlib import crc32

    CRC32_NAME = "zlib"
