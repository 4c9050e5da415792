"""Rules R5xx: how the ranks ended a step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dcpbench.case import Case
from dcpbench.messages import Observation
from dcpbench.oracle.setting import setting
from dcpbench.oracle.verdict import Finding

__all__ = ["ends_the_case", "error_line", "findings"]

_CAUSE = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b.*")


def findings(case: Case, number: int, seen: Sequence[Observation]) -> Iterator[Finding]:
    """Yields what is wrong with the outcomes of step ``number``: the first cause, not its echo on other ranks."""
    if not seen:
        return
    step = case.steps[number]
    for outcome, judge_lost in (("died", _lost), ("hung", _hung)):
        lost = [one for one in seen if one.outcome == outcome]
        if lost:
            yield judge_lost(case, lost[0], seen)
            return
    raised = [one for one in seen if one.outcome == "raised"]
    if raised and raised[0].phase == "metadata":
        yield _unreadable(case, raised[0])
        return
    returned = [one for one in seen if one.outcome == "ok"]
    if raised and returned:
        yield _split(case, raised[0], returned, seen)
    elif step.may_refuse and raised:
        return
    elif step.misuse == "none" and raised:
        yield _refused(case, _first_cause(raised))
    elif step.misuse != "none" and returned:
        yield _accepted(case, returned[0])
    elif step.misuse not in ("none", "no-checkpoint", "unsavable", "failing-stateful"):
        yield from _unnamed(case, raised)


def ends_the_case(case: Case, seen: Observation) -> bool:
    """Reads as: no further step is run, since this one did not end as it was to end."""
    return seen.outcome not in (("ok",) if case.steps[seen.step].misuse == "none" else ("ok", "raised"))


def error_line(seen: Observation) -> str:
    """Returns the type and the telling line of what a rank raised, in at most 300 characters."""
    if seen.error is None:
        return "no error was reported"
    lines = [line.strip() for line in seen.error.text.split("\n") if line.strip()] or [""]
    kind = seen.error.type.rsplit(".", 1)[-1]
    if kind != "CheckpointException":
        return f"{kind}: {lines[0]}"[:300]
    causes = [line for line in lines if _CAUSE.match(line)]  # it quotes the tracebacks of the ranks that failed
    return f"{kind}: {(causes or lines)[-1]}"[:300]


def _where(one: Observation) -> str:
    return f"rank {one.rank} of {one.world_size}"


def _first_cause(raised: Sequence[Observation]) -> Observation:
    echoes = ("Connection closed by peer", "Connection reset by peer", "connectFullMesh")
    causes = [one for one in raised if one.error and not any(echo in one.error.text for echo in echoes)]
    return (causes or list(raised))[0]


def _others(one: Observation, seen: Sequence[Observation]) -> str:
    others = {other.outcome for other in seen if other.rank != one.rank}
    counts = [
        f"{sum(o.outcome == kind for o in seen if o.rank != one.rank)} {kind}"
        for kind in ("ok", "raised", "died", "hung")
        if kind in others
    ]
    return "other ranks: " + ", ".join(counts) if counts else "no other ranks"


def _stack_lines(one: Observation, limit: int = 4) -> str:
    frames = [line.strip() for line in one.stacks.splitlines() if line.strip().startswith("File")]
    frames = [f for f in frames if "/threading.py" not in f]
    return " < ".join(frame.removeprefix("File ") for frame in frames[:limit]) or "no Python stack could be taken"


def _lost(case: Case, one: Observation, seen: Sequence[Observation]) -> Finding:
    return Finding(
        "R504",
        f"{_where(one)} was lost in {one.action}, during {one.phase or 'its start'}",
        (
            ("expected", "the call returns or raises"),
            ("got", error_line(one)),
            *setting(case, one.step),
            ("because", _others(one, seen)),
        ),
        rank=one.rank,
        step=one.step,
    )


def _hung(case: Case, one: Observation, seen: Sequence[Observation]) -> Finding:
    raised = [other for other in seen if other.outcome == "raised"]
    cause = f"{_where(_first_cause(raised))} raised {error_line(_first_cause(raised))}; " if raised else ""
    return Finding(
        "R503",
        f"{_where(one)} hung in {one.action}, during {one.phase or 'its start'}",
        (
            ("at", _stack_lines(one)),
            ("expected", "the call returns or raises within the timeout"),
            ("got", f"still running; {_others(one, seen)}"),
            *setting(case, one.step),
            ("because", f"{cause}the rank waits at the place above" if cause else "the rank waits at the place above"),
        ),
        rank=one.rank,
        step=one.step,
    )


def _split(case: Case, raised: Observation, returned: Sequence[Observation], seen: Sequence[Observation]) -> Finding:
    return Finding(
        "R502",
        f"{_where(raised)} raised in {raised.action}, but rank {returned[0].rank} returned as if all were well",
        (
            ("expected", "all ranks raise, or none"),
            ("got", f"raised on {_ranks(seen, 'raised')}, returned on {_ranks(seen, 'ok')}"),
            *setting(case, raised.step),
            ("because", error_line(raised)),
        ),
        rank=raised.rank,
        step=raised.step,
    )


def _unreadable(case: Case, one: Observation) -> Finding:
    return Finding(
        "R304",
        "the metadata cannot be read after save",
        (
            ("at", _last_frame(one)),
            ("expected", "the metadata of the checkpoint that was saved"),
            ("got", error_line(one)),
            *setting(case, one.step),
        ),
        rank=one.rank,
        step=one.step,
    )


def _ranks(seen: Sequence[Observation], outcome: str) -> list[int]:
    return [one.rank for one in seen if one.outcome == outcome]


def _refused(case: Case, one: Observation) -> Finding:
    return Finding(
        "R501",
        f"{one.action} of a valid state dict raised on all {one.world_size} ranks",
        (
            ("at", _last_frame(one)),
            ("expected", "it succeeds"),
            ("got", f"{error_line(one)} (rank {one.rank})"),
            *setting(case, one.step),
        ),
        rank=one.rank,
        step=one.step,
    )


def _last_frame(one: Observation) -> str:
    text = (one.error.traceback + one.error.text) if one.error else ""
    frames = [line.strip() for line in text.splitlines() if line.strip().startswith("File ")]
    return frames[-1] if frames else "no traceback"


def _accepted(case: Case, one: Observation) -> Finding:
    step = case.steps[one.step]
    wrong = {
        "unknown-key": "asks for a key that was never saved",
        "larger": "asks for a larger tensor than was saved",
        "smaller": "asks for a smaller tensor than was saved",
        "extra-dim": "asks for a tensor with more dims than was saved",
        "other-kind": "asks for a tensor where a value was saved",
        "unsavable": "holds a value that cannot be saved",
        "failing-stateful": "holds a Stateful that raises",
        "no-checkpoint": "names a checkpoint that does not exist",
    }[step.misuse]
    fqn = "" if step.misuse in ("no-checkpoint", "failing-stateful") else case.leaves[step.misused].fqn
    who = "each rank" if step.misused_on is None else f"rank {step.misused_on}"
    return Finding(
        "R505",
        f"{one.action} succeeded although {who} {wrong}" + (f" ({fqn!r})" if fqn else ""),
        (("expected", "all ranks raise"), ("got", f"all {one.world_size} ranks returned"), *setting(case, one.step)),
        fqn=fqn,
        rank=one.rank,
        step=one.step,
    )


def _unnamed(case: Case, raised: Sequence[Observation]) -> Iterator[Finding]:
    step = case.steps[raised[0].step]
    fqn = case.leaves[step.misused].fqn
    tied = [tensor.fqn for tensor in case.tensors if tensor.tied_to == step.misused]
    names = (fqn, *tied, *(_items_beside(case, step.misused) if step.misuse == "other-kind" else ()))
    for one in raised:
        if one.error is None or not any(_names(one.error.text, name) for name in names):
            yield Finding(
                "R506",
                f"the refusal on {_where(one)} does not name the key {fqn!r}",
                (("expected", f"an error text with {fqn!r}"), ("got", error_line(one)), *setting(case, one.step)),
                fqn=fqn,
                rank=one.rank,
                step=one.step,
            )
            return


def _names(text: str, fqn: str) -> bool:
    return fqn in text or repr(fqn)[1:-1] in text


def _items_beside(case: Case, number: int) -> list[str]:
    """Returns the keys of the list that a leaf lies in: with a tensor in it, each of its items is looked for."""
    path = case.leaves[number].path
    depth = next((at for at, part in enumerate(path) if part.kind == "index"), None)
    return [] if depth is None else [leaf.fqn for leaf in case.leaves if leaf.path[:depth] == path[:depth]]
