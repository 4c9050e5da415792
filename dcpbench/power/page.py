"""docs/power.md: the kill matrix, by half of the bank, made from rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from dcpbench.power.bank import half_of
from dcpbench.power.rows import Row, summary
from dcpbench.power.suite_tests import LEFT_OUT

__all__ = ["page"]

_HEAD = """\
# What the suites find

Suites that find nothing may be good, or blind. So they run on backends that are wrong on purpose, each by one planted
defect (`tests/mutants`), and on backends that are right in an unusual way (`tests/odd_backends`), which they must leave
in peace. This page is made by

    dcpbench power --page docs/power.md

A mutant is looked for as any backend is: by the tests of the suites, with their strategies and as many cases as the
profile gives them, in the same order for every mutant, without a word on what is wrong with it. The tests take turns:
each runs 8 % of its cases, then further ones up to 24 %, 56 % and all. The ranks are warm. The search ends with the
first case that breaks a rule which names the defect; rules that were broken earlier stand in the last column.
Hypothesis then shrinks that case, for a bounded time. Findings about storage (R8xx, R9xx, and what a failing system
call shows) belong to a fixed scenario and are not shrunk.

**The halves.** Weights of the generation are tuned on half of the bank; the other half only tells how well that works
on defects that nobody looked at. A mutant is in the tuning half if the first byte of the SHA-256 of its name is odd:
nobody chooses, and a new mutant moves no other one. The tables below write the split down.

**A bank of your own.** `dcpbench power --bank package.module` takes any module with a mapping `MUTANTS` (a name to an
object with `backend`, `defect` and `rules`) and, if you like, lists `ODD_BACKENDS` and `SAFE_BACKENDS` of
specifications. Rows are written as they are made: an interrupted run goes on with `--rows FILE`.
"""


def page(rows: Sequence[Row], names: Sequence[str] = ()) -> str:
    """Returns the Markdown page.

    Args:
        rows: of all searches.
        names: all of the bank; those without a row are listed as not yet searched.
    """
    mutants = [row for row in rows if row.kind == "mutant"]
    lines = [_HEAD, *_how(rows), "## In figures", "", *_figures(mutants), ""]
    for half in ("reporting", "tuning"):
        held = sorted((row for row in mutants if half_of(row.name) == half), key=lambda row: row.name)
        lines += [f"## Mutants of the {half} half", "", *_matrix(held), ""]
    odd = [row for row in rows if row.kind == "odd"]
    lines += ["## Odd, and right", "", *_odd(odd), ""]
    searched = {row.name for row in rows}
    if left := sorted(f"`{name}`" for name in set(names) - searched):
        lines += [f"## Not searched yet: {len(left)} of the bank", "", f"{', '.join(left)}.", ""]
    lines += ["## What takes no part", ""]
    lines += [f"- `suites/{name}.py`: {why}." for name, why in LEFT_OUT.items()]
    return "\n".join(lines) + "\n"


def _how(rows: Sequence[Row]) -> Iterator[str]:
    settings = sorted({(row.profile, row.world_size) for row in rows if row.kind == "mutant"})
    for profile, world_size in settings:
        yield f"Below: profile `{profile}`, {world_size} ranks."
    yield ""


def _figures(mutants: Sequence[Row]) -> Iterator[str]:
    yield "| | reporting half | tuning half | all |"
    yield "| --- | ---: | ---: | ---: |"
    parts = [[row for row in mutants if half_of(row.name) == half] for half in ("reporting", "tuning")]
    columns = [summary(part) for part in (*parts, mutants)]

    def line(label: str, texts: Sequence[str]) -> str:
        return f"| {label} | {' | '.join(texts)} |"

    yield line("mutants", [str(one["mutants"]) for one in columns])
    yield line("caught", [_share(one["caught"], one["mutants"]) for one in columns])
    yield line("caught within 60 s", [_share(one["within_60_s"], one["mutants"]) for one in columns])
    yield line("seconds until caught, median", [f"{one['median_s']:.1f}" for one in columns])
    yield line("cases until caught, median", [f"{one['median_cases']:.0f}" for one in columns])
    yield line(
        "shrunk case, median", [f"{one['median_ranks']:g} ranks, {one['median_leaves']:g} leaves" for one in columns]
    )


def _share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.0f} %)" if whole else "-"


def _matrix(rows: Sequence[Row]) -> Iterator[str]:
    yield "| mutant | what is wrong | caught by | test | cases | seconds | shrunk: ranks, leaves | before it |"
    yield "| --- | --- | --- | --- | ---: | ---: | --- | --- |"
    for row in rows:
        size = f"{row.ranks}, {row.leaves}" if row.ranks else "-"
        rule = row.rule or f"**{row.status}**"
        test = row.test.removeprefix("test_").replace("_", " ")
        cells = [f"`{row.name}`", row.defect, rule, test, row.cases, f"{row.seconds:.1f}", size, " ".join(row.others)]
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _odd(rows: Sequence[Row]) -> Iterator[str]:
    yield "| backend | runs | seeds | cases | seconds a run | flagged |"
    yield "| --- | ---: | --- | ---: | ---: | --- |"
    for name in sorted({row.name for row in rows}):
        runs = [row for row in rows if row.name == name]
        seeds = f"{min(row.seed for row in runs)}-{max(row.seed for row in runs)}"
        bad = ", ".join(f"seed {row.seed}: {row.rule or row.status}" for row in runs if row.status != "clean")
        seconds = statistics.mean(row.seconds for row in runs)
        yield f"| `{name}` | {len(runs)} | {seeds} | {sum(row.cases for row in runs)} | {seconds:.1f} | {bad or 'no'} |"
