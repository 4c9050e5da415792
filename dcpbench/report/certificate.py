"""The certificate: every rule on every backend, as data. `certificate_page` makes it readable.

A certificate is made from the tallies of a run. A rule PASSes on a backend if at least one case put it to the test and
none broke it; it FAILs if a case broke it, known defect or not; it is UNSUPPORTED if each case that would have tested
it needs a feature that the backend does not have; otherwise it is UNKNOWN, which is never a pass.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcpbench import codec
from dcpbench.rules import RULES
from dcpbench.versions import versions_of

__all__ = [
    "SCHEMA",
    "STATUSES",
    "Certificate",
    "Entry",
    "Failure",
    "Tally",
    "Together",
    "entries_of",
    "now",
    "together_of",
    "versions",
    "write_certificate",
]

STATUSES = ("PASS", "FAIL", "UNSUPPORTED", "UNKNOWN")

SCHEMA = 2
"""Version of the JSON form; it grows with each change that a reader would notice."""

Tally = Counter[tuple[str, str, str]]
"""Cases by (rule, backend, how it went): ``pass``, ``fail``, ``known``, ``inherited`` or ``unsupported``."""


@dataclass(frozen=True)
class Failure:
    """The smallest case that was found to break a rule on a backend.

    Attributes:
        text: the message of the failure, in full.
        file: the case file, for ``dcpbench replay``.
    """

    rule: str
    backend: str
    text: str
    file: str


@dataclass(frozen=True)
class Entry:
    """How one rule stands on one backend.

    Attributes:
        rule: its code.
        status: PASS, FAIL, UNSUPPORTED or UNKNOWN.
        num_cases: how many cases put the rule to the test.
        num_broken: how many of them broke it.
        num_known: findings that the backend's own known defects explain.
        num_unsupported: cases that would have put the rule to the test, had the backend not refused them.
        num_inherited: findings that are known defects of the parts of torch that the backend is built on.
        failure: the shrunk case that breaks the rule, where this run found one.
    """

    rule: str
    backend: str
    status: str
    num_cases: int = 0
    num_broken: int = 0
    num_known: int = 0
    num_inherited: int = 0
    num_unsupported: int = 0
    failure: Failure | None = None


@dataclass(frozen=True)
class Together:
    """What two backends did together: the one loaded what the other saved, or each brought parts.

    Attributes:
        name: who saves and who loads, or which part comes from where.
        num_cases: how many cases put a rule to the test.
        broken: rules that were broken, most basic first.
        is_known: known defects of the two explain all of it.
        failure: the shrunk case, where this run found one.
    """

    name: str
    num_cases: int
    broken: tuple[str, ...] = ()
    is_known: bool = True
    failure: Failure | None = None


@dataclass(frozen=True)
class Certificate:
    """What one run showed, for all its backends.

    Attributes:
        backends: specifications, in the order given.
        entries: one for each rule and backend.
        num_cases: cases judged, by backend.
        num_unknown: cases that could not be judged, by backend.
        seed: Hypothesis's seed; ``derandomized`` where the cases are the same every time.
        seconds: how long the run took.
        versions: of dcpbench, torch, Python and the platform.
        absent: the capabilities that each backend lacks.
        together: how the backends worked with each other.
        unmatched: backend and id of known defects that explained nothing in a run of all suites.
    """

    backends: tuple[str, ...]
    entries: tuple[Entry, ...]
    num_cases: tuple[int, ...]
    num_unknown: tuple[int, ...]
    profile: str
    world_size: int
    device: str
    seed: str
    seconds: float
    made_at: str
    versions: tuple[tuple[str, str], ...]
    absent: tuple[tuple[str, ...], ...] = ()
    together: tuple[Together, ...] = ()
    unmatched: tuple[tuple[str, str], ...] = ()
    schema: int = SCHEMA

    def entry(self, rule: str, backend: str) -> Entry:
        """Returns how ``rule`` stands on ``backend``."""
        return next(e for e in self.entries if (e.rule, e.backend) == (rule, backend))

    def count(self, backend: str, status: str) -> int:
        """Returns how many rules have ``status`` on ``backend``."""
        return sum(e.backend == backend and e.status == status for e in self.entries)

    def failures(self, backend: str) -> list[Entry]:
        """Returns the broken rules of a backend, the most basic one first: what follows may be its consequence."""
        broken = {e.rule: e for e in self.entries if e.backend == backend and e.status == "FAIL"}
        return [broken[rule] for rule in _most_basic_first(broken)]


def _most_basic_first(broken: Collection[str]) -> list[str]:
    implied = {code for rule in broken for code in RULES[rule].implies}
    return sorted(broken, key=lambda rule: (rule in implied, rule))


def together_of(
    backends: Sequence[str], num_cases: Mapping[str, int], tally: Tally, failures: Sequence[Failure]
) -> tuple[Together, ...]:
    """Returns how backends worked with each other: all that was counted under names other than ``backends``."""
    found = []
    for name in sorted(set(num_cases) - set(backends)):
        broken = {rule for rule, who, how in tally if who == name and how in ("fail", "known", "inherited")}
        failure = next((one for one in failures if one.backend == name), None)
        is_known = failure is None and not any(tally[rule, name, "fail"] for rule in broken)
        found.append(Together(name, num_cases[name], tuple(_most_basic_first(broken)), is_known, failure))
    return tuple(found)


def entries_of(
    backends: Sequence[str], tally: Tally, failures: Sequence[Failure], absent: Mapping[str, Collection[str]]
) -> tuple[Entry, ...]:
    """Returns how each rule of the catalogue stands on each of ``backends``, which lack what ``absent`` says."""
    return tuple(_entry(rule, name, tally, failures, absent.get(name, ())) for rule in RULES for name in backends)


def _entry(rule: str, backend: str, tally: Tally, failures: Sequence[Failure], absent: Collection[str]) -> Entry:
    passed, failed, known, inherited, unsupported = (
        tally[rule, backend, how] for how in ("pass", "fail", "known", "inherited", "unsupported")
    )
    failure = next((f for f in failures if (f.rule, f.backend) == (rule, backend)), None)
    if failed or known or failure is not None:
        status = "FAIL"
    elif passed:
        status = "PASS"
    else:
        status = "UNSUPPORTED" if unsupported or RULES[rule].capability in absent else "UNKNOWN"
    broken = failed + known
    num_cases = passed + broken + inherited
    return Entry(rule, backend, status, num_cases, broken, known, inherited, unsupported, failure)


def versions() -> tuple[tuple[str, str], ...]:
    """Returns name and version of what a verdict may depend on."""
    found = versions_of(("dcpbench", "torch", "numpy", "hypothesis"))
    return (*found.items(), ("platform", platform.platform()))


def now() -> str:
    """Returns the time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_certificate(certificate: Certificate, folder: Path) -> tuple[Path, ...]:
    """Writes ``certificate.json``, ``.md`` and ``.html`` to ``folder``, each whole or not at all; returns their paths.

    Raises:
        OSError: the folder cannot be written.
    """
    from dcpbench.report.certificate_page import as_html, as_markdown

    texts = {
        "certificate.json": json.dumps(codec.to_json(certificate), indent=1) + "\n",
        "certificate.md": as_markdown(certificate),
        "certificate.html": as_html(certificate),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)
    return tuple(folder / name for name in texts)
