"""Which rules a case puts to the test: what a PASS is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dcpbench.case import Case
from dcpbench.messages import Observation
from dcpbench.steps import Step

__all__ = ["rules_tested"]

_TILING = ("R301", "R302", "R303", "R304")
_NAMING_A_KEY = ("unknown-key", "larger", "smaller", "extra-dim")


def rules_tested(case: Case, observations: Sequence[Observation]) -> tuple[str, ...]:
    """Returns the codes of the rules that ``case`` could have shown to be broken; sorted.

    Args:
        case: what was run.
        observations: tell whether the backend shows its metadata, without which the tiling rules are not checked.
    """
    found = {"R503", "R504"}
    if case.max_world_size > 1:
        found.add("R502")
    if case.tensors and any(seen.tables is not None for seen in observations):
        found.update(_TILING)
    for step in case.steps:
        found.update(_of_misuse(step) if step.misuse != "none" else _of_good_step(case, step))
    return tuple(sorted(found))


def _of_misuse(step: Step) -> Iterator[str]:
    yield "R505"
    if step.misuse in _NAMING_A_KEY:
        yield "R506"
    if step.action == "load":
        yield "R205"


def _of_good_step(case: Case, step: Step) -> Iterator[str]:
    if not step.may_refuse:
        yield "R501"
    if step.action == "save":
        yield "R204"
    elif step.action == "async_save":
        yield "R701"
    elif step.action == "load":
        yield from ("R104", "R105")
        if step.lenient:
            yield "R108"
        if case.tensors:
            yield from ("R101", "R102", "R103", "R107", "R201", "R202", "R203")
            if sum(other.saves for other in case.steps) > 1:
                yield "R106"
        if case.objects:
            yield from ("R401", "R402")
