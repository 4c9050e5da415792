"""The crash-state explorer: one save under strace, every image that a crash may leave, and a load of each.

scenario --> saves on ranks, the last one traced --> images_of(history_of(trace)) --> loads --> judge_crash
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dcpbench import objects
from dcpbench.case import Case, Layout, LeafLayout, Mesh, ObjectLeaf, Part, Placement, Step, TensorLeaf
from dcpbench.errors import DcpbenchError, UsageError
from dcpbench.faults.crash_images import Crash, Image, images_of
from dcpbench.faults.law import LoadSeen, Stakes, crash_findings, judge_crash
from dcpbench.faults.operations import Trace
from dcpbench.faults.storage_model import Tree, history_of
from dcpbench.faults.strace_log import parse
from dcpbench.faults.tracer import Strace, tracing_arguments
from dcpbench.faults.trees import read_tree
from dcpbench.faults.trials import Loader
from dcpbench.messages import Call, Observation, RunStep
from dcpbench.oracle.verdict import Finding
from dcpbench.ranks.pool import RankPool

__all__ = [
    "SCENARIOS",
    "CrashReport",
    "NotOffered",
    "SaveFailed",
    "Scenario",
    "TracedSave",
    "explore",
    "scratch_folder",
    "trace_save",
]

CHECKPOINT = "ckpt"


class SaveFailed(DcpbenchError):
    """A save that had to succeed, before any fault, did not."""


class NotOffered(DcpbenchError):
    """The backend has no such kind of save."""


@dataclass(frozen=True)
class Scenario:
    """What is saved, and what is there before.

    Attributes:
        name: of the scenario.
        num_ranks: ranks of the last save.
        before: saves before the last one, each (checkpoint, ranks, version).
        checkpoint: what the last save writes; a path of several folders that are not there is allowed.
        in_background: the last save is an ``async_save``, which is waited for.
    """

    name: str
    num_ranks: int = 2
    before: tuple[tuple[str, int, int], ...] = ()
    checkpoint: str = CHECKPOINT
    in_background: bool = False

    def case(self) -> Case:
        """Returns the case: all saves, the traced one last, then a load of each checkpoint in one process alone."""
        world_sizes = dict.fromkeys([*(num for _, num, _ in self.before), self.num_ranks])
        layouts = [*(_layout(num) for num in world_sizes), _ALONE]
        at = {num: number for number, num in enumerate(world_sizes)}
        saves = [Step("save", at[num], name, version) for name, num, version in self.before]
        action: Literal["save", "async_save"] = "async_save" if self.in_background else "save"
        saves.append(Step(action, at[self.num_ranks], self.checkpoint, len(self.before)))
        names = dict.fromkeys([self.checkpoint, *(name for name, _, _ in self.before)])
        loads = [Step("load", len(layouts) - 1, name) for name in names]
        return Case(f"crash-{self.name}", 1, _TENSORS, _OBJECTS, tuple(layouts), (*saves, *loads))

    def stakes(self) -> Stakes:
        """Returns what the last save may and may not do."""
        held = {name: version for name, _, version in self.before}
        old = held.pop(self.checkpoint, None)
        return Stakes(self.checkpoint, len(self.before), old, held)


_TENSORS = (
    TensorLeaf((Part("key", "model"), Part("key", "w")), (80, 64)),
    TensorLeaf((Part("key", "model"), Part("key", "b")), (7,), "int64"),
    TensorLeaf((Part("key", "half"),), (5, 3), "bfloat16"),
)
_OBJECTS = (ObjectLeaf((Part("key", "step"),), objects.encode(12)),)


def _layout(num_ranks: int) -> Layout:
    cut, whole = LeafLayout((Placement(0),)), LeafLayout((Placement(),))
    return Layout(num_ranks, Mesh(("dp",), (num_ranks,), tuple(range(num_ranks))), (cut, cut, whole))


_ALONE = Layout(1, Mesh(("dp",), (1,), (0,)), (LeafLayout(), LeafLayout(), LeafLayout()), distributed=False)

SCENARIOS: Mapping[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("first"),
        Scenario("nested", checkpoint="run/step-1"),
        Scenario("beside", before=(("older", 2, 0),)),
        Scenario("overwrite", before=((CHECKPOINT, 2, 0),)),
        Scenario("in-background", before=((CHECKPOINT, 2, 0),), in_background=True),
        Scenario("fewer-ranks", num_ranks=1, before=((CHECKPOINT, 2, 0),)),
        Scenario("four-ranks", num_ranks=4, before=((CHECKPOINT, 4, 0),)),
        Scenario("overwrite-again", before=(("older", 1, 0), (CHECKPOINT, 2, 1), (CHECKPOINT, 1, 2))),
    )
}


@dataclass(frozen=True)
class TracedSave:
    """The last save of a scenario, with the storage before and after it."""

    case: Case
    before: Tree
    trace: Trace
    after: Tree


@dataclass
class CrashReport:
    """What came of one scenario on one backend.

    Attributes:
        findings: one for each way in which the law breaks, with the image that shows it.
        num_images: images by kind of crash.
        num_bad: images that break the law.
        unknown: why nothing can be said, or "".
        is_complete: all images were looked at.
    """

    scenario: str
    backend: str
    case: Case
    trace: Trace = ()
    findings: list[tuple[Image, Finding]] = field(default_factory=list)
    num_images: Counter[str] = field(default_factory=Counter)
    num_bad: int = 0
    unknown: str = ""
    is_complete: bool = True


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields a new folder, in memory where there is some, and removes it in the end."""
    memory = "/dev/shm"  # noqa: S108  (mkdtemp makes a private folder of a random name in it)
    folder = Path(tempfile.mkdtemp(prefix="dcpbench-faults-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        yield folder.resolve()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def trace_save(pool: RankPool, backend: str, scenario: Scenario, root: Path) -> TracedSave:
    """Runs the saves of a scenario below ``root``, the last one under strace.

    Raises:
        StraceMissing: there is no strace that may attach to ranks.
        SaveFailed: a save did not succeed.
    """
    case = scenario.case()
    last = len(scenario.before)
    storage = root / "storage"
    with scratch_folder() as elsewhere:  # a first save imports and compiles things, which are none of ours
        run_step(pool, case, last, backend, elsewhere)
    storage.mkdir()
    for number in range(last):
        run_step(pool, case, number, backend, storage)
    before = read_tree(storage)
    ranks = threads_of(pool, scenario.num_ranks)
    pids = [pid for pid, _ in ranks]
    with Strace(pids, tracing_arguments(), root / "strace.log") as strace:
        run_step(pool, case, last, backend, storage)
    of_thread = {thread: rank for rank, (_, threads) in enumerate(ranks) for thread in threads}
    return TracedSave(case, before, parse(strace.text(), str(storage), of_thread), read_tree(storage))


def run_step(pool: RankPool, case: Case, step: int, backend: str, root: Path) -> tuple[Observation, ...]:
    """Runs a step that must succeed on its ranks.

    Raises:
        SaveFailed: it did not.
        NotOffered: the backend has no such step.
    """
    layout = case.layouts[case.steps[step].layout]
    seen = pool.step(RunStep(0, layout.world_size, case, step, backend, str(root), layout.distributed))
    if bad := [one for one in seen if one.outcome != "ok"]:
        error = bad[0].error
        if bad[0].outcome == "unsupported":
            raise NotOffered(error.text if error else f"the backend has no {case.steps[step].action}")
        raise SaveFailed(
            f"A {case.steps[step].action} without any fault {bad[0].outcome}: {error.text if error else ''}"
        )
    return seen


def threads_of(pool: RankPool, num_ranks: int) -> list[tuple[int, list[int]]]:
    """Returns pid and thread ids of each rank."""
    seen = pool.step(Call(0, num_ranks, "dcpbench.faults.warm_loads:identity", {}, distributed=num_ranks > 1))
    return [one.value for one in seen]


def explore(
    pool: RankPool,
    backend: str,
    scenario: str,
    *,
    kinds: Sequence[Crash] = ("kill", "ext4", "posix"),
    max_images: int | None = None,
) -> CrashReport:
    """Returns what crashes during the last save of a scenario do to a backend's checkpoints.

    Args:
        pool: of at least two ranks.
        backend: its specification.
        scenario: a name in :data:`SCENARIOS`.
        kinds: of crash.
        max_images: look at so many at most, spread evenly; None looks at all.

    Raises:
        StraceMissing: there is no strace that may attach to ranks.
        SaveFailed: a save did not succeed without any fault.
        NotOffered: the backend has no such kind of save.
        UsageError: no such scenario, or too few ranks.
    """
    if scenario not in SCENARIOS:
        raise UsageError(f"Unknown scenario {scenario!r}. Known: {', '.join(SCENARIOS)}.")
    chosen = SCENARIOS[scenario]
    with scratch_folder() as root:
        traced = trace_save(pool, backend, chosen, root)
        report = CrashReport(scenario, backend, traced.case, traced.trace)
        history = history_of(traced.trace, traced.before)
        images = images_of(history, kinds)
        if history.unsupported:
            report.unknown = f"calls that are not modelled: {'; '.join(history.unsupported[:3])}"
        elif dict(images_after(images).tree) != dict(traced.after):
            report.unknown = "the trace does not account for what is on storage after the save"
        if report.unknown:
            return report
        if max_images is not None and len(images) > max_images:
            images = [images[number * len(images) // max_images] for number in range(max_images)]
            report.is_complete = False
        steps = {
            traced.case.steps[number].checkpoint: number
            for number in range(len(chosen.before) + 1, len(traced.case.steps))
        }
        loads = Loader(pool, backend, traced.case, steps, str(root / "storage")).load([i.tree for i in images])
    return judged(report, chosen, images, loads)


def images_after(images: Sequence[Image]) -> Image:
    """Returns the image in which the save has returned and nothing is lost."""
    return next(image for image in images if image.is_after_return and not image.lost and image.crash == "kill")


def judged(
    report: CrashReport, scenario: Scenario, images: Sequence[Image], loads: Sequence[Mapping[str, LoadSeen]]
) -> CrashReport:
    """Returns the report with what the loads of all images say."""
    stakes, step = scenario.stakes(), len(scenario.before) + 1
    bad: list[tuple[Image, Finding]] = []
    for image, seen in zip(images, loads, strict=True):
        report.num_images[image.crash] += 1
        broken = judge_crash(report.case, step, stakes, image, seen)
        report.num_bad += bool(broken)
        bad += [(image, finding) for finding in broken]
    report.findings = crash_findings(report.trace, bad)
    return report
