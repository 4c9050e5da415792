"""From what the user typed after ``--backend`` to a backend.

The controller only checks the spelling, so that it need not import torch; the ranks import and open.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any, Final

from dcpbench.errors import UsageError

if TYPE_CHECKING:
    from dcpbench.backends.protocol import Backend

__all__ = ["KNOWN", "check_spelling", "describe", "resolve"]

KNOWN: Final = {"torch": "dcpbench.backends.torch_dcp:BACKEND", "reference": "dcpbench.backends.reference_dcp:BACKEND"}
"""The backends that ship, by the name that users type."""

_SPECIFICATION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def check_spelling(specification: str) -> None:
    """Checks that ``specification`` is a known name or reads as ``package.module:attribute``; imports nothing.

    Raises:
        UsageError: it is neither.
    """
    if specification not in KNOWN and not _SPECIFICATION.fullmatch(specification):
        known = ", ".join(sorted(KNOWN))
        raise UsageError(f"Unknown backend {specification!r}. Known: {known}. Or give 'package.module:attribute'.")


def resolve(specification: str) -> Backend:
    """Returns the backend that ``specification`` names.

    Raises:
        UsageError: no such name, the module cannot be imported, or the attribute is no backend; the text is one line.
    """
    from dcpbench.backends.protocol import Backend  # torch is imported where a backend is used, not where it is named

    check_spelling(specification)
    module_name, _, attribute = KNOWN.get(specification, specification).partition(":")
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
    """Runs on a rank: returns the backend's name, or why it cannot be used, under ``name`` or ``problem``."""
    import torch

    try:
        return {"name": resolve(specification).name, "num_cuda_devices": torch.cuda.device_count()}
    except UsageError as error:
        return {"problem": str(error)}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
