"""`dcpbench coverage`: draws the cases of a profile, without running them, and writes docs/coverage.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given

from dcpbench import profiles
from dcpbench.coverage.reach import FEATURES, REACHED, REASONS
from dcpbench.coverage.surface import surface
from dcpbench.errors import expected
from dcpbench.power.suite_tests import SuiteTest, load_tests
from dcpbench.strategies import scope
from dcpbench.suites_folder import SUITES

__all__ = ["Counts", "coverage_page", "drawn_counts", "empty_rows", "misplaced_rows"]

_HEAD = """\
# What the generated cases reach

Each public argument of torch.distributed.checkpoint, read off the signatures of the installed torch, against the tests
of the suites: how many cases of the profile reach it with another value than its default, or at all where it has none.
The cases are drawn, not run. Made by

    dcpbench coverage > docs/coverage.md

which fails where an argument is neither reached nor has a reason, as a new one in a new release of torch would be.
"""


@dataclass
class Counts:
    """How many cases reach a row, by row and test."""

    reached: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_cases: Counter[str] = field(default_factory=Counter)

    def of(self, row: str) -> int:
        return sum(number for (name, _), number in self.reached.items() if name == row)

    def tests(self, row: str) -> list[str]:
        return sorted(test for (name, test) in self.reached if name == row)


def drawn_counts(profile: str, world_size: int) -> Counts:
    """Draws the cases that the suites draw in a profile and returns what they reach.

    Args:
        profile: how many cases.
        world_size: ranks that the cases may ask for.

    Raises:
        UsageError: there is no such profile.
    """
    if profile not in profiles.PROFILES:
        raise expected(f"one of {', '.join(profiles.PROFILES)}", "--profile", profile, "Give one of them.")
    profiles.register()
    hypothesis.settings.load_profile(profile)
    scope.max_world_size = world_size
    counts = Counts()
    for test in load_tests(SUITES):
        if test.strategy is not None:
            _draw(test, counts)
    return counts


def _draw(test: SuiteTest, counts: Counts) -> None:
    rows = {**REACHED, **FEATURES}

    def look(drawn: Any) -> None:
        for case in drawn if isinstance(drawn, Sequence) else (drawn,):
            counts.num_cases[test.name] += 1
            counts.reached.update((row, test.name) for row, is_reached in rows.items() if is_reached(case))

    settings = hypothesis.settings(
        max_examples=test.num_cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    settings(given(drawn=test.strategy)(look))()


def empty_rows(counts: Counts) -> list[str]:
    """Returns the arguments that no case reaches, for no reason that is written down; and features of no case."""
    rows = [row for held in surface().values() for row in held]
    empty = [row for row in rows if not counts.of(row) and row not in REASONS]
    return empty + [row for row in FEATURES if not counts.of(row)]


def misplaced_rows() -> list[str]:
    """Returns the rows of the tables here that torch does not have, or that are in both."""
    rows = {row for held in surface().values() for row in held}
    return sorted(({*REACHED, *REASONS} - rows) | (REACHED.keys() & REASONS.keys()))


def coverage_page(counts: Counts, profile: str, world_size: int) -> str:
    """Returns the Markdown page."""
    total = sum(counts.num_cases.values())
    lines = [_HEAD, f"Below: {total} cases of profile `{profile}`, up to {world_size} ranks.", ""]
    for section, rows in surface().items():
        lines += [f"## {section}", "", *_table("argument", rows, counts), ""]
    lines += ["## States, meshes and runs", "", *_table("what", list(FEATURES), counts), ""]
    lines += ["## The tests", "", "| test | cases |", "| --- | ---: |"]
    lines += [f"| `{test}` | {number} |" for test, number in sorted(counts.num_cases.items())]
    return "\n".join(lines) + "\n"


def _table(what: str, rows: list[str], counts: Counts) -> Iterator[str]:
    yield f"| {what} | cases | tests that reach it, or why none does |"
    yield "| --- | ---: | --- |"
    for row in rows:
        tests = [test.removeprefix("test_").replace("_", " ") for test in counts.tests(row)]
        shown = ", ".join(tests[:3]) + (f" and {len(tests) - 3} more" if len(tests) > 3 else "")
        label = f"`{row}`" if what == "argument" else row
        yield f"| {label} | {counts.of(row) or '-'} | {shown or REASONS.get(row, '**nobody knows**')} |"
