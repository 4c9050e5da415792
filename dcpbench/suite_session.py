"""One run of the suites: the pool behind the fixtures, what was counted, and what a verdict does to a test.

The pytest plugin holds one `SuiteSession`; this module knows nothing of pytest's hooks.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis

from dcpbench import codec
from dcpbench.case import Case
from dcpbench.known_defects import Defect, explains
from dcpbench.messages import Call, Observation
from dcpbench.oracle.judge import judge
from dcpbench.oracle.verdict import RULE_ERRORS, Finding, RuleBrokenError, UnknownError, Verdict
from dcpbench.ranks.pool import RankPool

__all__ = ["Settings", "SuiteSession"]

MAX_HANGS_PER_TEST = 3
SHRINKING_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a run, checked."""

    world_size: int
    device: str
    backends: tuple[str, ...]
    profile: str
    rank_timeout_s: float
    results: Path


@dataclass(slots=True)
class _Run:
    case: Case
    backend: str
    load_backend: str
    observations: tuple[Observation, ...]

    @property
    def has_hung(self) -> bool:
        return any(seen.outcome == "hung" for seen in self.observations)


@dataclass(repr=False)
class SuiteSession:
    """Runs cases, judges what verdicts mean for the test, and keeps the books.

    Attributes:
        counts: cases by (test, backend, status).
        known: findings that known defects explained, by defect.
        rows: a record per round trip, as plain dicts.
        unknown: why cases of the running test could not be judged.
        first_verdict_s: seconds from the start of the process to its first verdict.
        show_progress: takes a line for the terminal after each verdict; None where output is no terminal.
    """

    settings: Settings
    defects: dict[str, tuple[Defect, ...]]
    test: str = ""
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    known: Counter[tuple[str, str]] = field(default_factory=Counter)
    rows: list[dict[str, Any]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    first_verdict_s: float | None = None
    show_progress: Callable[[str], None] | None = None
    _test_start_s: float = 0.0
    _num_cases: int = 0
    _pool: RankPool | None = None
    _last: _Run | None = None
    _hung: dict[tuple[str, str, str], _Run] = field(default_factory=dict)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """Hypothesis prints the arguments of a failing test; the books of the run do not belong there."""
        printer.text(f"<{self.settings.world_size} ranks>")

    @property
    def pool(self) -> RankPool:
        """The ranks; started at the first use."""
        if self._pool is None:
            self._pool = RankPool(
                self.settings.world_size, device=self.settings.device, rank_timeout_s=self.settings.rank_timeout_s
            )
            self._pool.start()
        return self._pool

    def close(self) -> None:
        """Ends the ranks."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def begin_test(self, name: str) -> None:
        """Forgets what was special about the test before: its hangs, its unknowns."""
        self.test = name
        self._test_start_s, self._num_cases = time.monotonic(), 0
        self.unknown.clear()
        self._hung.clear()
        self._last = None
        if self._pool is not None:
            self._pool.rank_timeout_s = self.settings.rank_timeout_s

    def run(self, case: Case, backend: str, *, load_backend: str | None = None) -> tuple[Observation, ...]:
        """Runs ``case`` and returns what the ranks saw.

        A case that hangs costs a whole timeout, and shrinking would try many. After the first hang in a test the
        timeout is cut to 5 s, and after the third no new case is run: Hypothesis then settles on one of those seen.
        """
        key = (case.id, backend, load_backend or backend)
        if key in self._hung:
            self._last = self._hung[key]
            return self._last.observations
        if len(self._hung) >= MAX_HANGS_PER_TEST:
            hypothesis.reject()
        observations = self.pool.run(case, backend, load_backend=load_backend)
        self._last = _Run(case, backend, load_backend or backend, observations)
        if self._last.has_hung:
            self._hung[key] = self._last
            self.pool.rank_timeout_s = min(self.settings.rank_timeout_s, SHRINKING_TIMEOUT_S)
        return observations

    def call(self, target: str, world_size: int, *, distributed: bool = True, **arguments: Any) -> list[Any]:
        """Runs a function on ranks 0 to ``world_size - 1`` and returns what each returned.

        Raises:
            AssertionError: a rank raised, died or hung; the text has its error and stack.
        """
        observations = self.pool.step(Call(0, world_size, target, arguments, distributed))
        bad = [seen for seen in observations if seen.outcome != "ok"]
        if any(seen.outcome == "unconnected" for seen in bad):
            raise UnknownError(f"the ranks could not connect to each other: {bad[0].error}")
        if bad:
            seen = bad[0]
            text = f"{seen.error.text}\n{seen.error.traceback}" if seen.error else seen.stacks
            raise AssertionError(f"{target} {seen.outcome} on rank {seen.rank} of {world_size}: {text}")
        return [seen.value for seen in observations]

    def check(self, verdict: Verdict) -> None:
        """Counts ``verdict``; raises if it has a finding that no known defect explains.

        Raises:
            RuleBrokenError: the subclass of the first such finding's rule.
        """
        __tracebackhide__ = True
        run = self._last
        assert run is not None, "check() judges the case that pool.run() ran last"
        if self.first_verdict_s is None:
            self.first_verdict_s = _seconds_since_start()
        name = run.backend if run.backend == run.load_backend else f"{run.backend} to {run.load_backend}"
        new = self._unexplained(run, verdict)
        if new and not run.has_hung:
            verdict = self._once_more(run, verdict)
            new = self._unexplained(run, verdict)
        status = "KNOWN" if verdict.findings and not new else verdict.status
        self.counts[self.test, name, status] += 1
        if verdict.status == "UNKNOWN":
            self.unknown.append(verdict.reason)
        self._record(run, status)
        self._progress(name)
        if new:
            file = self.failure_file(run.case)
            replay = f"dcpbench replay {file} --backend {run.backend}"
            if run.load_backend != run.backend:
                replay += f" --load-backend {run.load_backend}"
            error = RULE_ERRORS[new[0].rule](new[0], run.case, run.backend, replay)
            error.evidence = _evidence(run, replace(verdict, findings=tuple(new)))
            raise error

    def _unexplained(self, run: _Run, verdict: Verdict) -> list[Finding]:
        """Returns the findings that no known defect explains, and counts the others."""
        defects = [d for backend in {run.backend, run.load_backend} for d in self.defects.get(backend, ())]
        new = []
        for finding in verdict.findings:
            if (defect := explains(defects, run.case, finding)) is None:
                new.append(finding)
            else:
                self.known[defect.backend, defect.id] += 1
        return new

    def _once_more(self, run: _Run, first: Verdict) -> Verdict:
        """Runs a case that failed again, on a process group that no other case has used.

        Returns:
            The second verdict; UNKNOWN if it breaks none of the rules that the first one broke.
        """
        run.observations = self.pool.run(run.case, run.backend, load_backend=run.load_backend, on_fresh_group=True)
        second = judge(run.case, run.observations)
        rules = {finding.rule for finding in first.findings}
        if rules & {finding.rule for finding in second.findings}:
            return second
        return Verdict("UNKNOWN", reason=f"not the same twice: {sorted(rules)} at first, then {second.status}")

    def _progress(self, backend: str) -> None:
        self._num_cases += 1
        if self.show_progress is not None:
            rate = self._num_cases / max(time.monotonic() - self._test_start_s, 1e-3)
            self.show_progress(f"{self._num_cases} cases on {backend}, {rate:.1f} a second: {self.test}")

    def failure_file(self, case: Case) -> Path:
        """Returns where the evidence of a failing case is written."""
        path = self.settings.results / "failures" / f"{case.id}.json"
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

    def write_evidence(self, error: RuleBrokenError) -> None:
        """Writes the file that ``dcpbench replay`` reads."""
        path = self.failure_file(error.case)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(error.evidence, indent=1), encoding="utf-8")
        temporary.replace(path)

    def _record(self, run: _Run, status: str) -> None:
        from dcpbench.bench.record import RunContext, records_of  # pandas costs 0.8 s: not before the first verdict

        context = RunContext(self.test, run.backend, run.load_backend, self.settings.device, status)
        self.rows += [codec.to_json(record) for record in records_of(run.case, run.observations, context)]


def _evidence(run: _Run, verdict: Verdict) -> dict[str, Any]:
    observations: Sequence[Observation] = run.observations
    return {
        "case": codec.to_json(run.case),
        "backend": run.backend,
        "load_backend": run.load_backend,
        "verdict": codec.to_json(verdict),
        "observations": codec.to_json(observations),
    }


def _seconds_since_start() -> float:
    """Returns how long this process has been running, by the kernel's clock."""
    started_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return uptime_s - started_ticks / os.sysconf("SC_CLK_TCK")
