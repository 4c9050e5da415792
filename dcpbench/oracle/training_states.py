"""Whole tensors from what each rank holds of them, and what differs from them. Part of the oracle of training cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dcpbench import objects
from dcpbench.content import DTYPES, Bytes
from dcpbench.geometry import Region
from dcpbench.models.observed import Shard, State

__all__ = ["Difference", "Whole", "differences", "whole_state"]


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole tensor: its bytes are ``[numel, element size]``."""

    dtype: str
    shape: tuple[int, ...]
    data: Bytes

    def part(self, region: Region) -> Bytes:
        """Returns the bytes of a part, in the order in which a rank that holds it has them."""
        return self.data[_positions(self.shape, region)]


@dataclass(frozen=True, slots=True)
class Difference:
    """One key under which a rank does not have what it should.

    Attributes:
        kind: ``missing``, ``added``, ``kind``, ``dtype``, ``shape``, ``bytes`` or ``value``.
        lines: label and text, as a finding has them.
    """

    key: str
    kind: str
    lines: tuple[tuple[str, str], ...]


def whole_state(states: Sequence[State]) -> tuple[dict[str, Whole], dict[str, Any], str]:
    """Returns the whole tensors and the values that the ranks hold together, and in what they contradict each other.

    The last is "" where all is well: each element is held by some rank, and by all that hold it alike.
    """
    tensors: dict[str, Whole] = {}
    values: dict[str, Any] = {}
    for key in dict.fromkeys(key for state in states for key in state.tensors):
        shards = [state.tensors[key] for state in states if key in state.tensors]
        first = shards[0]
        if any((shard.dtype, shard.shape) != (first.dtype, first.shape) for shard in shards):
            return tensors, values, f"{key!r} is not of one dtype and shape on all ranks"
        size, numel = DTYPES[first.dtype], int(np.prod(first.shape, dtype=int))
        data, is_known = np.zeros((numel, size), np.uint8), np.zeros(numel, bool)
        for shard in shards:
            at, held = _positions(shard.shape, shard.region), _bytes(shard)
            again = is_known[at]
            if not np.array_equal(data[at][again], held[again]):
                return tensors, values, f"{key!r} is not the same on all ranks that hold it"
            data[at], is_known[at] = held, True
        if not is_known.all():
            return tensors, values, f"no rank holds all of {key!r}"
        tensors[key] = Whole(first.dtype, first.shape, data)
    for key in dict.fromkeys(key for state in states for key in state.objects):
        held_values = [state.objects[key] for state in states if key in state.objects]
        if any(objects.differs_at(held_values[0], other) is not None for other in held_values):
            return tensors, values, f"{key!r} is not the same on all ranks"
        values[key] = held_values[0]
    return tensors, values, ""


def differences(
    tensors: Mapping[str, Whole], values: Mapping[str, Any], got: State, keys: Iterable[str]
) -> list[Difference]:
    """Returns in which of ``keys``, all of which are wanted, ``got`` is not what the whole state says."""
    found = []
    for key in keys:
        if key in tensors:
            difference = _tensor_difference(key, tensors[key], got)
        elif key in got.tensors:
            difference = Difference(key, "kind", (("expected", _short(values[key])), ("got", "a tensor")))
        elif key not in got.objects:
            difference = _missing(key, _short(values[key]))
        elif (place := objects.differs_at(values[key], got.objects[key])) is not None:
            at = (("at", place),) if place else ()
            lines = (*at, ("expected", _short(values[key])), ("got", _short(got.objects[key])))
            difference = Difference(key, "value", lines)
        else:
            difference = None
        if difference is not None:
            found.append(difference)
    return found


def _tensor_difference(key: str, want: Whole, got: State) -> Difference | None:
    if key in got.objects:
        return Difference(key, "kind", (("expected", "a tensor"), ("got", _short(got.objects[key]))))
    if key not in got.tensors:
        return _missing(key, f"a tensor of {want.dtype}{list(want.shape)}")
    shard = got.tensors[key]
    if shard.dtype != want.dtype:
        return Difference(key, "dtype", (("expected", want.dtype), ("got", shard.dtype)))
    if shard.shape != want.shape:
        return Difference(key, "shape", (("expected", str(list(want.shape))), ("got", str(list(shard.shape)))))
    held, wanted = _bytes(shard), want.part(shard.region)
    wrong: npt.NDArray[np.intp] = np.flatnonzero((held != wanted).any(axis=1))
    if not len(wrong):
        return None
    local = np.unravel_index(int(wrong[0]), shard.region.shape) if shard.shape else ()
    index = shard.region.global_index([int(i) for i in local])
    lines = (
        ("at", f"global index {index}, {shard.region.box_of(index)}, {want.dtype}"),
        ("expected", _hex(wanted[wrong[0]])),
        ("got", f"{_hex(held[wrong[0]])}{_origin(want, held[wrong[0]], index)}  (first of {len(wrong)} elements)"),
    )
    return Difference(key, "bytes", lines)


def _missing(key: str, what: str) -> Difference:
    return Difference(key, "missing", (("expected", what), ("got", "no such key")))


def _origin(whole: Whole, got: Bytes, index: tuple[int, ...]) -> str:
    """Returns where in the same tensor the wrong element belongs, if that is one place."""
    if not got.any():
        return ", zero"
    places = np.flatnonzero((whole.data == got).all(axis=1))
    if len(places) != 1 or len(got) < 4:
        return ""
    where = tuple(int(i) for i in np.unravel_index(int(places[0]), whole.shape)) if whole.shape else ()
    return f", which belongs at {where} of the same tensor" if where != index else ""


def _positions(shape: tuple[int, ...], region: Region) -> npt.NDArray[np.intp]:
    numbers = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
    for dim in range(len(shape)):
        numbers = numbers.take(region.indices(dim), axis=dim)
    return numbers.reshape(-1)


def _bytes(shard: Shard) -> Bytes:
    return np.frombuffer(shard.data, np.uint8).reshape(-1, DTYPES[shard.dtype])


def _hex(element: Bytes) -> str:
    return element[::-1].tobytes().hex()


def _short(encoded: object) -> str:
    text = str(encoded)
    return text if len(text) <= 120 else f"{text[:117]}..."
