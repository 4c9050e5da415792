"""`dcpbench power`: the searches, one backend after the other, on ranks that stay warm. Runs in the controller."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis

from dcpbench import codec, known_defects, profiles
from dcpbench.backends import registry
from dcpbench.bench.record import check_writable
from dcpbench.bench.status_line import say
from dcpbench.errors import expected
from dcpbench.power.bank import DEFAULT_BANK, Bank, Mutant, chosen, half_of, read_bank
from dcpbench.power.hunt import Hunt, size_of
from dcpbench.power.page import page
from dcpbench.power.rows import GOALS, Row, RowFile, Status, summary, table_line, write_parquet
from dcpbench.power.suite_tests import SuiteTest, load_tests, rounds
from dcpbench.strategies import scope
from dcpbench.suite_session import Settings, SuiteSession
from dcpbench.suites_folder import SUITES

__all__ = ["Options", "power"]


@dataclass(frozen=True)
class Options:
    """What the command was given.

    Attributes:
        bank: module of the bank.
        only: parts of names; none means all.
        half: "tuning", "reporting" or "" for both and the odd backends.
        world_size: ranks.
        profile: how many cases a mutant may take; an odd backend has those of ``quick`` for each seed.
        seed: the first one.
        num_seeds: runs of each odd backend.
        rank_timeout_s: when a rank counts as hung.
        shrink_s, max_s: limits of one search.
        rows: the file that rows are appended to, and taken from; None for a new one under ``results``.
        results: folder.
        page: where the Markdown page goes; None for nowhere.
    """

    bank: str = DEFAULT_BANK
    only: tuple[str, ...] = ()
    half: str = ""
    world_size: int = 4
    profile: str = "standard"
    seed: int = 0
    num_seeds: int = 10
    rank_timeout_s: float = 10.0
    shrink_s: float = 20.0
    max_s: float = 600.0
    rows: Path | None = None
    results: Path = Path("results")
    page: Path | None = None


def power(options: Options) -> int:
    """Makes a row for each backend of the bank that has none yet; returns 0 if all that was asked for is as it must be.

    Raises:
        UsageError: an option cannot be used.
    """
    if options.profile not in profiles.PROFILES:
        raise expected(f"one of {', '.join(profiles.PROFILES)}", "--profile", options.profile, "Give one of them.")
    if "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as for `python -m`; the ranks take over this path
    check_writable(options.results)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    file = RowFile.open(options.rows or options.results / f"power-{stamp}-{os.getpid()}.jsonl")
    profiles.register()
    scope.max_world_size = options.world_size
    defects = {
        name: known_defects.load_defects(SUITES / "known_defects" / f"{name}.toml", name) for name in registry.KNOWN
    }
    settings = Settings(
        options.world_size, "cpu", (), options.profile, options.rank_timeout_s, options.results / "power"
    )
    session = SuiteSession(settings, defects)
    whole = Bank((), ())
    try:
        whole = read_bank(session.pool, options.bank)
        rows = _Searches(session, options, file).run(chosen(whole, options.only, options.half))
    finally:
        session.close()
        say("")
        _write(file, options, whole)
    return 0 if all(row.status in ("caught", "clean") for row in rows) else 1


@dataclass(frozen=True)
class _Searches:
    """The searches of one run of the command."""

    session: SuiteSession
    options: Options
    file: RowFile

    def run(self, bank: Bank) -> list[Row]:
        """Makes the rows that the file lacks; returns those of the whole bank."""
        tests = _tests(self.options.profile)
        for number, mutant in enumerate(bank.mutants, 1):
            if not self.file.has(mutant.name, self.options.seed):
                self._look_for(mutant, tests, f"{number} of {len(bank.mutants)} {mutant.name}")
        quick = _tests("quick")
        for spec in bank.odd:
            kinds = ("cases", "training", "faults" if spec in bank.safe else "")
            for seed in range(self.options.seed, self.options.seed + self.options.num_seeds):
                if not self.file.has(_name_of(spec), seed):
                    self._leave_in_peace(spec, [test for test in quick if test.kind in kinds], seed)
        asked = {one.name for one in bank.mutants} | {_name_of(spec) for spec in bank.odd}
        return [row for row in self.file.rows if row.name in asked]

    def _look_for(self, mutant: Mutant, tests: Sequence[SuiteTest], label: str) -> None:
        hunt = self._hunt(mutant.backend, frozenset(mutant.rules), label)
        hunt.run(rounds(tests, self.options.profile, self.options.seed))
        row = Row(
            name=mutant.name,
            kind="mutant",
            half=half_of(mutant.name),
            status="caught" if hunt.caught_by else "unfinished" if hunt.is_out_of_time else "missed",
            expected=mutant.rules,
            seed=self.options.seed,
            profile=self.options.profile,
            defect=mutant.defect,
        )
        self._done(hunt, row)

    def _leave_in_peace(self, spec: str, tests: Sequence[SuiteTest], seed: int) -> None:
        hunt = self._hunt(spec, frozenset(), f"{_name_of(spec)}, seed {seed}")
        hunt.run(rounds(tests, "quick", seed))
        is_unknown = hunt.unknown or hunt.is_out_of_time
        status: Status = "flagged" if hunt.caught_by else "unknown" if is_unknown else "clean"
        self._done(hunt, Row(name=_name_of(spec), kind="odd", half="", status=status, seed=seed, profile="quick"))

    def _hunt(self, backend: str, wanted: frozenset[str], label: str) -> Hunt:
        def tell(text: str) -> None:
            say(f"{label}: {text}")

        return Hunt(self.session, backend, wanted, self.options.shrink_s, self.options.max_s, tell)

    def _done(self, hunt: Hunt, row: Row) -> None:
        """Completes a row with what the search gave, keeps it and shows it; keeps the shrunk case in a file."""
        ranks, leaves = size_of(hunt.case)
        if hunt.case is not None:
            folder = self.options.results / "power"
            folder.mkdir(parents=True, exist_ok=True)
            held = {"case": codec.to_json(hunt.case), "backend": hunt.backend, "text": hunt.text}
            (folder / f"{row.name}.json").write_text(json.dumps(held, indent=1), encoding="utf-8")
        row = replace(
            row,
            rule=hunt.caught_by,
            test=hunt.test,
            cases=hunt.num_cases,
            seconds=round(hunt.seconds, 2),
            others=tuple(sorted(hunt.others)),
            ranks=ranks,
            leaves=leaves,
            shrinking_s=round(hunt.shrinking_s, 2),
            case=hunt.case.id if hunt.case is not None else "",
            world_size=self.options.world_size,
            text=next(iter((hunt.text or hunt.unknown).splitlines()), ""),
        )
        self.file.add(row)
        say("")
        print(table_line(row), flush=True)


def _name_of(specification: str) -> str:
    return specification.rpartition(":")[2]


def _tests(profile: str) -> list[SuiteTest]:
    hypothesis.settings.load_profile(profile)
    return load_tests(SUITES)


def _write(file: RowFile, options: Options, bank: Bank) -> None:
    """Says what the rows come to, and writes them as Parquet and as a page."""
    if not file.rows:
        return
    for line in _summary_lines(file.rows):
        print(line)
    parquet = file.path.with_suffix(".parquet")
    write_parquet(file.rows, parquet)
    print(f"rows: {file.path}, {parquet}")
    if options.page is not None:
        names = [*(mutant.name for mutant in bank.mutants), *map(_name_of, bank.odd)]
        options.page.write_text(page(file.rows, names), encoding="utf-8")
        print(f"page: {options.page}")


def _summary_lines(rows: Sequence[Row]) -> Iterator[str]:
    for half in ("reporting", "tuning"):
        found = summary([row for row in rows if row.half == half])
        if found["mutants"]:
            yield (
                f"{half:<9} {found['caught']} of {found['mutants']} caught, {found['within_60_s']} within 60 s, "
                f"median {found['median_s']:.1f} s and {found['median_cases']:.0f} cases; shrunk, median of "
                f"{found['shrunk']}: {found['median_ranks']:g} ranks, {found['median_leaves']:g} leaves"
            )
    found = summary(rows)
    if found["odd_runs"]:
        yield f"odd       {found['flagged']} of {found['odd_runs']} runs flagged or unknown"
    yield f"goals     {GOALS}"
