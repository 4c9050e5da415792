"""Rules R4xx: values that are not tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator

from dcpbench import objects as codec
from dcpbench.case import Case, ObjectLeaf
from dcpbench.messages import Observation
from dcpbench.oracle.setting import setting
from dcpbench.oracle.verdict import Finding

__all__ = ["findings"]


def findings(case: Case, seen: Observation) -> Iterator[Finding]:
    """Yields what is wrong with the values that one rank holds after a step."""
    for number, (leaf, found) in enumerate(zip(case.objects, seen.objects, strict=True), len(case.tensors)):
        if not found.asked_for:
            continue
        if found.present and any(codec.differs_at(one, found.encoded) is None for one in _wanted(case, number, seen)):
            continue
        want = _wanted(case, number, seen)[0]
        where = f"{leaf.fqn!r} on rank {seen.rank} of {seen.world_size}"
        if not found.present:
            rule, headline, got = "R104", f"{where} is gone after load", "no such key"
        else:
            got = _short(found.encoded)
            rule, what = _what_is_wrong(case, leaf, want, found.encoded)
            headline = f"{where} {what}"
            if case.is_missing(seen.step, number):
                rule, headline = "R108", f"{where} was replaced, although the checkpoint has no such key"
        yield Finding(
            rule,
            headline,
            (("expected", _short(want)), ("got", got), *setting(case, seen.step)),
            fqn=leaf.fqn,
            rank=seen.rank,
            step=seen.step,
        )


def _wanted(case: Case, number: int, seen: Observation) -> list[object]:
    """Returns the values that a leaf may have after a step: one, or where ranks saved values of their own, any."""
    leaf = case.objects[number - len(case.tensors)]
    step, version = case.steps[seen.step], case.version_held(seen.step)
    if case.is_missing(seen.step, number):
        return [codec.NEVER_LOADED]
    if not leaf.differs:
        return [leaf.encoded_at(version)]
    if step.saves and not step.resaves:
        return [leaf.encoded_at(version, seen.rank)]
    layouts = [case.layouts[s.layout] for s in case.steps if s.saves and s.version == version and not s.resaves]
    savers = sorted({rank for layout in layouts for rank in range(layout.world_size) if layout.holds(number, rank)})
    return [leaf.encoded_at(version, rank) for rank in savers]


def _what_is_wrong(case: Case, leaf: ObjectLeaf, want: object, got: object) -> tuple[str, str]:
    """Returns the rule that a wrong value breaks, and what is wrong with it."""
    others = [leaf.encoded_at(s.version) for s in case.steps if s.saves and not leaf.differs]
    if codec.CHANGED_LATER in json.dumps(got):
        return "R701", "holds what was put in after async_save had returned"
    if got == codec.NEVER_LOADED or got in others:
        return "R402", "was not replaced by load"
    return "R401", f"differs after load, at {codec.differs_at(want, got) or 'its top'}"


def _short(encoded: object) -> str:
    text = json.dumps(encoded)
    return text if len(text) <= 120 else f"{text[:117]}..."
