"""Frozen dataclasses to JSON and back, by their type hints.

`Case`, `Observation`, `Verdict` and `Record` travel as files and as messages; this one module turns any of them into
plain JSON values and reads them again, checking every field on the way in, so that a malformed file is answered with
the place and the reason.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import math
import types
import typing
from typing import Any, TypeVar

from dcpbench.errors import MalformedFile

__all__ = ["from_json", "to_json"]

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Returns ``value`` as JSON values; fields that hold their default are left out.

    A class may take over with a method ``to_json()`` and a class method ``from_json(data)``. Bytes become base64.
    """
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if not _is_default(value, f)}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def from_json(cls: type[T], data: Any, where: str = "$") -> T:
    """Returns ``data`` as an instance of the dataclass ``cls``.

    Raises:
        MalformedFile: a field is missing, unknown or of another type; the text names the place.
    """
    return typing.cast("T", _read(cls, data, where))


def _is_default(value: Any, field: dataclasses.Field[Any]) -> bool:
    held = getattr(value, field.name)
    if field.default is not dataclasses.MISSING:
        return bool(held == field.default) and type(held) is type(field.default)
    return False


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if data is None else _read(next(a for a in args if a is not types.NoneType), data, where)
    if origin is tuple:
        return _read_tuple(args, data, where)
    if origin is dict:
        return {k: _read(args[1], v, f"{where}.{k}") for k, v in _instance(dict, data, where).items()}
    if origin is typing.Literal:
        if data not in args:
            raise MalformedFile(where, f"expected one of {', '.join(map(repr, args))} but got {data!r}.")
        return data
    if hasattr(kind, "from_json"):
        try:
            return kind.from_json(data)
        except (TypeError, ValueError, KeyError) as error:
            raise MalformedFile(where, f"{error}") from error
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(typing.cast("type", kind), data, where)
    if kind is Any:
        return data
    return _read_scalar(kind, data, where)


def _read_tuple(args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    items = _instance(list, data, where)
    kinds = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
    if len(kinds) != len(items):
        raise MalformedFile(where, f"expected {len(kinds)} items but got {len(items)}.")
    return tuple(_read(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, items, strict=True)))


def _read_dataclass(cls: type, data: Any, where: str) -> Any:
    given = _instance(dict, data, where)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(given) - set(fields)):
        raise MalformedFile(where, f"expected fields of {cls.__name__} ({', '.join(fields)}) but got {unknown[0]!r}.")
    values = {}
    for name, field in fields.items():
        if name in given:
            values[name] = _read(_hints(cls)[name], given[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise MalformedFile(where, f"expected the field {name!r} of {cls.__name__} but it is missing.")
    try:
        return cls(**values)
    except ValueError as error:
        raise MalformedFile(where, str(error)) from error


def _read_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is bytes:
        try:
            return base64.b64decode(_instance(str, data, where), validate=True)
        except binascii.Error as error:
            raise MalformedFile(where, f"expected base64 but got {data!r:.60}.") from error
    if kind is float and (type(data) is int or data in ("nan", "inf", "-inf")):
        return float(data)
    return _instance(kind, data, where)


def _instance(kind: type, data: Any, where: str) -> Any:
    if type(data) is not kind:
        raise MalformedFile(where, f"expected {kind.__name__} but got {data!r:.60}.")
    return data
