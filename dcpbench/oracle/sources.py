"""Rule R204: a save leaves its source alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from dcpbench.case import Case
from dcpbench.messages import Observation
from dcpbench.oracle import objects, values
from dcpbench.oracle.verdict import Finding

__all__ = ["findings"]


def findings(case: Case, seen: Observation) -> Iterator[Finding]:
    """Yields the first thing that a save changed in the state dict that one rank gave it."""
    changed = chain(values.findings(case, seen, None), objects.findings(case, seen), values.added_keys(case, seen))
    if (first := next(changed, None)) is not None:
        yield replace(first, rule="R204", headline=f"save changed its source: {first.headline.replace('load', 'save')}")
