"""Which of DCP's options a backend takes, and which of a call's arguments go where.

An option is taken where a factory names it in its own signature. A subclass that only inherits a constructor has never
said that it honours all of its options, so those do not count.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Final

from torch.distributed.checkpoint.planner import SavePlanner

__all__ = [
    "CALL",
    "CAPABILITY_OF",
    "LOAD_PLANNER",
    "SAVE_PLANNER",
    "WRITER",
    "forget_plans",
    "make",
    "pick",
    "taken_by",
    "taken_by_engine",
    "without",
]

CALL: Final = ("process_group", "no_dist")
WRITER: Final = ("single_file_per_rank", "thread_count")
SAVE_PLANNER: Final = ("flatten_state_dict", "dedup_save_to_lowest_rank", "enable_plan_caching")
LOAD_PLANNER: Final = ("flatten_state_dict", "allow_partial_load")

CAPABILITY_OF: Final = {
    "async_save": "async",
    "process_group": "process-groups",
    "allow_partial_load": "lenient-loads",
    "stateful": "statefuls",
    "convert": "conversions",
}
"""The capability that an option or feature shows."""

Factory = Callable[..., Any] | None


def taken_by(
    writer: Factory, save_planner: Factory, load_planner: Factory, *, has_async_save: bool, has_formats: bool
) -> frozenset[str]:
    """Returns the options and features of a backend with these parts, on an engine with DCP's signatures."""
    saving, loading = _named(save_planner, SAVE_PLANNER), _named(load_planner, LOAD_PLANNER)
    both = set(SAVE_PLANNER) & set(LOAD_PLANNER)
    planners = (saving | loading) - both | (saving & loading & both)
    features = {"stateful", *(["async_save"] if has_async_save else []), *(["convert"] if has_formats else [])}
    return frozenset({*CALL, *_named(writer, WRITER), *planners, *features})


def taken_by_engine(save: Factory, load: Factory, async_save: Factory, present: Iterable[str]) -> frozenset[str]:
    """Returns the options and features of an engine of its own: what its functions name, and what it declares."""
    calls = [call for call in (save, load, async_save) if call is not None]
    found = {"process_group"} if all(_named(call, ["process_group"]) for call in calls) else set()
    found |= _named(load, ["allow_partial_load"])
    found |= {"async_save"} if async_save is not None else set()
    return frozenset(found | {option for option, name in CAPABILITY_OF.items() if name in present})


def without(taken: frozenset[str], absent: Iterable[str]) -> frozenset[str]:
    """Returns ``taken`` but for what shows a capability that is declared absent."""
    return taken - {option for option, name in CAPABILITY_OF.items() if name in set(absent)}


def _named(factory: Factory, options: Iterable[str]) -> set[str]:
    if factory is None or (inspect.isclass(factory) and "__init__" not in vars(factory)):
        return set()
    return set(options) & set(inspect.signature(factory).parameters)


def pick(wanted: dict[str, Any], options: Iterable[str]) -> dict[str, Any]:
    """Returns those of the arguments that are among ``options``."""
    return {name: wanted[name] for name in options if name in wanted}


def make(factory: Factory, wanted: dict[str, Any], options: Iterable[str]) -> Any:
    """Returns a planner with those of the arguments that are its own; None without a factory."""
    return None if factory is None else factory(**pick(wanted, options))


def forget_plans() -> None:
    """Empties the caches of plans that hang on torch's ``SavePlanner``: a case must not depend on the one before."""
    for name, held in vars(SavePlanner).items():
        if name.startswith("_cached_") and isinstance(held, dict):
            held.clear()
