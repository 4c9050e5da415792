"""A backend put together from parts of others: ``engine=torch,planner=reference,storage=torch``.

With each of an engine, a pair of planners and a storage taken from one of two backends, a defect shows in just those
combinations that hold the guilty part. This module knows the spelling alone; the registry puts the parts together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Final

__all__ = ["PARTS", "combinations", "guilty_part", "names_in", "parts_of", "spell"]

PARTS: Final = ("engine", "planner", "storage")
"""What a backend consists of, in the order in which specifications name them."""

_SPECIFICATION = re.compile(",".join(f"{part}=([^,=]+)" for part in PARTS))


def spell(sources: Sequence[str]) -> str:
    """Returns the specification of a backend whose parts, in the order of :data:`PARTS`, come from ``sources``."""
    return ",".join(f"{part}={source}" for part, source in zip(PARTS, sources, strict=True))


def parts_of(specification: str) -> dict[str, str] | None:
    """Returns which backend each part comes from, or None if ``specification`` names a single backend."""
    match = _SPECIFICATION.fullmatch(specification)
    return dict(zip(PARTS, match.groups(), strict=True)) if match else None


def names_in(specification: str) -> tuple[str, ...]:
    """Returns the backends that ``specification`` takes parts from, each once: of a single backend, itself."""
    parts = parts_of(specification)
    return tuple(dict.fromkeys(parts.values())) if parts else (specification,)


def combinations(one: str, other: str) -> list[str]:
    """Returns the eight specifications with each part from one of two backends; the first and the last mix nothing."""
    return [spell(sources) for sources in product((one, other), repeat=len(PARTS))]


def guilty_part(outcomes: Mapping[str, bool]) -> tuple[str, str] | None:
    """Returns the part that a failure moves with, and the backend that it comes from.

    Args:
        outcomes: for each of :func:`combinations`, reads as: it fails.

    Returns:
        The one part and source that all failing combinations have, and no other combination; None if there is none.
    """
    sources = _sources(outcomes)
    failing = {specification for specification, fails in outcomes.items() if fails}
    for part in PARTS:
        for source in sources:
            if failing == {s for s in outcomes if (parts_of(s) or {}).get(part) == source}:
                return part, source
    return None


def _sources(specifications: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for specification in specifications for name in names_in(specification)))
