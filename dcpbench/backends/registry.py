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
from dcpbench.capabilities import CLOSED, check_names
from dcpbench.errors import UsageError

if TYPE_CHECKING:
    from dcpbench.backends.protocol import Backend

__all__ = ["KNOWN", "SHIPPED", "absent_of", "check_spelling", "declared_absent", "describe", "resolve"]

ENTRY_POINTS: Final = "dcpbench.backends"
"""The group of entry points under which installed packages offer their backends."""

KNOWN: Final = {"torch": "dcpbench.backends.torch_dcp:BACKEND", "reference": "dcpbench.backends.reference_dcp:BACKEND"}
"""The backends that are run unless others are named; what the one saves, the other loads."""

SHIPPED: Final = {
    **KNOWN,
    "fsspec": "dcpbench.backends.fsspec_dcp:BACKEND",
    "gathered": "dcpbench.backends.gathered:BACKEND",
    "huggingface": "dcpbench.backends.huggingface_dcp:BACKEND",
    "s3": "dcpbench.backends.s3_dcp:BACKEND",
}
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
    return {**found, **SHIPPED}


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
        absent=tuple(dict.fromkeys(name for backend in found.values() for name in backend.absent)),
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
        ``name``, ``num_cuda_devices``, ``has_location``, ``declared`` and ``absent``, both lists of capabilities; or
        ``problem``.
    """
    import torch

    try:
        backend = resolve(specification)
        return {
            "name": backend.name,
            "num_cuda_devices": torch.cuda.device_count(),
            "declared": sorted(declared_absent(backend)),
            "absent": sorted(absent_of(backend)),
            "has_location": getattr(backend, "location", None) is not None,
        }
    except UsageError as error:
        return {"problem": str(error)}


def declared_absent(backend: Backend) -> frozenset[str]:
    """Returns the capabilities that ``backend`` declares absent, and those that its kind of location rules out.

    Raises:
        UsageError: it names one that there is not.
    """
    names = getattr(backend, "absent", ())
    if isinstance(names, str):
        names = (names,)
    check_names(names, f"absent of backend {backend.name!r}")
    check_names(getattr(backend, "present", ()), f"present of backend {backend.name!r}")
    is_elsewhere = getattr(backend, "location", None) is not None
    return frozenset((*names, *(("local-folders",) if is_elsewhere else ())))


def absent_of(backend: Backend) -> frozenset[str]:
    """Returns the capabilities that ``backend`` lacks: those declared absent, and closed ones that do not show."""
    from dcpbench.backends.options import CAPABILITY_OF

    taken = getattr(backend.open(reuse=False), "takes", ())
    shown = {CAPABILITY_OF[option] for option in taken if option in CAPABILITY_OF}
    has_metadata = getattr(backend, "read_metadata", True) is not None
    shown |= {"metadata"} if has_metadata else set()
    return declared_absent(backend) | (CLOSED - shown)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
