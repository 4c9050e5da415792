"""The suites find what is planted in `tests.mutants`, by the right rule, and leave `tests.odd_backends` in peace."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import hypothesis
import pytest
from hypothesis import given

from dcpbench import Case, Verdict, cases, judge
from dcpbench.known_defects import avoided
from dcpbench.rules import RULES
from tests.mutants import MUTANTS, Mutant
from tests.odd_backends import ODD

SUITES = (
    "round_trips",
    "resharding",
    "without_process_group",
    "multi_checkpoint",
    "bad_loads",
    "bad_saves",
    "overwriting",
    "partial_loads",
    "stages",
    "process_groups",
    "async_saves",
    "bad_async_saves",
    "switched",
    "lenient_loads",
    "changing_states",
    "chains",
    "sequences",
    "conversions",
    "stateful_round_trips",
)
BY_RULE = {rule.mutant: code for code, rule in RULES.items()}

NUM_SEEDS, CASES_PER_SEED = 5, 25
"""Several short searches: in a long one Hypothesis comes back to variations of what it had."""

MAX_RUNS = 150
MAX_ODD_RUNS, ODD_STEP = 3, 9
"""Few cases, from simple to rich ones: `dcpbench power` looks for longer, with other seeds."""

HANG_S = 2.0


@functools.cache
def drawn(suite: str) -> tuple[Case, ...]:
    """Returns the cases that a strategy gives, each once."""
    found: dict[str, Case] = {}

    def collect(case: Case) -> None:
        found.setdefault(case.id, case)

    options = hypothesis.settings(max_examples=CASES_PER_SEED, database=None, phases=[hypothesis.Phase.generate])
    for number in range(NUM_SEEDS):
        options(hypothesis.seed(number)(given(getattr(cases, suite)())(collect)))()
    return tuple(found.values())


@dataclass
class Bench:
    """Runs cases, and knows on which of them a backend without planted defects passes."""

    pool: object
    passed: dict[tuple[str, str], bool]

    def verdict(self, case: Case, backend: str) -> Verdict:
        return judge(case, self.pool.run(case, backend))

    def passes(self, case: Case, backend: str) -> bool:
        key = (case.id, backend)
        if key not in self.passed:
            hangs = avoided(self.pool.defects.get(backend, ()), case) is not None
            self.passed[key] = not hangs and self.verdict(case, backend).status == "PASS"
        return self.passed[key]

    def worth_running(self, mutant: Mutant) -> Iterator[Case]:
        """Yields cases in which the mutant's defect can show and its base passes, of its most likely suite first."""
        suites = (mutant.suite, *(suite for suite in SUITES if suite != mutant.suite))
        fitting = (case for suite in suites for case in drawn(suite) if mutant.shows_on(case))
        return (case for case in fitting if self.passes(case, mutant.base))

    def rules_broken(self, mutant: Mutant, max_runs: int) -> set[str]:
        """Returns the rules of all findings, up to the first case that breaks the mutant's own or one of its rules."""
        wanted = {BY_RULE[mutant.name]} if mutant.name in BY_RULE else set(mutant.rules)
        broken: set[str] = set()
        verdicts = (self.verdict(case, mutant.backend) for case in self.worth_running(mutant))
        for verdict in islice((one for one in verdicts if one.status != "UNSUPPORTED"), max_runs):
            broken |= {finding.rule for finding in verdict.findings}
            if broken & wanted:
                break
        return broken


@pytest.fixture(scope="module")
def passed():
    return {}


@pytest.fixture
def bench(pool, passed, request):
    pool.begin_test(request.node.name)
    if pool.settings.world_size < 4:
        pytest.skip("some mutants are right on fewer than 4 ranks")
    pool.pool.rank_timeout_s = HANG_S
    return Bench(pool, passed)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))
def test_mutant_is_found(mutant, bench):
    broken = bench.rules_broken(mutant, MAX_RUNS)
    assert broken, f"not found: {mutant.defect}"
    wanted = {BY_RULE[mutant.name]} if mutant.name in BY_RULE else set(mutant.rules)
    assert broken & wanted, f"found, but by {sorted(broken)}"


def test_each_rule_has_its_mutant():
    elsewhere = ("capabilities", "durability", "protocol", "security", "training")
    shown_by_cases = {code: rule for code, rule in RULES.items() if rule.family not in elsewhere}
    assert {rule.mutant: code for code, rule in shown_by_cases.items()} == {
        name: mutant.rules[0] for name, mutant in MUTANTS.items() if name in BY_RULE
    }


def test_mutants_say_what_is_wrong_with_them():
    assert all(mutant.defect.endswith(".") and set(mutant.rules) <= set(RULES) for mutant in MUTANTS.values())


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("suite", SUITES)
def test_odd_backend_is_not_flagged(name, suite, bench):
    if name == "three_threads" and suite in ("bad_saves", "sequences"):
        pytest.skip("torch's writer threads lose what is raised in them: with several threads it is no correct backend")
    backend = f"tests.odd_backends:{name}"
    if backend not in bench.pool.torch_parts:
        bench.pool.torch_parts[backend] = bench.pool.backends.torch_parts(backend)
    good = (case for case in drawn(suite)[::ODD_STEP] if bench.passes(case, "torch"))
    for case in islice(good, MAX_ODD_RUNS):
        verdict = bench.verdict(case, backend)
        assert verdict.status != "UNKNOWN", verdict.reason
        bench.pool.check(verdict)  # as in the suites: what torch is known for is not the odd backend's own
