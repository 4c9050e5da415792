"""A check of a pickle before it is read: CPython's unpickler makes room for any memo index that a pickle names.

Sixteen bytes of memory go to each index up to the one named, so that ten bytes of a hostile file could ask for 64 GiB.
No pickler numbers an entry higher than the pickle has bytes; this refuses a file that does.
"""

from __future__ import annotations

import pickletools
import re
from typing import Final

__all__ = ["check_memo"]

_OPCODES: Final = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
_NUM_LENGTH_BYTES: Final = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_STOP, _PUT, _LONG_PUT = ord("."), ord("p"), ord("r")
_MAX_DIGITS: Final = 20
_TWO_LINES: Final = (ord("c"), ord("i"))


def _fixed() -> re.Pattern[bytes]:
    """Return what matches a run of opcodes of known length: nearly all of a pickle, at the speed of the re module."""
    by_length: dict[int, list[int]] = {}
    for code, opcode in _OPCODES.items():
        length = 0 if opcode.arg is None else opcode.arg.n
        if length >= 0 and code not in (_STOP, _LONG_PUT):
            by_length.setdefault(length, []).append(code)
    sets = {n: b"[" + b"".join(rb"\x%02x" % code for code in codes) + b"]" for n, codes in by_length.items()}
    runs = [codes + b"." * n if n else codes + b"++" for n, codes in sets.items()]
    return re.compile(b"(?:" + b"|".join(runs) + b")*+", re.DOTALL)


_FIXED: Final = _fixed()


def check_memo(raw: bytes) -> None:
    """Check that the pickle `raw` names no memo index above its own length; runs nothing of it.

    What else may be wrong with a pickle, a truncated one for instance, is left to the unpickler.

    Raises:
        ValueError: it does.
    """
    at, end = 0, len(raw)
    while at < end:
        match = _FIXED.match(raw, at)
        at = match.end() if match else at
        if at >= end or raw[at] == _STOP or raw[at] not in _OPCODES:
            return
        code, at = raw[at], at + 1
        argument = _OPCODES[code].arg
        if code == _LONG_PUT:
            _check_index(int.from_bytes(raw[at : at + 4], "little"), end)
            at += 4
        elif argument is not None and argument.n in _NUM_LENGTH_BYTES:
            num_bytes = _NUM_LENGTH_BYTES[argument.n]
            at += num_bytes + int.from_bytes(raw[at : at + num_bytes], "little")
        else:
            at = _past_lines(raw, at, code)


def _past_lines(raw: bytes, at: int, code: int) -> int:
    """Return where the argument of an opcode ends whose argument is text up to a newline, or two of that."""
    newline = raw.find(b"\n", at)
    if newline < 0:
        return len(raw)
    if code == _PUT:
        digits = raw[at:newline]
        # The unpickler also takes a sign, underscores, leading zeros, what stands before a NUL; no pickler writes any.
        if not digits.isdigit() or len(digits) > _MAX_DIGITS:
            raise ValueError(f"Expected a memo index in plain digits but got {digits[:_MAX_DIGITS]!r}")
        _check_index(int(digits), len(raw))
    return _past_lines(raw, newline + 1, 0) if code in _TWO_LINES else newline + 1


def _check_index(index: int, num_bytes: int) -> None:
    if index > num_bytes:
        raise ValueError(f"Expected a memo index of {num_bytes} at most, the pickle's bytes, but got {index}")
