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
from dcpbench.backends import parts
from dcpbench.capabilities import CAPABILITIES
from dcpbench.case import Case
from dcpbench.case_files import AnyCase
from dcpbench.known_defects import Defect, avoided, defects_of, explains
from dcpbench.messages import Call, Observation
from dcpbench.needs import with_absences
from dcpbench.oracle.absences import works_though_absent
from dcpbench.oracle.judge import judge
from dcpbench.oracle.verdict import RULE_ERRORS, Finding, RuleBrokenError, UnknownError, Verdict
from dcpbench.ranks.backends_seen import BackendsSeen
from dcpbench.ranks.pool import RankPool
from dcpbench.report.certificate import Certificate, Failure, Tally, entries_of, now, together_of, versions

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
    case: AnyCase
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
        defects: known defects, by backend.
        defect_files: the file of known defects, by backend; it need not exist.
        torch_parts: for a backend that is not known by name, the parts of torch's DCP that it is built on.
        counts: cases by (test, backend, status).
        known: findings that known defects explained, by defect.
        absences: cases that need one absent capability alone, by backend, capability, and whether they passed.
        tally: cases by rule, backend and how they went, for the certificate.
        failures: the shrunk cases of this run.
        rows: a record per round trip, as plain dicts.
        is_whole: all suites are run, not a selection of their tests.
        unknown: why cases of the running test could not be judged.
        first_verdict_s: seconds from the start of the process to its first verdict.
        show_progress: takes a line for the terminal after each verdict; None where output is no terminal.
    """

    settings: Settings
    defects: dict[str, tuple[Defect, ...]]
    torch_parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    defect_files: dict[str, Path] = field(default_factory=dict)
    test: str = ""
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    known: Counter[tuple[str, str]] = field(default_factory=Counter)
    absences: Counter[tuple[str, str, bool]] = field(default_factory=Counter)
    tally: Tally = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    is_whole: bool = False
    unknown: list[str] = field(default_factory=list)
    first_verdict_s: float | None = None
    show_progress: Callable[[str], None] | None = None
    _test_start_s: float = 0.0
    _num_cases: int = 0
    _pool: RankPool | None = None
    _last: _Run | None = None
    _hung: dict[tuple[str, str, str], _Run] = field(default_factory=dict)
    _seen: BackendsSeen | None = None

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

    @property
    def backends(self) -> BackendsSeen:
        """What the ranks say of backends."""
        if self._seen is None:
            self._seen = BackendsSeen(lambda: self.pool)
        return self._seen

    def close(self) -> None:
        """Ends the ranks, and leaves the places that backends brought."""
        if self._seen is not None:
            self._seen.close()
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

    def run(self, case: AnyCase, backend: str, *, load_backend: str | None = None) -> tuple[Observation, ...]:
        """Runs ``case`` and returns what the ranks saw.

        A case that hangs costs a whole timeout, and shrinking would try many. After the first hang in a test the
        timeout is cut to 5 s, and after the third no new case is run: Hypothesis then settles on one of those seen.
        """
        defects = self._defects(backend, load_backend or backend)
        if hypothesis.currently_in_test_context() and (defect := avoided(defects, case)) is not None:
            self.known[defect.backend, defect.id] += 1
            hypothesis.reject()
        key = (case.id, backend, load_backend or backend)
        if key in self._hung:
            self._last = self._hung[key]
            return self._last.observations
        if len(self._hung) >= MAX_HANGS_PER_TEST:
            hypothesis.reject()
        observations = self._observe(case, backend, load_backend or backend)
        self._last = _Run(case, backend, load_backend or backend, observations)
        if self._last.has_hung:
            self._hung[key] = self._last
            self.pool.rank_timeout_s = min(self.settings.rank_timeout_s, SHRINKING_TIMEOUT_S)
        return observations

    def _observe(
        self, case: AnyCase, backend: str, load_backend: str, *, on_fresh_group: bool = False
    ) -> tuple[Observation, ...]:
        """Returns what the ranks saw, with what the backends lack of what the case needs."""
        seen, place = self.backends, self.backends.place(backend)
        found = self.pool.run(case, backend, load_backend=load_backend, place=place, on_fresh_group=on_fresh_group)
        absent = {"save": seen.declared(backend), "load": seen.declared(load_backend)}
        return with_absences(case, found, absent) if any(absent.values()) else found

    def lacks(self, backend: str, *capabilities: str) -> str:
        """Returns why a test that needs ``capabilities`` cannot be run on ``backend``, or "" if it can."""
        missing = [name for name in capabilities if name in self.backends.absent(backend)]
        return f"{backend} has no {', '.join(missing)}" if missing else ""

    def understated(self) -> list[Failure]:
        """Returns a failure for each capability that a backend declares absent although it works."""
        found = []
        for backend, capability, has_passed in sorted(self.absences):
            if has_passed and not self.absences[backend, capability, False]:
                text = works_though_absent(backend, capability, self.absences[backend, capability, True]).text()
                found.append(Failure("C003", backend, text, ""))
        return found

    def unmatched(self) -> list[tuple[str, str]]:
        """Returns backend and id of known defects that explained nothing; none where too little was run to say so."""
        if not self.is_whole or self.settings.profile == "quick":
            return []
        listed = {(name, defect.id) for name in self.settings.backends for defect in self.defects[name]}
        return sorted(listed - set(self.known))

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
        new, explained = self._sorted(run, verdict)
        if new and not run.has_hung:
            verdict = self._once_more(run, verdict)
            new, explained = self._sorted(run, verdict)
        self.known.update((defect.backend, defect.id) for _, defect in explained)
        self._tally(name, verdict, new, explained)
        if len(verdict.absent) == 1 and verdict.status != "UNKNOWN":
            self.absences[run.backend, verdict.absent[0], verdict.status == "PASS"] += 1
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

    def _sorted(self, run: _Run, verdict: Verdict) -> tuple[list[Finding], list[tuple[Finding, Defect]]]:
        """Returns the findings that no known defect explains, and the others with what explains them."""
        defects = self._defects(run.backend, run.load_backend)
        new: list[Finding] = []
        explained: list[tuple[Finding, Defect]] = []
        for finding in verdict.findings:
            if (defect := explains(defects, run.case, finding)) is None:
                new.append(finding)
            else:
                explained.append((finding, defect))
        return new, explained

    def _defects(self, *backends: str) -> list[Defect]:
        """Returns the known defects that a run on ``backends`` may show."""
        return [d for name in dict.fromkeys(backends) for d in defects_of(name, self.defects, self.torch_parts)]

    def _tally(
        self, backend: str, verdict: Verdict, new: Sequence[Finding], explained: Sequence[tuple[Finding, Defect]]
    ) -> None:
        """Counts for each rule how the case went. Where a rule was broken, the others are not known to hold."""
        if verdict.status in ("PASS", "UNSUPPORTED"):
            how = "pass" if verdict.status == "PASS" else "unsupported"
            self.tally.update((rule, backend, how) for rule in verdict.checked)
            if verdict.absent and how == "unsupported":
                self.tally.update((rule, backend, "pass") for rule in ("C001", "C002", "C003"))
        broken = {
            (finding.rule, "known" if defect.backend == backend else "inherited") for finding, defect in explained
        }
        broken |= {(finding.rule, "fail") for finding in new}
        self.tally.update((rule, backend, how) for rule, how in broken)

    def _once_more(self, run: _Run, first: Verdict) -> Verdict:
        """Runs a case that failed again, on a process group that no other case has used.

        Returns:
            The second verdict; UNKNOWN if it breaks none of the rules that the first one broke.
        """
        run.observations = self._observe(run.case, run.backend, run.load_backend, on_fresh_group=True)
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

    def failure_file(self, case: AnyCase) -> Path:
        """Returns where the evidence of a failing case is written."""
        path = self.settings.results / "failures" / f"{case.id}.json"
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

    def guilty_part(self, error: RuleBrokenError) -> str:
        """Returns a line on the part of a mixed backend that a failure moves with; "" if it was none that is mixed.

        The case is run on all combinations of the parts of the two backends.
        """
        names = parts.names_in(error.backend)
        if len(names) != 2:
            return ""
        rule = error.finding.rule
        outcomes = {}
        for specification in parts.combinations(*names):
            verdict = judge(error.case, self._observe(error.case, specification, specification, on_fresh_group=True))
            outcomes[specification] = rule in {finding.rule for finding in verdict.findings}
        guilty = parts.guilty_part(outcomes)
        num_failing = sum(outcomes.values())
        if guilty is None:
            return f"none alone: {num_failing} of {len(outcomes)} combinations of parts fail"
        return f"the {guilty[0]} of {guilty[1]}: what has it fails, {num_failing} of {len(outcomes)} combinations"

    def write_evidence(self, error: RuleBrokenError) -> Path:
        """Writes the file that ``dcpbench replay`` reads; returns its path."""
        path = self.failure_file(error.case)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(error.evidence, indent=1), encoding="utf-8")
        return temporary.replace(path)

    def certificate(self, seed: str) -> Certificate:
        """Returns how each rule stands on each backend of this run."""
        used = self.settings
        absent = {name: self.backends.absent(name) for name in used.backends}
        num_cases = Counter[tuple[str, bool]]()
        for (_, backend, status), number in self.counts.items():
            num_cases[backend, status == "UNKNOWN"] += number
        judged = {name: num_cases[name, False] + num_cases[name, True] for name, _ in num_cases}
        return Certificate(
            backends=used.backends,
            entries=entries_of(used.backends, self.tally, [*self.failures, *self.understated()], absent),
            absent=tuple(tuple(sorted(absent[name], key=list(CAPABILITIES).index)) for name in used.backends),
            num_cases=tuple(judged.get(name, 0) for name in used.backends),
            together=together_of(used.backends, judged, self.tally, self.failures),
            unmatched=tuple(self.unmatched()),
            num_unknown=tuple(num_cases[name, True] for name in used.backends),
            profile=used.profile,
            world_size=used.world_size,
            device=used.device,
            seed=seed,
            seconds=round(_seconds_since_start(), 1),
            made_at=now(),
            versions=versions(),
        )

    def _record(self, run: _Run, status: str) -> None:
        if not isinstance(run.case, Case):  # a case of training measures nothing
            return
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
