"""The protocol suite finds what is planted in `tests.mutants.protocol`, by the right rule, and flags no odd backend."""

from __future__ import annotations

import functools
from itertools import count

import hypothesis
import pytest
from hypothesis import given

from dcpbench import judge, protocol
from dcpbench.backends import registry
from dcpbench.messages import Observation
from dcpbench.rules import RULES
from dcpbench.simulate.run import run_case
from tests.mutants.protocol import PROTOCOL_MUTANTS
from tests.odd_backends import ODD

NUM_CASES = 100
NUM_ODD_CASES = 4
STRATEGIES = ("storages", "stopped_storages", "planners", "stopped_planners")


@functools.cache
def drawn(strategy):
    found = {}

    def collect(case):
        found.setdefault(case.id, case)

    options = hypothesis.settings(max_examples=NUM_CASES, database=None, phases=[hypothesis.Phase.generate])
    options(hypothesis.seed(1)(given(getattr(protocol, strategy)())(collect)))()
    return tuple(found.values())


@pytest.fixture
def verdict(tmp_path):
    numbers = count()

    def run_and_judge(case, backend):
        seen = run_case(case, registry.resolve(backend), tmp_path / str(next(numbers)))
        return judge(case, [Observation(0, 1, 0, "call", "ok", value=seen)])

    return run_and_judge


@pytest.mark.parametrize("mutant", PROTOCOL_MUTANTS.values(), ids=list(PROTOCOL_MUTANTS))
def test_mutant_is_found(mutant, verdict):
    found = set()
    for case in drawn(mutant.strategy):
        found |= {finding.rule for finding in verdict(case, mutant.backend).findings}
        if mutant.rule in found:
            return
    pytest.fail(f"not found: {mutant.defect} Rules broken: {sorted(found) or 'none'}.")


def test_each_rule_of_the_protocol_has_its_mutant():
    rules = {code: rule.mutant for code, rule in RULES.items() if rule.family == "protocol"}
    assert rules == {mutant.rule: name for name, mutant in PROTOCOL_MUTANTS.items()}


@pytest.mark.parametrize("name", ODD)
def test_odd_backend_is_not_flagged(name, verdict):
    for strategy in STRATEGIES:
        for case in drawn(strategy)[-NUM_ODD_CASES:]:
            ended = verdict(case, f"tests.odd_backends:{name}")
            broken = {finding.rule for finding in ended.findings}
            allowed = {"R009"} if strategy == "stopped_storages" else set()  # most write in place, as torch does
            assert broken <= allowed, ended.findings[0].text()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_reference_keeps_all_rules(strategy, verdict):
    for case in drawn(strategy)[:25]:
        assert verdict(case, "reference").status == "PASS"
