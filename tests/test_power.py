"""`dcpbench power`: what it searches with, what it keeps, what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest

from dcpbench.errors import UsageError
from dcpbench.power.bank import Bank, Mutant, chosen, half_of, read_bank
from dcpbench.power.hunt import Hunt, size_of
from dcpbench.power.page import page
from dcpbench.power.rows import Row, RowFile, summary, table_line, write_parquet
from dcpbench.power.suite_tests import LEFT_OUT, load_tests, rounds
from dcpbench.strategies import scope
from dcpbench.suite_session import Settings, SuiteSession
from dcpbench.suites_folder import SUITES
from tests import bank
from tests.mutants import MUTANTS
from tests.mutants.durability import FAULT_MUTANTS
from tests.mutants.training import TRAINING_MUTANTS

SEED = 1


@pytest.fixture(scope="module")
def tests():
    """The tests of the suites, with the cases of the quick profile."""
    before = hypothesis.settings.get_current_profile_name()
    hypothesis.settings.load_profile("quick")
    try:
        yield load_tests(SUITES)
    finally:
        hypothesis.settings.load_profile(before)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    before, scope.max_world_size = scope.max_world_size, 2
    made = SuiteSession(Settings(2, "cpu", (), "quick", 10.0, tmp_path_factory.mktemp("power")), {})
    yield made
    made.close()
    scope.max_world_size = before


def test_each_module_of_the_suites_takes_part_or_says_why_not(tests):
    modules = {path.stem for path in SUITES.glob("test_*.py")}
    assert {test.function.__module__.removeprefix("dcpbench_power_") for test in tests} == modules - LEFT_OUT.keys()
    assert LEFT_OUT.keys() <= modules


def test_the_rounds_are_what_the_profile_runs(tests):
    drawn: dict[str, int] = {}
    for test, part in rounds(tests, "quick", SEED):
        drawn[test.name] = drawn.get(test.name, 0) + part.num_cases
    assert drawn == {test.name: test.num_cases for test in tests}
    parts = [part.seed for test, part in rounds(tests, "standard", SEED) if test.strategy is not None]
    assert len(set(parts)) == len(parts)


def test_a_fault_test_has_its_small_share_first_and_its_whole_share_next(tests):
    crash = [test for test in tests if test.kind == "faults"]
    assert {part.profile for _, part in rounds(crash, "quick", SEED)} == {"quick"}
    profiles = [part.profile for _, part in rounds(crash, "standard", SEED)]
    assert profiles == ["quick"] * len(crash) + ["standard"] * len(crash)


def test_the_banks_share_no_name():
    assert len(bank.MUTANTS) == len(MUTANTS) + len(FAULT_MUTANTS) + len(TRAINING_MUTANTS)
    assert {half_of(name) for name in bank.MUTANTS} == {"tuning", "reporting"}


def test_a_bank_is_read_on_a_rank_and_a_part_of_it_chosen(session):
    held = read_bank(session.pool, "tests.bank")
    assert len(held.mutants) == len(bank.MUTANTS)
    some = chosen(held, ["shifted"], "")
    assert {one.name for one in some.mutants} == {"shifted_reader", "shifted_in_last_dim", "shifted_on_three_ranks"}
    assert not chosen(held, (), "tuning").odd
    for module, says in [("tests.nowhere", "No module named"), ("tests.test_oracle", "MUTANTS")]:
        with pytest.raises(UsageError, match=says) as caught:
            read_bank(session.pool, module)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="--only"):
        chosen(held, ["no such name"], "")


def test_a_mutant_is_caught_by_its_rule_and_shrunk(session, tests):
    some = [test for test in tests if "round_trip_keeps" in test.name or "bad_loads" in test.name]
    hunt = Hunt(session, "tests.mutants.outcome:mumbling_loader", frozenset({"R506"}), shrink_s=20.0)
    hunt.run(rounds(some, "quick", SEED))
    assert (hunt.caught_by, hunt.test) == ("R506", "test_bad_loads_are_refused_on_all_ranks")
    assert hunt.num_cases > 1
    assert hunt.case is not None
    assert max(size_of(hunt.case)) <= 2
    assert "R506" in hunt.text


def test_a_rule_that_is_not_looked_for_is_told_and_not_taken(session, tests):
    some = [test for test in tests if test.name == "test_round_trip_keeps_every_byte"]
    hunt = Hunt(session, "tests.mutants.identity:alters_sources", frozenset({"R503"}))
    hunt.run(rounds(some, "quick", SEED))
    assert not hunt.caught_by
    assert "R204" in hunt.others


def test_what_is_right_is_not_flagged_and_a_search_ends_in_time(session, tests):
    some = [test for test in tests if test.name == "test_round_trip_keeps_every_byte"]
    hunt = Hunt(session, "tests.odd_backends:dense", frozenset())
    hunt.run(rounds(some, "quick", SEED))
    assert (hunt.caught_by, hunt.unknown) == ("", "")
    late = Hunt(session, "tests.odd_backends:dense", frozenset(), max_s=0.0)
    late.run(rounds(tests, "quick", SEED))
    assert late.num_cases == 0


ROWS = [
    Row(
        "a", "mutant", half_of("a"), "caught", rule="R101", cases=3, seconds=1.5, ranks=2, leaves=1, defect="Is wrong."
    ),
    Row("b", "mutant", half_of("b"), "missed", cases=900, seconds=70.0, others=("R801",), defect="Is wrong | too."),
    Row("c", "odd", "", "clean", seed=0, seconds=2.0),
    Row("c", "odd", "", "flagged", rule="R104", seed=1, seconds=2.0),
]


def test_rows_are_in_the_file_as_soon_as_they_are_made(tmp_path):
    file = RowFile.open(tmp_path / "new" / "rows.jsonl")
    for row in ROWS:
        file.add(row)
    again = RowFile.open(file.path)
    assert again.rows == ROWS
    assert again.has("c", 1)
    assert not again.has("c", 2)
    write_parquet(again.rows, tmp_path / "rows.parquet")
    (tmp_path / "bad.jsonl").write_text('{"name": "a"}\n')
    with pytest.raises(UsageError, match=r"bad\.jsonl:1") as caught:
        RowFile.open(tmp_path / "bad.jsonl")
    assert "\n" not in str(caught.value)


def test_the_page_tells_what_was_caught_and_what_was_not():
    text = page(ROWS)
    assert "| `a` | Is wrong. | R101 |" in text
    assert "| `b` | Is wrong \\| too. | **missed** |" in text
    assert "| `c` | 2 | 0-1 | 0 | 2.0 | seed 1: R104 |" in text
    figures = summary(ROWS)
    assert (figures["mutants"], figures["caught"], figures["within_60_s"], figures["flagged"]) == (2, 1, 1, 1)
    assert summary([])["caught"] == 0
    assert all("\n" not in table_line(row) for row in ROWS)
    assert "2 x 1" in table_line(ROWS[0])


def test_the_committed_page_has_the_whole_bank():
    text = Path("docs/power.md").read_text(encoding="utf-8")
    missing = [name for name in bank.MUTANTS if f"`{name}`" not in text]
    assert not missing, "run: dcpbench power --rows FILE --page docs/power.md"


def test_what_has_no_row_is_told():
    assert "Not searched yet: 1 of the bank" in page(ROWS, ["a", "b", "c", "d"])
    assert "Not searched yet" not in page(ROWS, ["a"])


def test_a_half_is_decided_by_the_name_alone():
    one = Mutant("a", "m:a", "Is wrong.", ("R101",))
    both = Bank((one, replace(one, name="b")), ())
    names = [chosen(both, (), half).mutants[0].name for half in ("tuning", "reporting") if half in map(half_of, "ab")]
    assert sorted(names) == sorted(set(names))
