"""The oracle: a case and what the ranks saw of it, to a verdict. Pure; no torch, no backend.

One module per family of rules finds what is broken; this one sorts the observations to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dcpbench.case import Case
from dcpbench.messages import Observation
from dcpbench.oracle import objects, outcome, sources, tiling, values
from dcpbench.oracle.verdict import Finding, Verdict

__all__ = ["judge"]


def judge(case: Case, observations: Sequence[Observation]) -> Verdict:
    """Returns the verdict on ``case``.

    PASS needs an observation of each rank for each step; where ranks could not connect to each other, or steps were
    never run although nothing went wrong before them, the verdict is UNKNOWN.

    Args:
        case: what was run.
        observations: one per step and rank, as the pool returns them; steps after a broken one may be missing.
    """
    if any(seen.outcome == "unconnected" for seen in observations):
        seen = next(seen for seen in observations if seen.outcome == "unconnected")
        return Verdict("UNKNOWN", reason=f"the ranks could not connect to each other: {outcome.error_line(seen)}")
    if (own := next((seen for seen in observations if _is_our_own(seen)), None)) is not None:
        return Verdict("UNKNOWN", reason=f"dcpbench itself failed, in {own.phase}: {outcome.error_line(own)}")
    findings = tuple(_findings(case, observations))
    if findings:
        return Verdict("FAIL", findings)
    refused = [seen.step for seen in observations if seen.outcome == "raised"]
    missing = [
        number
        for number, step in enumerate(case.steps[: refused[0] + 1 if refused else None])
        if sum(seen.step == number for seen in observations) != case.layouts[step.layout].world_size
    ]
    if missing:
        return Verdict("UNKNOWN", reason=f"steps {missing} were not observed on all ranks")
    return Verdict("PASS")


def _is_our_own(seen: Observation) -> bool:
    """Reads as: what raised on this rank was our code before or after the call, not the backend."""
    return seen.outcome == "raised" and seen.phase in ("build", "observe")


def _findings(case: Case, observations: Sequence[Observation]) -> Iterator[Finding]:
    tables: dict[str, Observation] = {}
    for number, step in enumerate(case.steps):
        seen = [one for one in observations if one.step == number]
        yield from outcome.findings(case, number, seen)
        if any(one.outcome != "ok" for one in seen):
            continue
        for one in seen:
            if step.action == "save":
                yield from sources.findings(case, one)
            elif step.misuse == "none":
                yield from values.findings(case, one, tables.get(step.checkpoint))
                yield from objects.findings(case, one)
                yield from values.added_keys(case, one)
            if one.tables is not None:
                tables[step.checkpoint] = one
                yield from tiling.findings(case, one)
