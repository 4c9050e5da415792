"""What the commands ``dcpbench faults …`` print: the page of all faults, one trace, one image again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from dcpbench.faults import corruption, crash, hostile, live
from dcpbench.faults.law import what_it_holds
from dcpbench.faults.score import OUTCOMES
from dcpbench.faults.trials import Loader
from dcpbench.faults.verdicts import read_image
from dcpbench.oracle.verdict import Finding
from dcpbench.ranks.pool import RankPool
from dcpbench.rules import RULES

__all__ = ["faults_page", "replay_lines", "trace_lines"]

MAX_IMAGES = 3000
"""Of one save on one backend."""

_HEAD = """# Under faults

What crashes, failing system calls, damaged bytes and hostile checkpoints do, side by side. Made by
`dcpbench faults table` (`make faults`); how it is found out stands at the end. A rule that is broken stands with the
number of cases that break it; the rules are in [rules.md](rules.md).
"""
_TAIL = """## How it is found out

**Crashes.** The ranks of one save are traced with strace. From the trace every storage is built that a crash may leave:
when processes are killed (each set of operations that ranks can have done, and torn writes), when power is lost under
ext4's default ordering, and when it is lost with no more than what POSIX promises. Where that is too many, a bounded
choice is made, which `dcpbench/faults/crash_images.py` describes. What two ranks do is taken to be in a fixed order
only if one can have heard of the other in between, or if their paths meet; what a rank learnt by looking at the folder
is not followed. Each different storage (3000 of one save at most, spread evenly) is loaded in one warm process and must
bring the old checkpoint whole, the new one whole, or, where there was no old one, a clear error.

**Live faults.** The same save is run again for each of its calls, with that call failing on one rank, or killing it.
`short` is a write that takes no byte. All ranks must raise in time and name the cause, or the save must be whole.

**Damage.** A checkpoint of two ranks is damaged in one place and loaded whole. *Wrong* means that the load returned
other values; the interval is Wilson's, for 95 %.

**Hostile checkpoints.** Checkpoints in DCP's format, made bad on purpose, are loaded in a process of limited memory. In
DCP's format a value that is no tensor is a pickle, and loading it may run what it names; `value-item-that-calls` shows
that and is not judged. Load checkpoints from sources that you trust, whatever reads them.
"""


def faults_page(backends: Sequence[str], num_trials: int, tell: Callable[[str], None]) -> str:
    """Returns the page ``docs/faults.md`` for the given backends.

    Args:
        backends: their specifications.
        num_trials: of damage, for each backend.
        tell: takes a line of progress.

    Raises:
        StraceMissing: there is no strace that may attach to ranks.
        SaveFailed: a save fails without any fault.
    """
    with RankPool(4) as pool:
        parts = [
            _crash_table(pool, backends, tell),
            _live_table(pool, backends, tell),
            _damage_table(pool, backends, num_trials, tell),
            _hostile_table(pool, backends, tell),
        ]
    return "\n".join([_HEAD, *parts, _TAIL]).rstrip()


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    return "\n".join([f"## {title}", "", *lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def _broken(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.rule for finding in findings)
    return ", ".join(f"{code} {RULES[code].name} ({count})" for code, count in sorted(counts.items())) or "none"


def _crash_table(pool: RankPool, backends: Sequence[str], tell: Callable[[str], None]) -> str:
    rows = []
    total: Counter[str] = Counter()
    for scenario in crash.SCENARIOS:
        for backend in backends:
            try:
                report = crash.explore(pool, backend, scenario, max_images=MAX_IMAGES)
            except crash.NotOffered:
                rows.append([scenario, backend, *["-"] * 5, "not offered"])
                continue
            num_images = sum(report.num_images.values())
            total[backend] += num_images
            kinds = [str(report.num_images[kind]) for kind in ("kill", "ext4", "posix")]
            verdict = "UNKNOWN" if report.unknown else _ways([finding for _, finding in report.findings])
            rows.append([scenario, backend, str(len(report.trace)), *kinds, str(report.num_bad), verdict])
            tell(f"crash/{scenario} on {backend}: {num_images} images, {report.num_bad} break the law")
    title = f"Crashes: {', '.join(f'{total[backend]} images on {backend}' for backend in backends)}"
    head = ("save", "backend", "operations", "killed", "ext4", "POSIX", "break the law", "rules broken by a crash")
    return _table(title, head, rows)


def _ways(findings: Sequence[Finding]) -> str:
    """Returns which rules are broken, and by the weakest crash that does it."""
    first: dict[str, str] = {}
    for finding in findings:
        first.setdefault(finding.rule, finding.headline.partition(":")[0])
    return ", ".join(f"{code} {RULES[code].name} ({kind})" for code, kind in sorted(first.items())) or "none"


def _live_table(pool: RankPool, backends: Sequence[str], tell: Callable[[str], None]) -> str:
    rows = []
    for scenario in ("overwrite", "beside"):
        for backend in backends:
            report = live.try_live(pool, backend, scenario)
            for kind in live.FAULTS:
                trials = [trial for trial in report.trials if trial.fault.kind == kind]
                raised = sum(any(seen.outcome == "raised" for seen in trial.observations) for trial in trials)
                missed = sum(not trial.was_hit for trial in trials)
                broken = _broken([finding for trial, finding in report.findings if trial.fault.kind == kind])
                rows.append([scenario, kind, backend, str(len(trials)), str(missed), str(raised), broken])
            tell(f"live/{scenario} on {backend}: {len(report.trials)} faults, {len(report.findings)} findings")
    head = ("save", "fault", "backend", "tried", "not met", "raised", "rules broken")
    return _table("Calls that fail", head, sorted(rows, key=lambda row: (row[0] != "overwrite", row[1])))


def _damage_table(pool: RankPool, backends: Sequence[str], num_trials: int, tell: Callable[[str], None]) -> str:
    rows = []
    for backend in backends:
        report = corruption.corrupt(pool, backend, num_trials)
        for row in report.rows:
            share, low, high = row.share("wrong")
            wrong = f"{100 * share:.2f} % ({100 * low:.2f} to {100 * high:.2f})"
            counts = [str(row.counts[outcome]) for outcome in OUTCOMES]
            rows.append([row.target, row.kind, backend, str(row.total), *counts, wrong])
        tell(f"corruption on {backend}: {report.rows[-1].total} trials, {report.rows[-1].counts['wrong']} wrong")
    places = {(row[0], row[1]): number for number, row in reversed(list(enumerate(rows)))}
    rows.sort(key=lambda row: places[row[0], row[1]])
    return _table("Damaged bytes", ("of", "damage", "backend", "trials", *OUTCOMES, "wrong, share"), rows)


def _hostile_table(pool: RankPool, backends: Sequence[str], tell: Callable[[str], None]) -> str:
    rows: dict[str, list[str]] = {}
    for backend in backends:
        report = hostile.try_hostile(pool, backend)
        for attack in report.attacks:
            broken = _broken(report.findings(attack)).replace(" (1)", "")
            what = "ran its code" if attack.has_run else attack.seen.outcome
            text = what if broken == "none" else f"{what}: **{broken}**"
            rows.setdefault(attack.sample, [attack.sample, attack.rule]).append(text)
        num_bad = sum(bool(report.findings(attack)) for attack in report.attacks)
        tell(f"hostile on {backend}: {len(report.attacks)} samples, {num_bad} break a rule")
    return _table("Hostile checkpoints", ("sample", "about", *backends), list(rows.values()))


def trace_lines(backend: str, scenario: str) -> tuple[list[str], bool]:
    """Returns the operations of a scenario's last save and the findings of its crashes; and whether there are none.

    Raises:
        UsageError: no such scenario.
        StraceMissing: there is no strace that may attach to ranks.
    """
    with RankPool(4) as pool:
        report = crash.explore(pool, backend, scenario)
    lines = [f"{number:3} rank {op.rank} {op}" for number, op in enumerate(report.trace)]
    lines += ["", *(f"{finding.text()}\n" for _, finding in report.findings)]
    images = ", ".join(f"{count} {kind}" for kind, count in report.num_images.items())
    lines.append(report.unknown or f"{images}: {report.num_bad} of {sum(report.num_images.values())} break the law")
    return lines, not report.findings


def replay_lines(file: Path, backend: str | None) -> list[str]:
    """Returns what loads of the storage in a failure's file bring.

    Raises:
        UsageError: the file cannot be read, or holds no storage.
    """
    case, named, tree = read_image(file)
    loads = {step.checkpoint: number for number, step in enumerate(case.steps) if step.action == "load"}
    versions = sorted({step.version for step in case.steps if step.action == "save"})
    with RankPool(1) as pool, crash.scratch_folder() as root:
        (root / "storage").mkdir()
        (seen,) = Loader(pool, backend or named, case, loads, str(root / "storage")).load([tree])
    lines = []
    for name, one in seen.items():
        held = what_it_holds(case, loads[name], one, versions) if one.outcome == "loaded" else one.error.strip()
        lines.append(f"{name}: {one.outcome}: {held}")
    return lines
