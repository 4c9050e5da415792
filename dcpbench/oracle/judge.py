"""The oracle: a case and what the ranks saw of it, to a verdict. Pure; no torch, no backend.

One module per family of rules finds what is broken; this one sorts the observations to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from dcpbench.case import Case
from dcpbench.case_files import AnyCase
from dcpbench.messages import Observation
from dcpbench.models.case import TrainingCase
from dcpbench.oracle import absences, objects, outcome, refusals, sources, tiling, values
from dcpbench.oracle.applies import rules_tested
from dcpbench.oracle.protocol import judge_protocol
from dcpbench.oracle.training import judge_training
from dcpbench.oracle.verdict import Finding, Verdict
from dcpbench.protocol_case import ProtocolCase

__all__ = ["judge"]


def judge(case: AnyCase, observations: Sequence[Observation]) -> Verdict:
    """Returns the verdict on ``case``.

    PASS needs an observation of each rank for each step; where ranks could not connect to each other, or steps were
    never run although nothing went wrong before them, the verdict is UNKNOWN. It is UNSUPPORTED where the backend has
    no such feature, or declares it absent and all ranks refused cleanly.

    Args:
        case: what was run.
        observations: one per step and rank, as the pool returns them; steps after a broken one may be missing.
    """
    if isinstance(case, TrainingCase):
        return judge_training(case, observations)
    if isinstance(case, ProtocolCase):
        return judge_protocol(case, observations)
    if any(seen.outcome == "unconnected" for seen in observations):
        seen = next(seen for seen in observations if seen.outcome == "unconnected")
        return Verdict("UNKNOWN", reason=f"the ranks could not connect to each other: {outcome.error_line(seen)}")
    if (own := next((seen for seen in observations if _is_our_own(seen)), None)) is not None:
        return Verdict("UNKNOWN", reason=f"dcpbench itself failed, in {own.phase}: {outcome.error_line(own)}")
    findings = tuple(_findings(case, observations))
    absent = absences.lacking(observations)
    if absent:
        findings, refusal = _of_absent(case, observations, findings)
        if refusal and not findings:
            return Verdict("UNSUPPORTED", (), refusal, rules_tested(case, observations), absent)
    if findings:
        return Verdict("FAIL", findings, absent=absent)
    if (one := next((seen for seen in observations if seen.outcome == "unsupported"), None)) is not None:
        return Verdict("UNSUPPORTED", reason=outcome.error_line(one), checked=rules_tested(case, observations))
    last = next((seen.step for seen in observations if outcome.ends_the_case(case, seen)), None)
    missing = [
        number
        for number, step in enumerate(case.steps[: None if last is None else last + 1])
        if sum(seen.step == number for seen in observations) != case.layouts[step.layout].world_size
    ]
    if missing:
        return Verdict("UNKNOWN", reason=f"steps {missing} were not observed on all ranks")
    return Verdict("PASS", checked=rules_tested(case, observations), absent=absent)


def _of_absent(
    case: Case, observations: Sequence[Observation], findings: tuple[Finding, ...]
) -> tuple[tuple[Finding, ...], str]:
    """Returns the findings on a case that needs what the backend declares absent, and how it was refused."""
    first = min(seen.step for seen in observations if seen.lacks)
    if before := tuple(found for found in findings if found.step < first):
        return before, ""
    found, refusal = absences.refused(case, observations)
    if found or refusal:
        return tuple(found), refusal
    return tuple(absences.of_results(findings, absences.lacking(observations))), ""


def _is_our_own(seen: Observation) -> bool:
    """Reads as: what raised on this rank was our code before or after the call, not the backend."""
    return seen.outcome == "raised" and seen.phase in ("build", "disturb", "arrange", "observe")


def _findings(case: Case, observations: Sequence[Observation]) -> Iterator[Finding]:
    tables: dict[int | None, Observation] = {}
    for number, step in enumerate(case.steps):
        seen = [one for one in observations if one.step == number]
        layout = case.layouts[step.layout]
        yield from outcome.findings(case, number, [one for one in seen if layout.takes_part(one.rank)])
        if step.action == "load" and step.misuse != "none" and all(one.outcome == "raised" for one in seen):
            yield from chain.from_iterable(refusals.findings(case, one) for one in seen)
        if any(one.outcome != "ok" for one in seen):
            continue
        source = number if step.saves else case.source_of(number)
        following = case.steps[number + 1] if number + 1 < len(case.steps) else step
        is_tainted = False
        for one in seen:
            if step.action == "save" and step.misuse == "none":
                yield from sources.findings(case, one)
            elif step.action in ("load", "convert") and step.misuse == "none":
                found = list(_loaded(case, one, tables.get(source)))
                is_tainted = is_tainted or (bool(found) and following.resaves)
                yield from found
            if one.tables is not None:
                tables[source] = one
                yield from tiling.findings(case, one)
        if is_tainted:  # what was loaded wrong is saved again: nothing after it says anything new
            return


def _loaded(case: Case, one: Observation, saved: Observation | None) -> Iterator[Finding]:
    tensors = values.findings(case, one, saved)
    # whose memory a tensor from a file has is nobody's business
    yield from (found for found in tensors if one.action == "load" or not found.rule.startswith("R2"))
    yield from objects.findings(case, one)
    yield from values.added_keys(case, one)
