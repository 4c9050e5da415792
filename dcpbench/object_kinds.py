"""Kinds of values beyond Python's plain ones, to JSON and back: records, numpy's and torch's values, dates.

torch is asked for by name, and only where such a value is made again: on ranks. The controller never does that.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import decimal
import importlib
import pathlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

import numpy as np

from dcpbench import sample_types

__all__ = ["TAGS", "decode", "encode"]

TAGS: Final = frozenset(
    (
        *("deque", "defaultdict", "enum", "namedtuple", "dataclass", "range", "slice", "datetime", "timedelta"),
        *("path", "decimal", "numpy", "numpy scalar", "Size", "dtype", "device", "Tensor"),
    )
)
"""The tags of the kinds that are known here."""

_FACTORIES: Final = {"int": int, "list": list}


def encode(value: Any, inner: Callable[[Any], Any]) -> Any:
    """Returns ``value`` as tagged JSON values, or None for a kind that is not known here.

    Args:
        value: anything.
        inner: encodes what lies in it.
    """
    kind = type(value)
    if kind.__module__ == sample_types.__name__:
        return _encode_sample(value, inner)
    if kind.__module__ == "torch" or kind.__module__.startswith("torch."):
        return _encode_torch(value)
    if kind is deque:
        return {"deque": [[inner(v) for v in value], value.maxlen]}
    if kind is defaultdict:
        factory = getattr(value.default_factory, "__name__", None)
        return {"defaultdict": [factory, [[inner(k), inner(v)] for k, v in value.items()]]}
    if kind in (range, slice):
        return {kind.__name__: [inner(value.start), inner(value.stop), inner(value.step)]}
    if kind is datetime.datetime:
        return {"datetime": value.isoformat()}
    if kind is datetime.timedelta:
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    if isinstance(value, pathlib.PurePosixPath):
        return {"path": [kind.__name__, str(value)]}
    if kind is decimal.Decimal:
        return {"decimal": str(value)}
    if isinstance(value, np.generic) and not isinstance(value, np.void | np.object_):
        return {"numpy scalar": [value.dtype.str, _text(value.tobytes())]}
    if kind is np.ndarray and not value.dtype.hasobject:
        return {"numpy": [value.dtype.str, list(value.shape), _text(np.ascontiguousarray(value).tobytes())]}
    return None


def _encode_sample(value: Any, inner: Callable[[Any], Any]) -> Any:
    name = type(value).__name__
    if isinstance(value, Enum):
        return {"enum": [name, inner(value.value)]}
    if isinstance(value, tuple):
        return {"namedtuple": [name, [inner(v) for v in value]]}
    if dataclasses.is_dataclass(value):
        return {"dataclass": [name, [inner(getattr(value, one.name)) for one in dataclasses.fields(value)]]}
    return None


def _encode_torch(value: Any) -> Any:
    name = type(value).__name__
    if name == "Size":
        return {name: list(value)}
    if name in ("dtype", "device"):
        return {name: str(value).removeprefix("torch.")}
    if name == "Tensor":
        raw = value.detach().cpu().contiguous().reshape(-1)
        raw = raw.view(importlib.import_module("torch").uint8).numpy().tobytes() if raw.numel() else b""
        return {name: [str(value.dtype).removeprefix("torch."), list(value.shape), _text(raw)]}
    return None


def decode(tag: str, held: Any, inner: Callable[[Any], Any]) -> Any:
    """Returns the value that :func:`encode` turned into ``{tag: held}``; ``inner`` decodes what lies in it.

    Raises:
        ValueError, TypeError, KeyError: ``held`` does not fit the tag.
    """
    match tag:
        case "deque":
            return deque((inner(v) for v in held[0]), held[1])
        case "defaultdict":
            return defaultdict(_FACTORIES.get(held[0]), OrderedDict((inner(k), inner(v)) for k, v in held[1]))
        case "enum":
            return getattr(sample_types, held[0])(inner(held[1]))
        case "namedtuple" | "dataclass":
            return getattr(sample_types, held[0])(*map(inner, held[1]))
        case "range" | "slice":
            return {"range": range, "slice": slice}[tag](*map(inner, held))
        case "datetime":
            return datetime.datetime.fromisoformat(held)
        case "timedelta":
            return datetime.timedelta(*held)
        case "path":
            return getattr(pathlib, held[0])(held[1])
        case "decimal":
            return decimal.Decimal(held)
        case "numpy scalar":
            return np.frombuffer(base64.b64decode(held[1]), held[0])[0]
        case "numpy":
            return np.frombuffer(base64.b64decode(held[2]), held[0]).reshape(held[1]).copy()
        case _:
            return _decode_torch(tag, held)


def _decode_torch(tag: str, held: Any) -> Any:
    torch: Any = importlib.import_module("torch")
    if tag == "Tensor":
        raw = torch.frombuffer(bytearray(base64.b64decode(held[2])), dtype=torch.uint8) if held[2] else torch.empty(0)
        return raw.view(getattr(torch, held[0])).reshape(held[1])
    return {"Size": torch.Size, "dtype": lambda name: getattr(torch, name), "device": torch.device}[tag](held)


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")
