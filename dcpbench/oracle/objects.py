"""Rules R4xx: values that are not tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator

from dcpbench import objects as codec
from dcpbench.case import Case
from dcpbench.messages import Observation
from dcpbench.oracle.setting import setting
from dcpbench.oracle.verdict import Finding

__all__ = ["findings"]


def findings(case: Case, seen: Observation) -> Iterator[Finding]:
    """Yields what is wrong with the values that one rank holds after a step."""
    version = case.version_held(seen.step)
    for leaf, found in zip(case.objects, seen.objects, strict=True):
        if not found.asked_for:
            continue
        want = codec.encode(leaf.value(version))
        where = f"{leaf.fqn!r} on rank {seen.rank} of {seen.world_size}"
        if not found.present:
            rule, headline, got = "R104", f"{where} is gone after load", "no such key"
        elif (place := codec.differs_at(want, found.encoded)) is None:
            continue
        else:
            got = _short(found.encoded)
            stale = found.encoded == NEVER_LOADED or any(
                found.encoded == codec.encode(leaf.value(s.version)) for s in case.steps if s.action == "save"
            )
            rule = "R402" if stale else "R401"
            headline = (
                f"{where} was not replaced by load" if stale else f"{where} differs after load, at {place or 'its top'}"
            )
        yield Finding(
            rule,
            headline,
            (("expected", _short(want)), ("got", got), *setting(case, seen.step)),
            fqn=leaf.fqn,
            rank=seen.rank,
            step=seen.step,
        )


NEVER_LOADED = "dcpbench: this value was never loaded"
"""What a destination holds before a load; no generated value is equal to it."""


def _short(encoded: object) -> str:
    text = json.dumps(encoded)
    return text if len(text) <= 120 else f"{text[:117]}..."
