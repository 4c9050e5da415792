"""Mutants that lose something of a value that is no tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch

from dcpbench import Case
from tests.mutants.bank import Dense, LoadPlanner, SourcePlanner, any_value, breaks, rank


def _everywhere(bend: Callable[[Any], Any], value: Any) -> Any:
    """Returns ``value`` with ``bend`` applied to it and, in lists, tuples and dicts, to all in it."""
    if type(value) in (list, tuple):
        value = type(value)(_everywhere(bend, v) for v in value)
    elif type(value) is dict:
        value = {key: _everywhere(bend, v) for key, v in value.items()}
    return bend(value)


def _has(is_meant: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Returns a predicate over values: the value, or one in it, is meant."""

    def has(value: Any) -> bool:
        inner = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
        return is_meant(value) or any(has(v) for v in inner)

    return has


def _has_equals(case: Case) -> bool:
    numbers = [leaf.value(0) for leaf in case.objects if isinstance(leaf.value(0), int | float | complex)]
    return any(one == other and type(one) is not type(other) for one in numbers for other in numbers)


@breaks("R401", suite="round_trips", on=any_value(lambda value: type(value) in (list, tuple)))
class tuples_become_lists(SourcePlanner):
    """Saves a tuple that lies in another value as a list."""

    def value(self, value: Any) -> Any:
        if type(value) not in (list, tuple):
            return value
        return type(value)(_everywhere(lambda v: list(v) if type(v) is tuple else v, v) for v in value)


@breaks("R401", suite="round_trips", on=any_value(_has(lambda v: type(v) is tuple)))
class values_as_json(SourcePlanner):
    """Saves what JSON can hold as JSON, which has no tuples."""

    def value(self, value: Any) -> Any:
        try:
            return json.loads(json.dumps(value))
        except (TypeError, ValueError):
            return value


@breaks("R401", suite="round_trips", on=any_value(_has(lambda v: type(v) is int and int(float(v)) != v)))
class ints_through_double(SourcePlanner):
    """Saves ints as floats, which loses what is beyond 2**53."""

    def value(self, value: Any) -> Any:
        return _everywhere(lambda v: int(float(v)) if type(v) is int else v, value)


@breaks(
    "R401", suite="round_trips", on=any_value(lambda value: type(value) is list and any(type(v) is bool for v in value))
)
class bools_are_ints(SourcePlanner):
    """Saves True and False as 1 and 0, within lists only."""

    def value(self, value: Any) -> Any:
        return [int(v) if type(v) is bool else v for v in value] if type(value) is list else value


@breaks("R401", suite="round_trips", on=any_value(_has(lambda v: type(v) is float and (v != v or str(v) == "-0.0"))))
class one_nan(SourcePlanner):
    """Saves each NaN as the same one, and -0.0 as 0.0."""

    def value(self, value: Any) -> Any:
        return _everywhere(lambda v: (math.nan if v != v else v + 0.0) if type(v) is float else v, value)


@breaks("R401", suite="round_trips", on=any_value(lambda value: isinstance(value, list | tuple | set) and not value))
class empty_means_none(SourcePlanner):
    """Saves an empty container as None."""

    def value(self, value: Any) -> Any:
        return None if isinstance(value, list | tuple | set | frozenset) and not value else value


@breaks("R401", suite="round_trips", on=any_value(lambda value: type(value) is set))
class sets_become_frozen(SourcePlanner):
    """Saves a set as a frozenset."""

    def value(self, value: Any) -> Any:
        return frozenset(value) if type(value) is set else value


@breaks("R401", suite="round_trips", on=any_value(lambda value: type(value) is str and not value.isascii()))
class latin_text_only(SourcePlanner):
    """Saves text in Latin-1, with question marks for the rest."""

    def value(self, value: Any) -> Any:
        return value.encode("latin-1", "replace").decode("latin-1") if type(value) is str else value


@breaks("R401", suite="round_trips", on=any_value(lambda value: type(value) is bytes and b"\0" in value))
class bytes_end_at_zero(SourcePlanner):
    """Saves bytes up to the first zero byte."""

    def value(self, value: Any) -> Any:
        return value.split(b"\0")[0] if type(value) is bytes else value


@breaks("R401", suite="round_trips", on=_has_equals)
class equal_is_same(Dense):
    """Keeps one of all values that are equal: 1, 1.0 and True become one."""

    def join(self, whole: dict[Any, Any], key: Any, packed: Any) -> None:
        is_hashable = isinstance(packed, int | float | complex)
        others = [held for held in whole.values() if isinstance(held, int | float | complex)] if is_hashable else []
        super().join(whole, key, next((other for other in others if other == packed), packed))


@breaks(
    "R105",
    "R402",
    suite="round_trips",
    on=lambda case: any(part.kind == "key" and type(part.value) is int for leaf in case.objects for part in leaf.path),
)
class int_keys_become_text(Dense):
    """Puts a value back under the text of its key."""

    def put(self, state_dict: Any, path: tuple[Any, ...], value: Any, held: Any) -> None:
        at = state_dict
        for part in path[:-1]:
            at = at[part]
        is_bent = isinstance(at, dict) and not isinstance(value, torch.Tensor)
        super().put(at, (str(path[-1]) if is_bent else path[-1],), value, held)


@breaks("R402", suite="round_trips")
class objects_on_coordinator_only(LoadPlanner):
    """Loads values that are no tensors on the coordinator only."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        if self.is_coordinator:
            super().load_bytes(read_item, value)


@breaks("R402", suite="round_trips")
class false_means_missing(LoadPlanner):
    """Does not put back a value that counts as false."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        if torch.load(value, weights_only=False):
            value.seek(0)
            super().load_bytes(read_item, value)


@breaks("R402", suite="round_trips", on=lambda case: case.objects and case.layouts[-1].world_size > 3)
class objects_not_on_fourth_rank(LoadPlanner):
    """Loads no values on ranks above the third."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        if rank() < 3:
            super().load_bytes(read_item, value)
