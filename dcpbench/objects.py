"""Python values that a checkpoint carries beside tensors, as JSON, and compared without mercy.

A value becomes JSON values tagged with its type, so that a case file can name it and the judge, which never sees the
loaded object itself, can compare it: ``1``, ``True`` and ``1.0`` differ, ``0.0`` and ``-0.0`` differ, a NaN equals the
same NaN, an ``OrderedDict`` is no ``dict``. Kinds that need more than this are in :mod:`dcpbench.object_kinds`.
"""

from __future__ import annotations

import base64
import json
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from dcpbench import object_kinds

__all__ = ["CHANGED_LATER", "NEVER_LOADED", "decode", "differs_at", "encode"]

NEVER_LOADED: str = "dcpbench: this value was never loaded"
"""What a destination holds before a load; no generated value is equal to it."""

CHANGED_LATER = "dcpbench: this was put in after async_save had returned"
"""What training puts into values once an asynchronous save has begun."""


def encode(value: Any) -> Any:
    """Returns ``value`` as tagged JSON values: ``{"int": "12"}``, ``{"list": [...]}``.

    A type that is not known becomes ``{"other": [qualified name, repr]}``: it can be compared, but not decoded.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return {"int": str(value)}
    if kind is float:
        return {"float": _float_bits(value)}
    if kind is complex:
        return {"complex": [_float_bits(value.real), _float_bits(value.imag)]}
    if kind in (bytes, bytearray):
        return {kind.__name__: base64.b64encode(value).decode("ascii")}
    if kind in (list, tuple):
        return {kind.__name__: [encode(v) for v in value]}
    if kind in (set, frozenset):
        return {kind.__name__: sorted((encode(v) for v in value), key=json.dumps)}
    if kind in (dict, OrderedDict):
        return {kind.__name__: [[encode(k), encode(v)] for k, v in value.items()]}
    if (rich := object_kinds.encode(value, encode)) is not None:
        return rich
    return {"other": [f"{kind.__module__}.{kind.__qualname__}", repr(value)]}


def decode(data: Any) -> Any:
    """Returns the value that :func:`encode` turned into ``data``.

    Raises:
        ValueError: ``data`` has no known tag, or its tag does not fit what it holds.
    """
    if data is None or isinstance(data, bool | str):
        return data
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError(f"expected an object with one type tag but got {data!r:.60}.")
    ((tag, held),) = data.items()
    if tag in object_kinds.TAGS:
        return object_kinds.decode(tag, held, decode)
    if tag not in _DECODERS:
        raise ValueError(f"expected a type tag such as 'int' or 'list' but got {tag!r}.")
    return _DECODERS[tag](held)


def differs_at(want: Any, got: Any, place: str = "") -> str | None:
    """Returns the place of the first difference between two encoded values, or None if they are the same.

    The place reads like Python, ``[2][0]``; the value itself is the empty string.
    """
    if type(want) is not type(got):
        return place
    if isinstance(want, dict):
        if want.keys() != got.keys():
            return place
        (tag,) = want
        if isinstance(want[tag], list) and tag in ("list", "tuple"):
            return _sequence_differs_at(want[tag], got[tag], place)
    return None if want == got else place


def _sequence_differs_at(want: list[Any], got: list[Any], place: str) -> str | None:
    for i, (one, other) in enumerate(zip(want, got, strict=False)):
        if (found := differs_at(one, other, f"{place}[{i}]")) is not None:
            return found
    return None if len(want) == len(got) else place


def _float_bits(value: float) -> str:
    return f"{struct.pack('>d', value).hex()} {value!r}"


def _from_bits(text: str) -> float:
    return float(struct.unpack(">d", bytes.fromhex(text.split(" ", 1)[0]))[0])


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "float": _from_bits,
    "complex": lambda held: complex(_from_bits(held[0]), _from_bits(held[1])),
    "bytes": base64.b64decode,
    "bytearray": lambda held: bytearray(base64.b64decode(held)),
    "list": lambda held: [decode(v) for v in held],
    "tuple": lambda held: tuple(decode(v) for v in held),
    "set": lambda held: {decode(v) for v in held},
    "frozenset": lambda held: frozenset(decode(v) for v in held),
    "dict": lambda held: {decode(k): decode(v) for k, v in held},
    "OrderedDict": lambda held: OrderedDict((decode(k), decode(v)) for k, v in held),
}
