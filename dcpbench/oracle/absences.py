"""Rules R0xx: what a backend declares absent, it refuses, and refuses cleanly.

C003, that what works is not declared absent, needs more than one case: it is found at the end of a run, from counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from dcpbench.case import Case
from dcpbench.messages import Observation
from dcpbench.oracle import outcome, refusals
from dcpbench.oracle.verdict import Finding

__all__ = ["lacking", "of_results", "refused", "works_though_absent"]


def lacking(observations: Sequence[Observation]) -> tuple[str, ...]:
    """Returns the capabilities that the case needs and the backend declares absent; sorted."""
    return tuple(sorted({name for seen in observations for name in seen.lacks}))


def refused(case: Case, observations: Sequence[Observation]) -> tuple[list[Finding], str]:
    """Returns what is wrong with how the backend refused what it lacks, and its words; "" where it refused nothing."""
    absent = lacking(observations)
    first = min(seen.step for seen in observations if seen.lacks)
    for number in range(first, len(case.steps)):
        layout = case.layouts[case.steps[number].layout]
        seen = [one for one in observations if one.step == number and layout.takes_part(one.rank)]
        if all(one.outcome == "ok" for one in seen):
            continue
        raised = [one for one in seen if one.outcome == "raised" and one.phase != "metadata"]
        if len(raised) == len(seen):
            changed = chain.from_iterable(refusals.findings(case, one) for one in seen if one.action == "load")
            return [_as(found, "C001", absent, "refused, but") for found in changed][:1], outcome.error_line(raised[0])
        plain = replace(case.steps[number], misuse="none", may_refuse=False)
        steps = (*case.steps[:number], plain, *case.steps[number + 1 :])
        found = list(outcome.findings(replace(case, steps=steps), number, seen))
        is_unreadable = any(one.phase == "metadata" for one in seen)
        return [_as(one, "C002" if is_unreadable else "C001", absent, "not refused cleanly:") for one in found], ""
    return [], ""


def of_results(findings: Sequence[Finding], absent: tuple[str, ...]) -> Iterator[Finding]:
    """Yields the finding on what was accepted, and then done wrong."""
    for found in findings[:1]:
        yield _as(found, "C002", absent, f"accepted, and then {found.rule}:")


def works_though_absent(backend: str, capability: str, num_cases: int) -> Finding:
    """Returns the finding of a run in which all cases that need just ``capability`` passed, at least one."""
    return Finding(
        "C003",
        f"{backend} declares {capability!r} absent, but it works",
        (
            ("expected", "that it is refused on all ranks"),
            ("got", f"{num_cases} of {num_cases} cases that need it passed"),
            ("because", f"{capability!r} stands in the backend's absent=; take it out"),
        ),
    )


def _as(found: Finding, rule: str, absent: tuple[str, ...], how: str) -> Finding:
    names = ", ".join(absent)
    facts = (*found.facts, ("absent", f"the backend declares: {names}"))
    return replace(found, rule=rule, headline=f"{names} {how} {found.headline}", facts=facts)
