"""The fault suites find what is planted in `tests.mutants.durability`, by the right rule, and leave `SAFE` in peace."""

from __future__ import annotations

import pytest

from dcpbench.faults import corruption, crash, hostile, live, trials
from dcpbench.faults.tracer import StraceMissing
from dcpbench.rules import RULES
from tests.mutants.durability import FAULT_MUTANTS

SAFE = "tests.mutants.durability:SAFE"
NUM_DAMAGES = 300


def rules_found(pool, backend, run, *, max_faults=None, max_images=None):
    kind, _, what = run.partition("/")
    try:
        if kind == "crash":
            report = crash.explore(pool, backend, what, max_images=max_images)
            assert not report.unknown
            return {finding.rule for _, finding in report.findings}
        if kind == "live":
            found = live.try_live(pool, backend, kinds=[what], max_faults=max_faults)
            assert all(trial.was_hit for trial in found.trials)
            return {finding.rule for _, finding in found.findings}
    except StraceMissing as missing:
        pytest.skip(str(missing))
    if kind == "corruption":
        return {finding.rule for _, _, finding in corruption.corrupt(pool, backend, NUM_DAMAGES).findings}
    attacks = hostile.try_hostile(pool, backend, [what])
    return {finding.rule for attack in attacks.attacks for finding in attacks.findings(attack)}


@pytest.fixture
def ranks(pool, monkeypatch):
    if pool.settings.world_size < 2:
        pytest.skip("needs 2 ranks: give --world-size=2 or more")
    monkeypatch.setattr(hostile, "MAX_SECONDS", 2.0)
    monkeypatch.setattr(live, "STEP_TIMEOUT_S", 3.0)
    return pool.pool


@pytest.mark.parametrize("mutant", FAULT_MUTANTS.values(), ids=list(FAULT_MUTANTS))
def test_a_defect_under_faults_is_found(mutant, ranks, monkeypatch):
    max_images = None
    if mutant.rule == "R805":  # it waits in most of the images
        monkeypatch.setattr(trials, "LOAD_TIMEOUT_S", 0.3)
        max_images = 40
    found = rules_found(ranks, mutant.backend, mutant.run, max_faults=12, max_images=max_images)
    assert mutant.rule in found, mutant.defect


@pytest.mark.parametrize("run", ["crash/first", "crash/overwrite", "crash/beside", "corruption"])
def test_a_safe_backend_is_left_in_peace(run, ranks):
    assert rules_found(ranks, SAFE, run) == set()


@pytest.mark.parametrize("kind", live.FAULTS)
def test_a_safe_backend_stands_live_faults(kind, ranks):
    assert rules_found(ranks, SAFE, f"live/{kind}", max_faults=6) == set()


def test_each_rule_of_faults_has_its_mutant():
    rules = {code: rule for code, rule in RULES.items() if rule.family in ("durability", "security")}
    assert rules
    for code, rule in rules.items():
        assert FAULT_MUTANTS[rule.mutant].rule == code
