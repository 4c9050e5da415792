"""Rules R0xx: what storages and planners did under virtual ranks. Pure; no torch, no backend.

A step without a planned stop must succeed on all ranks; one with a stop must fail on all, and harm nothing. What a load
must bring follows from the saves before it: one that was stopped leaves what was there, and may have brought its own
only if the coordinator had begun to commit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dcpbench.geometry import Box, tiling_fault
from dcpbench.messages import Observation
from dcpbench.oracle import outcome
from dcpbench.oracle.verdict import Finding, Verdict
from dcpbench.protocol_case import ProtocolCase
from dcpbench.protocol_seen import Filled, Planned, ProtocolSeen, StepSeen

__all__ = ["judge_protocol", "may_fail", "protocol_findings"]

_Facts = tuple[tuple[str, str], ...]
_STORAGE = ("R001", "R002", "R003", "R004", "R005")
_PLANNER = ("R001", "R011", "R012", "R013", "R014", "R015")


def judge_protocol(case: ProtocolCase, observations: Sequence[Observation]) -> Verdict:
    """Returns the verdict on a protocol case, as :func:`dcpbench.judge` does.

    A run that keeps all rules once its ranks go on one after the other, or once its objects are new, breaks the rule
    about just that.
    """
    (one,) = observations
    if one.outcome == "unconnected":
        return Verdict("UNKNOWN", reason=f"the rank could not connect: {outcome.error_line(one)}")
    if one.outcome == "raised":
        return Verdict("UNKNOWN", reason=f"dcpbench itself failed: {outcome.error_line(one)}")
    if one.outcome != "ok":
        rule, what = ("R503", "does not return") if one.outcome == "hung" else ("R504", "ended its process")
        facts = (("got", outcome.error_line(one) if one.error else one.outcome), *_setting(case, 0))
        return Verdict("FAIL", (Finding(rule, f"a {case.part} {what} under virtual ranks", facts),))
    seen = one.value
    assert isinstance(seen, ProtocolSeen)
    if seen.unsupported:
        return Verdict("UNSUPPORTED", reason=seen.unsupported, checked=rules_tested(case))
    found = list(protocol_findings(case, seen.steps))
    if not found:
        return Verdict("PASS", checked=rules_tested(case))
    plain = replace(case, steps=tuple(replace(step, schedule=(), is_fine=False) for step in case.steps))
    if seen.in_order is not None and not any(protocol_findings(plain, seen.in_order)):
        order = " ".join(map(str, seen.steps[found[0].step].order[:40]))
        return Verdict("FAIL", (_because(found[0], "R007", f"in rank order all is well; here the order was {order}"),))
    if seen.anew is not None and not any(protocol_findings(replace(case, reuse=False), seen.anew)):
        return Verdict("FAIL", (_because(found[0], "R006", "with new objects in each step all is well"),))
    return Verdict("FAIL", tuple(found))


def rules_tested(case: ProtocolCase) -> tuple[str, ...]:
    """Returns the codes of the rules that ``case`` could have shown to be broken; sorted."""
    found = {*(_STORAGE if case.part == "storage" else _PLANNER), "R503", "R504"}
    if case.reuse and len(case.steps) > 1:
        found.add("R006")
    if any(step.schedule or step.is_fine for step in case.steps):
        found.add("R007")
    if any(step.halt for step in case.steps):
        found.add("R008")
        if case.part == "storage":
            found.update(("R009", "R010"))
    return tuple(sorted(found))


def may_fail(case: ProtocolCase, number: int, steps: Sequence[StepSeen]) -> bool:
    """Reads as: step ``number`` may end with errors on all ranks, and the case goes on after it."""
    return steps[number].is_halted or (not case.steps[number].saves and None in _versions(case, number, steps))


def protocol_findings(case: ProtocolCase, steps: Sequence[StepSeen]) -> Iterator[Finding]:
    """Yields what is wrong with the steps of a run, up to the first that is wrong."""
    for number, seen in enumerate(steps):
        found = list(_step_findings(case, number, seen, steps))
        yield from found
        if found:
            return


def _step_findings(case: ProtocolCase, number: int, seen: StepSeen, steps: Sequence[StepSeen]) -> Iterator[Finding]:
    step = case.steps[number]
    if seen.problem:
        stuck = next((rank for rank, end in enumerate(seen.ends) if end.outcome == "stuck"), 0)
        yield _finding(case, number, "R503", f"a {step.action} does not end", (("got", seen.problem),), rank=stuck)
        return
    if seen.strays:
        yield _finding(case, number, "R005", "a storage asks for what is not in its plan", (("got", seen.strays[0]),))
    if seen.is_halted:
        yield from _halted(case, number, seen)
        return
    raised = [(rank, end) for rank, end in enumerate(seen.ends) if end.outcome != "ok"]
    versions = _versions(case, number, steps) if not step.saves else set[int | None]()
    if raised and None in versions and len(raised) == len(seen.ends):
        return
    if raised:
        rank, end = raised[0]
        rule = "R009" if not step.saves and _was_stopped(case, number, steps) else "R001"
        what = {"R001": f"a {step.action} is refused", "R009": "a checkpoint no longer loads after a stopped save"}
        yield _finding(case, number, rule, what[rule], (("got", end.error),), rank=rank)
    elif step.saves and case.part == "storage":
        yield from _results(case, number, seen)
    elif step.saves:
        yield from _plans(case, number, seen)
    else:
        yield from _loaded(case, number, seen, versions, steps)


def _was_stopped(case: ProtocolCase, number: int, steps: Sequence[StepSeen]) -> bool:
    return any(case.steps[n].saves and steps[n].is_halted for n in range(number))


def _versions(case: ProtocolCase, number: int, steps: Sequence[StepSeen]) -> set[int | None]:
    """Returns the saves whose content a load may bring; None where it may find no checkpoint."""
    held: set[int | None] = {None}
    for earlier in range(number):
        if not case.steps[earlier].saves or case.steps[earlier].checkpoint != case.steps[number].checkpoint:
            continue
        if not steps[earlier].is_halted:
            held = {earlier}
        elif steps[earlier].is_finishing:
            held = {*held, earlier}
    return held


def _halted(case: ProtocolCase, number: int, seen: StepSeen) -> Iterator[Finding]:
    halt = case.steps[number].halt
    assert halt is not None
    what = f"{halt.call} {'fails' if halt.kind == 'raises' else 'is where the process ends'} on rank {halt.rank}"
    facts: _Facts
    for rank, end in enumerate(seen.ends):
        if end.outcome == "ok":
            facts = (("expected", "an error on each rank"), ("got", f"rank {rank} returned"))
        elif halt.kind == "raises" and (end.kind != "CheckpointException" or end.blames != (halt.rank,)):
            facts = (("expected", f"a CheckpointException that names rank {halt.rank}"), ("got", end.error))
        else:
            continue
        yield _finding(case, number, "R008", f"{what}, and rank {rank} does not say so", facts, rank=rank)
        return


def _results(case: ProtocolCase, number: int, seen: StepSeen) -> Iterator[Finding]:
    parts = case.steps[number].parts
    wanted = Counter((case.leaves[p.leaf].fqn, p.box.offsets if p.box is not None else None) for p in parts)
    if seen.results is None:
        yield _finding(case, number, "R004", "finish gets no lists of WriteResult", ())
        return
    got = Counter((fqn, offsets) for fqn, offsets, _ in seen.results)
    if got != wanted:
        (fqn, offsets), _ = next(iter(((wanted - got) or (got - wanted)).items()))
        facts = (("expected", f"{wanted[fqn, offsets]} of it"), ("got", f"{got[fqn, offsets]}"))
        yield _finding(case, number, "R004", f"the results of {fqn!r} at {offsets} are not the items", facts, fqn)


def _plans(case: ProtocolCase, number: int, seen: StepSeen) -> Iterator[Finding]:
    facts: _Facts
    for leaf, one in enumerate(case.leaves):
        items = [item for item in seen.planned if item.fqn == one.fqn]
        if not one.dtype:
            if len(items) != 1:
                facts = (("expected", "one item on one rank"), ("got", _ranks(items)))
                yield _finding(case, number, "R011", f"{one.fqn!r} is written {len(items)} times", facts, one.fqn)
            continue
        boxes = [item.box for item in items if item.box is not None]
        fault = tiling_fault(one.shape, boxes)
        if fault is not None:
            at = " and ".join(f"box {box}" for box in fault.boxes)
            facts = (("at", at), ("got", _ranks(items)))
            headline = f"the items of {one.fqn!r} {'leave a gap' if fault.kind == 'gap' else f'are {fault.kind}'}"
            yield _finding(case, number, "R011", headline, facts, one.fqn)
        yield from _listed(case, number, leaf, seen, boxes)
        for item in items:
            yield from _data(case, number, leaf, item)


def _listed(case: ProtocolCase, number: int, leaf: int, seen: StepSeen, boxes: list[Box]) -> Iterator[Finding]:
    one = case.leaves[leaf]
    table = next((table for table in seen.tables if table.fqn == one.fqn), None)
    filled = sorted(box for box in boxes if box.numel)
    want = f"{one.dtype}{list(one.shape)} in {len(filled)} chunks"
    if table is None or f"{table.dtype}{list(table.shape)}" != f"{one.dtype}{list(one.shape)}":
        got = "no entry" if table is None else f"{table.dtype}{list(table.shape)}"
    elif sorted(box for box in table.chunks if box.numel) != filled:
        got = ", ".join(f"{box.offsets}+{box.sizes}" for box in table.chunks[:4])
    else:
        return
    facts = (("expected", want), ("got", got))
    yield _finding(case, number, "R012", f"the metadata of {one.fqn!r} is not what is written", facts, one.fqn)


def _data(case: ProtocolCase, number: int, leaf: int, item: Planned) -> Iterator[Finding]:
    one = case.leaves[leaf]
    assert item.box is not None
    want, kind = case.content(leaf, number, item.box), f"{one.dtype}{list(item.box.sizes)}"
    facts: _Facts
    for asked, (data, got) in enumerate(zip(item.data, item.kinds, strict=True)):
        if data != want or got != kind:
            facts = (("at", f"box {item.box}"), ("expected", kind), ("got", got if got != kind else "other bytes"))
            headline = f"the data of {one.fqn!r}, asked for the {('first', 'second')[asked]} time, is wrong"
            yield _finding(case, number, "R013", headline, facts, one.fqn, item.rank)
            return
    if len(item.data) != 2:
        facts = (("expected", kind), ("got", f"{len(item.data)} tensors in 2 requests"))
        yield _finding(case, number, "R013", f"the data of {one.fqn!r} is no tensor", facts, one.fqn, item.rank)


def _loaded(
    case: ProtocolCase, number: int, seen: StepSeen, versions: set[int | None], steps: Sequence[StepSeen]
) -> Iterator[Finding]:
    source = next((n for n in sorted(v for v in versions if v is not None) if _is_all(case, number, seen, n)), None)
    facts: _Facts
    if source is not None:
        if case.part == "storage":
            late = next((one for one in seen.filled if not one.is_committed), None)
            if late is not None:
                fqn = case.leaves[_leaf_of(case, number, late)].fqn
                facts = (("expected", "commit_tensor for each tensor that was given, once it is filled"),)
                yield _finding(case, number, "R003", f"{fqn!r} is filled, not committed", facts, fqn, late.rank)
        else:
            yield from _reads(case, number, seen)
        return
    if versions == {None}:
        yield _finding(case, number, "R010", "a checkpoint loads that was never finished", ())
        return
    first = next(v for v in sorted(v for v in versions if v is not None))
    wrong = next(one for one in seen.filled if one.data != _wanted(case, number, one, first))
    leaf = case.leaves[_leaf_of(case, number, wrong)]
    want = _wanted(case, number, wrong, first)
    facts = (("at", _place(case, number, wrong)), ("expected", _short(want)), ("got", _short(wrong.data)))
    if _was_stopped(case, number, steps):
        rule, headline = "R009", f"{leaf.fqn!r} holds other bytes after a stopped save"
    elif case.part == "storage":
        rule, headline = "R002", f"{leaf.fqn!r} is read wrong"
    else:
        rule, headline = "R015", f"{leaf.fqn!r} holds other bytes after the load"
    yield _finding(case, number, rule, headline, facts, leaf.fqn, wrong.rank)


def _reads(case: ProtocolCase, number: int, seen: StepSeen) -> Iterator[Finding]:
    layout = case.steps[number].layout
    assert layout is not None
    for one in seen.filled:
        leaf = case.leaves[one.part]
        region = layout.region(one.part, leaf.shape, one.rank) if leaf.dtype else None
        if region is not None and one.num_read != region.numel:
            facts = (("expected", f"{region.numel} elements"), ("got", f"{one.num_read}"))
            yield _finding(case, number, "R014", f"{leaf.fqn!r} is read not once", facts, leaf.fqn, one.rank)


def _is_all(case: ProtocolCase, number: int, seen: StepSeen, version: int) -> bool:
    return all(one.data == _wanted(case, number, one, version) for one in seen.filled)


def _leaf_of(case: ProtocolCase, number: int, one: Filled) -> int:
    return case.steps[number].parts[one.part].leaf if case.part == "storage" else one.part


def _wanted(case: ProtocolCase, number: int, one: Filled, version: int) -> bytes:
    leaf = _leaf_of(case, number, one)
    if not case.leaves[leaf].dtype:
        return case.content(leaf, version, None)
    box = _box(case, number, one)
    return case.content(leaf, version, box) if box is not None else b""


def _box(case: ProtocolCase, number: int, one: Filled) -> Box | None:
    step = case.steps[number]
    if step.layout is None:
        return step.parts[one.part].box
    region = step.layout.region(one.part, case.leaves[one.part].shape, one.rank)
    return next(region.boxes(), None) if region is not None else None


def _place(case: ProtocolCase, number: int, one: Filled) -> str:
    box = _box(case, number, one) if case.leaves[_leaf_of(case, number, one)].dtype else None
    return f"box {box}" if box is not None else "the object"


def _ranks(items: Sequence[Planned]) -> str:
    return f"{len(items)} items on ranks {[item.rank for item in items][:8]}"


def _short(data: bytes | None) -> str:
    return "nothing" if data is None else data[:16].hex() + ("…" if len(data) > 16 else "")


def _because(finding: Finding, rule: str, reason: str) -> Finding:
    return replace(finding, rule=rule, facts=(*finding.facts, ("because", reason)))


def _finding(  # noqa: PLR0917  as of a Finding
    case: ProtocolCase,
    number: int,
    rule: str,
    headline: str,
    facts: _Facts,
    fqn: str = "",
    rank: int = 0,
) -> Finding:
    return Finding(rule, headline, (*facts, *_setting(case, number)), fqn=fqn, rank=rank, step=number)


def _setting(case: ProtocolCase, number: int) -> _Facts:
    step = case.steps[number]
    halt = step.halt
    where = f"step {number}, a {step.action} of {step.checkpoint!r} by {step.world_size} virtual ranks"
    stopped = f", rank {halt.rank} {halt.kind} {halt.when} {halt.call}" if halt is not None else ""
    how = ("" if step.has_hints else ", without hints") + (", objects used before" if case.reuse and number else "")
    return (("in", f"{where}{stopped}{how}"),)
