"""From what the user typed after ``--backend`` to a backend.

The controller only checks the spelling, so that it need not import torch; the ranks import and open.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from dcpbench.backends import parts
from dcpbench.errors import UsageError

if TYPE_CHECKING:
    from dcpbench.backends.protocol import Backend

__all__ = ["KNOWN", "check_spelling", "describe", "resolve"]

ENTRY_POINTS: Final = "dcpbench.backends"
"""The group of entry points under which installed packages offer their backends."""

KNOWN: Final = {"torch": "dcpbench.backends.torch_dcp:BACKEND", "reference": "dcpbench.backends.reference_dcp:BACKEND"}
"""The backends that ship, by the name that users type."""

_SPECIFICATION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def check_spelling(specification: str) -> None:
    """Checks that ``specification`` is a name on offer or reads as ``package.module:attribute``; imports nothing.

    It may also name a source for each part: ``engine=torch,planner=torch,storage=package.module:attribute``.

    Raises:
        UsageError: it is neither.
    """
    for name in parts.names_in(specification):
        _check_name(name)


@functools.cache
def _offered() -> dict[str, str]:
    """Returns where each backend lies that has a name: those that ship, and the entry points of installed packages."""
    found = {entry.name: entry.value for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    return {**found, **KNOWN}


def _check_name(specification: str) -> None:
    if specification not in _offered() and not _SPECIFICATION.fullmatch(specification):
        known = ", ".join(sorted(_offered()))
        raise UsageError(f"Unknown backend {specification!r}. Known: {known}. Or give 'package.module:attribute'.")


def resolve(specification: str) -> Backend:
    """Returns the backend that ``specification`` names.

    Raises:
        UsageError: no such name, the module cannot be imported, or the attribute is no backend; the text is one line.
    """
    check_spelling(specification)
    sources = parts.parts_of(specification)
    return _import(specification) if sources is None else _put_together(specification, sources)


def _put_together(specification: str, sources: dict[str, str]) -> Backend:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

    from dcpbench.backends.protocol import StorageBackend

    found: dict[str, StorageBackend] = {}
    for part, name in sources.items():
        backend = _import(name)
        if not isinstance(backend, StorageBackend):
            raise UsageError(
                f"Expected backend {name!r} to come in parts but it is a {type(backend).__name__}. "
                f"Take the {part} from a dcpbench.StorageBackend."
            )
        found[part] = backend
    planner = found["planner"]
    return replace(
        found["storage"],
        name=specification,
        engine=found["engine"].engine,
        save_planner=planner.save_planner or DefaultSavePlanner,
        load_planner=planner.load_planner or DefaultLoadPlanner,
    )


def _import(specification: str) -> Backend:
    from dcpbench.backends.protocol import Backend  # torch is imported where a backend is used, not where it is named

    module_name, _, attribute = _offered().get(specification, specification).partition(":")
    try:
        found: object = importlib.import_module(module_name)
    except BaseException as error:  # a backend module may raise anything, SystemExit included
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UsageError(
            f"Expected backend {specification!r} to import but got {type(error).__name__}: {_one_line(error)}. "
            f"Try: python -c 'import {module_name}'."
        ) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise UsageError(
                f"Expected an attribute {attribute!r} in module {module_name!r} for backend {specification!r} "
                f"but it has none. Name one that holds a backend."
            )
        found = getattr(found, name)
    if not isinstance(found, Backend):
        raise UsageError(
            f"Expected {specification!r} to be a backend but got {type(found).__name__}. "
            "Give a dcpbench.StorageBackend, PlannerBackend or EngineBackend."
        )
    return found


def describe(_rank: int, _world_size: int, specification: str) -> dict[str, Any]:
    """Runs on a rank: returns what a backend is, or why it cannot be used.

    Returns:
        ``name`` and ``num_cuda_devices``; or ``problem``.
    """
    import torch

    try:
        return {"name": resolve(specification).name, "num_cuda_devices": torch.cuda.device_count()}
    except UsageError as error:
        return {"problem": str(error)}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
