"""Rules R6xx: states of models and optimizers, read, set, saved and resumed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from dcpbench.case import Case
from dcpbench.messages import Observation
from dcpbench.models.case import TrainingCase
from dcpbench.models.observed import TrainingView
from dcpbench.oracle import outcome
from dcpbench.oracle.training_states import Whole, differences, whole_state
from dcpbench.oracle.training_wants import expected_keys, has_state, wanted_after_set
from dcpbench.oracle.verdict import Finding, Verdict

__all__ = ["LOSS_BOUNDS", "judge_training"]

LOSS_BOUNDS: Final = {"float32": (1e-4, 5e-2), "float64": (1e-9, 5e-2), "bfloat16": (5e-2, 0.5)}
"""How far losses may lie apart under another parallelism, relative to the larger of the loss and 1, by dtype of the
model: the first loss after a resume, which comes of a forward pass alone, and later ones, in which optimizers that look
at signs of gradients make much of little."""


def judge_training(case: TrainingCase, observations: Sequence[Observation]) -> Verdict:
    """Returns the verdict on a training case, as :func:`dcpbench.judge` does."""
    for seen in observations:
        if seen.outcome == "unconnected":
            return Verdict("UNKNOWN", reason=f"the ranks could not connect: {outcome.error_line(seen)}")
        if seen.outcome == "unsupported":
            return Verdict("UNSUPPORTED", reason=outcome.error_line(seen), checked=_rules_tested(case))
        if seen.outcome == "raised" and seen.phase in ("build", "train", "observe"):
            return Verdict("UNKNOWN", reason=f"dcpbench itself failed, in {seen.phase}: {outcome.error_line(seen)}")
    findings: list[Finding] = []
    saved: _Saved | None = None
    for number, step in enumerate(case.steps):
        seen_here = [seen for seen in observations if seen.step == number]
        if broken := list(_outcomes(case, number, seen_here)):
            return Verdict("FAIL", (*findings, *broken))
        if len(seen_here) != case.layouts[step.layout].world_size:
            return Verdict("UNKNOWN", reason=f"step {number} was not observed on all ranks")
        views = [cast("TrainingView", seen.value) for seen in seen_here]
        judged = _Judged(case, number)
        if step.action == "load":
            assert saved is not None, "a training case saves before it loads"
            findings += judged.loaded(views, saved)
            continue
        tensors, values, problem = whole_state([view.held for view in views])
        if problem:
            return Verdict("UNKNOWN", reason=f"before anything was read, {problem}")
        saved = _Saved(tensors, values, step.layout, views)
        findings += judged.read(views, saved)
    return Verdict("FAIL", tuple(findings)) if findings else Verdict("PASS", checked=_rules_tested(case))


def _rules_tested(case: TrainingCase) -> tuple[str, ...]:
    found = {"R501", "R503", "R504", "R601", "R602"}
    if case.max_world_size > 1:
        found.add("R502")
    for step in case.steps:
        if step.action == "read":
            found.add("R603")
        if step.restores:
            found.update(("R607", "R608", "R609"))
        if step.action == "load":
            found.add("R604")
            if case.is_resumed_whole and case.num_after:
                source = next(other for other in case.steps if other.action == "save")
                found.add("R605" if case.layouts[source.layout] == case.layouts[step.layout] else "R606")
    return tuple(sorted(found))


@dataclass(frozen=True, slots=True)
class _Saved:
    tensors: dict[str, Whole]
    values: dict[str, Any]
    layout: int
    views: list[TrainingView]

    @property
    def keys(self) -> set[str]:
        return {*self.tensors, *self.values}


def _outcomes(case: TrainingCase, number: int, seen: Sequence[Observation]) -> Iterator[Finding]:
    # outcomes are judged alike: what is looked at are the step's switches and the lines of the setting
    for finding in outcome.findings(cast("Case", case), number, seen):
        one = next(one for one in seen if one.rank == finding.rank)
        if finding.rule == "R501":
            what = {"get": "reading", "set": "setting", "save": "saving", "load": "loading", "resume": "training after"}
            headline = f"{what.get(one.phase, one.phase)} a valid state raised on all {one.world_size} ranks"
            yield replace(finding, headline=headline, rule="R605" if one.phase == "resume" else "R501")
        else:
            yield replace(finding, headline=finding.headline.replace(f" in {one.action}", f" in {one.phase}", 1))


@dataclass(frozen=True, slots=True)
class _Course:
    """How training went: its losses, and digests of what a rank held at its end.

    Attributes:
        name: which one it is; of one that is judged, the rule that it must keep.
    """

    name: str
    losses: tuple[str, ...]
    ends: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Judged:
    """One step of a case, to be judged."""

    case: TrainingCase
    number: int

    def read(self, views: Sequence[TrainingView], saved: _Saved) -> Iterator[Finding]:
        for rank, view in enumerate(views):
            yield from self._said(rank, view, saved)
            yield from self._unchanged(rank, view, saved)
            if view.restored is not None:
                yield from self._restored(rank, view, saved)

    def _said(self, rank: int, view: TrainingView, saved: _Saved) -> Iterator[Finding]:
        """Yields what is wrong with what the state dict says."""
        assert view.read is not None
        wanted = expected_keys(self.case, saved.keys, rank)
        tensors = {said: saved.tensors[key] for said, key in wanted.items() if key in saved.tensors}
        values = {said: saved.values[key] for said, key in wanted.items() if key in saved.values}
        for wrong in differences(tensors, values, view.read, sorted(wanted)):
            rule = "R602" if wrong.kind == "missing" else "R601"
            verb = "is missing in" if wrong.kind == "missing" else "is not the model's or optimizer's own in"
            yield self._finding(rule, f"{wrong.key!r} {verb} what was read", rank, wrong.key, wrong.lines)
        for key in sorted({*view.read.tensors, *view.read.objects} - wanted.keys()):
            if not self._may_be_added(key, rank, saved):
                lines = (("expected", f"keys such as {min(wanted, default='none')!r}"), ("got", f"{key!r} as well"))
                yield self._finding("R602", f"{key!r} was read, which nothing is called", rank, key, lines)
        yield from self._cut(rank, view)

    def _may_be_added(self, key: str, rank: int, saved: _Saved) -> bool:
        """Reads as: the optimizer keeps nothing for the parameter yet, so that the key says what it will begin with."""
        on_this_rank = not (self.case.options.is_on_rank_0 and rank)
        return on_this_rank and key.startswith("optim/state/") and not has_state(key, saved.keys)

    def _cut(self, rank: int, view: TrainingView) -> Iterator[Finding]:
        """Yields the first tensor that was read whole where this rank's part was asked for, or the other way."""
        assert view.read is not None
        for key, shard in view.read.tensors.items():
            own = view.held.tensors.get(key)
            is_full = shard.region.shape == shard.shape
            is_right = is_full if self.case.options.full_state_dict else own is None or own.region == shard.region
            if not is_right:
                want = "the whole tensor" if self.case.options.full_state_dict else "the part that this rank holds"
                part = f"a part of shape {list(shard.region.shape)} of {list(shard.shape)}"
                lines = (("expected", want), ("got", part))
                yield self._finding("R601", f"{key!r} was read in another part than asked for", rank, key, lines)
                return

    def _unchanged(self, rank: int, view: TrainingView, saved: _Saved) -> Iterator[Finding]:
        changed = [key for key in view.changed if key in saved.keys]
        if changed:
            lines = (("expected", "all as it was before"), ("got", f"{len(changed)} keys changed: {changed[:3]}"))
            yield self._finding("R603", f"reading changed {changed[0]!r}", rank, changed[0], lines)
        elif self.case.steps[self.number].action == "read":
            alone = _Course("without reading", view.losses_alone, view.ends_alone)
            there = _Course("R603", view.losses, view.ends)
            yield from self._same("reading changed the training after it", rank, alone, there)

    def _restored(self, rank: int, view: TrainingView, saved: _Saved) -> Iterator[Finding]:
        assert view.restored is not None
        wanted = sorted(wanted_after_set(self.case, saved.keys, is_same_loop=True))
        wrongs = differences(saved.tensors, saved.values, view.restored, wanted)
        for wrong in wrongs:
            headline = f"{wrong.key!r} is another after what was read was set again"
            yield self._finding("R607", headline, rank, wrong.key, wrong.lines)
        if view.tied:
            lines = (
                ("expected", "model and optimizers have memory of their own"),
                ("got", f"{len(view.tied)} keys change with the state dict: {list(view.tied[:3])}"),
            )
            headline = f"{view.tied[0]!r} is still the memory of the state dict that was set"
            yield self._finding("R608", headline, rank, view.tied[0], lines)
        if view.spoiled:
            got = f"{len(view.spoiled)} entries are others: {list(view.spoiled[:3])}"
            lines = (("expected", "the state dict is as it was, to be set again"), ("got", got))
            yield self._finding("R609", f"setting changed the state dict at {view.spoiled[0]!r}", rank, "", lines)
        if not wrongs and self.case.is_resumed_whole:
            alone = _Course("without reading", view.losses_alone, view.ends_alone)
            there = _Course("R607", view.losses_restored, view.ends_restored)
            yield from self._same("training goes another way after what was read was set again", rank, alone, there)

    def loaded(self, views: Sequence[TrainingView], saved: _Saved) -> Iterator[Finding]:
        wanted = sorted(wanted_after_set(self.case, saved.keys, is_same_loop=False))
        is_same_layout = self.case.layouts[saved.layout] == self.case.layouts[self.case.steps[self.number].layout]
        for rank, view in enumerate(views):
            wrongs = differences(saved.tensors, saved.values, view.held, wanted)
            for wrong in wrongs:
                headline = f"{wrong.key!r} is not what was saved, after load and set"
                yield self._finding("R604", headline, rank, wrong.key, wrong.lines)
            if wrongs or not self.case.is_resumed_whole:
                continue
            before = saved.views[rank if is_same_layout else 0]
            if is_same_layout:
                uninterrupted = _Course("uninterrupted", before.losses, before.ends)
                there = _Course("R605", view.losses, view.ends)
                yield from self._same("resumed training goes another way", rank, uninterrupted, there)
            else:
                yield from self._near(rank, before.losses, view.losses)

    def _same(self, headline: str, rank: int, wanted: _Course, got: _Course) -> Iterator[Finding]:
        """Yields the first loss, or the first part of the state at the end, that is not the same to the bit."""
        for place, (one, other) in enumerate(zip(wanted.losses, got.losses, strict=True), 1):
            if one != other:
                lines = (("at", f"loss {place} after it"), ("expected", f"{one}, {wanted.name}"), ("got", other))
                yield self._finding(got.name, headline, rank, "", lines)
                return
        different = sorted(key for key in wanted.ends if got.ends.get(key) != wanted.ends[key])
        if different:
            lines = (
                ("at", f"the end, {len(got.losses)} steps after it"),
                ("expected", f"the state {wanted.name}"),
                ("got", f"{len(different)} keys differ: {different[:3]}"),
            )
            yield self._finding(got.name, headline, rank, "", lines)

    def _near(self, rank: int, wanted: tuple[str, ...], losses: tuple[str, ...]) -> Iterator[Finding]:
        for place, (want, got) in enumerate(zip(wanted, losses, strict=True)):
            one, other = float.fromhex(want), float.fromhex(got)
            bound = LOSS_BOUNDS[self.case.model.dtype][min(place, 1)] * max(1.0, abs(one))
            if not (abs(one - other) <= bound or one == other or (math.isnan(one) and math.isnan(other))):
                lines = (
                    ("at", f"loss {place + 1} after it"),
                    ("expected", f"{one:.8g} within {bound:.2g}, uninterrupted"),
                    ("got", f"{other:.8g}"),
                )
                yield self._finding("R606", "resumed training has other losses", rank, "", lines)
                return

    def _finding(self, rule: str, headline: str, rank: int, key: str, lines: tuple[tuple[str, str], ...]) -> Finding:
        size = self.case.layouts[self.case.steps[self.number].layout].world_size
        headline = f"{headline}, on rank {rank} of {size}"
        return Finding(rule, headline, (*lines, *self.case.setting(self.number)), key, rank, self.number)
