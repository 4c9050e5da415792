"""Live faults: one system call of one rank fails, or kills it, while ranks save.

    a save under strace --> its calls on one rank --> the same save again for each, with that call failing --> loads

Which call is hit is said by its path and number: the traced save and the next one make the same calls on a rank, as
long as the backend names its files the same way each time. Where it does not, nothing is hit, and the trial says so.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcpbench.case import Case
from dcpbench.faults.crash import SCENARIOS, Scenario, scratch_folder, threads_of, trace_save
from dcpbench.faults.law import LoadSeen, version_of, what_it_holds
from dcpbench.faults.operations import SyncAll, Trace, Unsupported
from dcpbench.faults.tracer import Strace
from dcpbench.faults.trees import put_tree, read_tree
from dcpbench.faults.trials import Loader
from dcpbench.messages import Observation, RunStep
from dcpbench.oracle.verdict import Finding
from dcpbench.ranks.pool import RankPool

__all__ = ["FAULTS", "Fault", "LiveReport", "LiveTrial", "faults_of", "judge_live", "try_live"]

FAULTS: Mapping[str, tuple[str, ...]] = {
    "EIO": ("write", "writev", "pwrite64", "fsync", "fdatasync", "close", "openat", "rename", "unlink"),
    "ENOSPC": ("write", "writev", "pwrite64", "openat", "mkdir", "rename", "fsync"),
    "EACCES": ("openat", "mkdir", "rename", "unlink"),
    "EINTR": ("write", "writev", "pwrite64", "openat", "fsync"),
    "short": ("write", "writev", "pwrite64"),
    "kill": ("write", "writev", "pwrite64", "fsync", "openat", "rename", "unlink", "mkdir", "close", "fdatasync"),
}
"""Faults, and the calls that may meet them. ``short`` is a write that took no byte; ``kill`` ends the process there."""

STEP_TIMEOUT_S = 20.0

MAX_TRIES = 6
"""Where ranks race for a call, such as the making of a folder, the one that is waited for may not make it each time."""


@dataclass(frozen=True)
class Fault:
    """One planned harm.

    Attributes:
        kind: a key of :data:`FAULTS`.
        rank: on which rank.
        operation: number of the operation in the traced save.
        call: the system call.
        path: its file, relative to the storage.
        when: the how-manieth such call on the path, on that rank, counted from 1.
    """

    kind: str
    rank: int
    operation: int
    call: str
    path: str
    when: int

    def __str__(self) -> str:
        return f"{self.kind} at {self.call} {self.when} of {self.path or '.'} on rank {self.rank}"

    def arguments(self, root: str) -> list[str]:
        """Returns the options of strace that do it."""
        what = {"short": "retval=0", "kill": "signal=SIGKILL"}.get(self.kind, f"error={self.kind}")
        path = f"{root}/{self.path}" if self.path else root
        return ["-P", path, "-e", f"trace={self.call}", "-e", f"inject={self.call}:{what}:when={self.when}"]


@dataclass(frozen=True)
class LiveTrial:
    """What one fault led to.

    Attributes:
        observations: one for each rank of the save.
        was_hit: the fault was met.
        loads: afterwards, by checkpoint.
    """

    fault: Fault
    observations: tuple[Observation, ...]
    was_hit: bool
    loads: Mapping[str, LoadSeen]


@dataclass(frozen=True)
class LiveReport:
    """What live faults did to one backend in one scenario."""

    backend: str
    scenario: str
    case: Case
    trials: list[LiveTrial]
    findings: list[tuple[LiveTrial, Finding]]


def faults_of(trace: Trace, kinds: Sequence[str] = tuple(FAULTS)) -> Iterator[Fault]:
    """Yields each fault that some operation of a trace can meet, operation by operation."""
    seen: Counter[tuple[int, str, str]] = Counter()
    for number, operation in enumerate(trace):
        if isinstance(operation, SyncAll | Unsupported):
            continue
        key = (operation.rank, operation.call, operation.path)
        seen[key] += 1
        for kind in kinds:
            if operation.call in FAULTS[kind]:
                yield Fault(kind, operation.rank, number, operation.call, operation.path, seen[key])


def try_live(
    pool: RankPool,
    backend: str,
    scenario: str = "overwrite",
    *,
    kinds: Sequence[str] = tuple(FAULTS),
    max_faults: int | None = None,
) -> LiveReport:
    """Returns what single faults during the last save of a scenario do to a backend.

    Args:
        pool: of as many ranks as the scenario needs.
        backend: its specification.
        scenario: a name in :data:`dcpbench.faults.crash.SCENARIOS`.
        kinds: of fault.
        max_faults: so many at most, spread evenly; None tries all.

    Raises:
        StraceMissing: there is no strace that may attach to ranks.
        SaveFailed: a save did not succeed without any fault.
    """
    chosen = SCENARIOS[scenario]
    with scratch_folder() as root:
        traced = trace_save(pool, backend, chosen, root)
        planned = list(faults_of(traced.trace, kinds))
        if max_faults is not None and len(planned) > max_faults:
            planned = [planned[number * len(planned) // max_faults] for number in range(max_faults)]
        trials = []
        for fault in planned:
            for _ in range(MAX_TRIES):
                put_tree(root / "storage", traced.before)
                trial = _trial(pool, backend, chosen, traced.case, fault, root)
                if trial.was_hit:
                    break
            trials.append(trial)
    found = [(trial, finding) for trial in trials for finding in judge_live(traced.case, chosen, trial)]
    return LiveReport(backend, scenario, traced.case, trials, found)


def _trial(  # noqa: PLR0917
    pool: RankPool, backend: str, scenario: Scenario, case: Case, fault: Fault, root: Path
) -> LiveTrial:
    storage, last = root / "storage", len(scenario.before)
    layout = case.layouts[case.steps[last].layout]
    pid = threads_of(pool, scenario.num_ranks)[fault.rank][0]
    usual_s, pool.rank_timeout_s = pool.rank_timeout_s, STEP_TIMEOUT_S
    try:
        with Strace([pid], fault.arguments(str(storage)), root / "inject.log") as strace:
            seen = pool.step(RunStep(0, layout.world_size, case, last, backend, str(storage), layout.distributed))
    finally:
        pool.rank_timeout_s = usual_s
    was_hit = "INJECTED" in strace.text() or "SIGKILL" in strace.text()
    steps = {case.steps[number].checkpoint: number for number in range(last + 1, len(case.steps))}
    (loads,) = Loader(pool, backend, case, steps, str(storage)).load([read_tree(storage)])
    return LiveTrial(fault, seen, was_hit, loads)


def judge_live(case: Case, scenario: Scenario, trial: LiveTrial) -> list[Finding]:
    """Returns what is wrong with how ranks and storage took one fault. Pure."""
    if not trial.was_hit:
        return []
    stakes, step = scenario.stakes(), len(scenario.before) + 1
    versions = [*dict.fromkeys([stakes.new, *([] if stakes.old is None else [stakes.old]), *stakes.others.values()])]
    outcomes = {seen.rank: seen.outcome for seen in trial.observations}
    ended = ", ".join(f"rank {rank} {outcome}" for rank, outcome in outcomes.items())
    facts = [("fault", str(trial.fault)), ("ranks", ended)]
    after = trial.loads[stakes.checkpoint]
    held = version_of(case, step, after, versions)
    text = what_it_holds(case, step, after, versions) if after.outcome == "loaded" else " ".join(after.error.split())
    found = []

    def add(rule: str, what: str, *more: tuple[str, str]) -> None:
        found.append(Finding(rule, f"{trial.fault.kind}: {what}", (*facts, *more), step=step))

    survivors = {
        rank: outcome for rank, outcome in outcomes.items() if (trial.fault.kind, rank) != ("kill", trial.fault.rank)
    }
    if "hung" in survivors.values():
        add("R503", f"a rank waits for ever after a fault at {trial.fault.call}")
    elif "died" in survivors.values():
        add("R504", f"a rank that met no signal died of a fault at {trial.fault.call}")
    elif len(set(survivors.values())) > 1 and trial.fault.kind != "kill":
        add("R502", f"ranks disagree about a save in which {trial.fault.call} failed")
    for name, version in stakes.others.items():
        if version_of(case, step, trial.loads[name], [version]) != version:
            add("R803", f"checkpoint {name!r} no longer loads as it was")
    returned = all(outcome == "ok" for outcome in outcomes.values())
    if after.outcome in ("died", "hung"):
        add("R805", f"a load after it {after.outcome}", ("got", text[:200]))
    elif after.outcome == "loaded" and held not in (stakes.new, stakes.old):
        add("R801", f"after a fault at {trial.fault.call} the checkpoint is neither save whole", ("got", text[:200]))
    elif returned and held != stakes.new:
        add("R806", f"the save returned although {trial.fault.call} failed", ("got", text[:200]))
    elif not returned and stakes.old is not None and held is None:
        add("R802", f"after a fault at {trial.fault.call} the old checkpoint is gone", ("got", text[:200]))
    if cause := _unnamed(trial):
        add("R807", f"the error after a fault at {trial.fault.call} does not name it", ("error", cause))
    return found


def _unnamed(trial: LiveTrial) -> str:
    """Returns the error of a rank that does not name the cause, or "" if all do."""
    if trial.fault.kind not in ("EIO", "ENOSPC", "EACCES"):
        return ""
    words = os.strerror(getattr(errno, trial.fault.kind))
    for seen in trial.observations:
        if seen.outcome == "raised" and seen.error is not None and words not in seen.error.text:
            return f"rank {seen.rank}: {' '.join(seen.error.text.split())[-200:]}"
    return ""
