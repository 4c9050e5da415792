"""Capabilities: what a case needs, what a backend may lack, and the rules on what it declares absent."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given

from dcpbench import cases, judge
from dcpbench.capabilities import CAPABILITIES, OPEN
from dcpbench.case import Case, Layout, LeafLayout, Mesh, ObjectLeaf, Part, Placement, Step, TensorLeaf
from dcpbench.errors import UsageError
from dcpbench.needs import needs_of
from dcpbench.objects import encode
from dcpbench.rules import RULES
from dcpbench.strategies import scope
from tests.mutants import absences

ROOT = Path(__file__).parent.parent
NOT_BY_CASES = {"local-folders", "atomic-commit", "durability"}
ASKED_FOR = sorted(OPEN - NOT_BY_CASES)


@pytest.fixture
def lacking():
    """Sets what the backend under test lacks, for the strategies."""
    before = scope.absent, scope.max_world_size
    scope.max_world_size = 4

    def lack(*capabilities: str) -> None:
        scope.absent = frozenset(capabilities)

    yield lack
    scope.absent, scope.max_world_size = before


def drawn(strategy, number):
    found = []
    options = hypothesis.settings(max_examples=number, database=None, derandomize=True, deadline=None)

    def collect(value):
        found.append(value)

    options(given(strategy)(collect))()
    return found


def needs_of_all(case: Case) -> set[str]:
    return {name for number in range(len(case.steps)) for name in needs_of(case, number)}


@pytest.mark.parametrize("capability", ASKED_FOR)
def test_a_case_on_purpose_needs_one_capability_alone(capability, lacking):
    lacking(capability)
    for (case,) in drawn(cases.absences(), 5):
        assert needs_of_all(case) == {capability}


def test_other_cases_do_without_what_is_absent(lacking):
    absent = OPEN - {"overwrite", "several-checkpoints"}
    lacking(*absent)
    for suite in ("resharding", "partial_loads", "switched", "changing_states", "sequences", "stages"):
        for case in drawn(getattr(cases, suite)(), 8):
            assert not absent & needs_of_all(case), (suite, case.dumps())


def test_a_narrowed_sequence_writes_over_nothing(lacking):
    lacking("overwrite", "local-folders", "async")
    for case in drawn(cases.sequences(), 15):
        assert not needs_of_all(case) & {"overwrite", "local-folders"}
        assert all(step.action in ("save", "load") for step in case.steps)


SAVE_AND_LOAD = (Step("save", 0), Step("load", 1))


def plain(*leaves, saved_on=2, loaded_on=2, steps=SAVE_AND_LOAD) -> Case:
    def layout(world):
        placed = tuple(LeafLayout((Placement(0) if leaf.shape else Placement(),)) for leaf in leaves)
        return Layout(world, Mesh(("dp",), (world,), tuple(range(world))), placed)

    return Case("needs", 0, leaves, (), (layout(saved_on), layout(loaded_on)), steps)


W = TensorLeaf((Part("key", "w"),), (8,))


@pytest.mark.parametrize(
    ("case", "needed"),
    [
        (plain(W), set()),
        (plain(W, loaded_on=1), {"resharding"}),
        (plain(replace(W, shape=())), {"scalar-tensors"}),
        (plain(replace(W, shape=(0, 2))), {"empty-tensors"}),
        (plain(replace(W, dtype="uint32")), {"unsigned-dtypes"}),
        (plain(W, steps=(Step("save", 0), Step("save", 0, version=1))), {"overwrite"}),
        (plain(W, steps=(Step("save", 0, "a"), Step("save", 0, "b"))), {"several-checkpoints"}),
        (replace(plain(W), objects=(ObjectLeaf((Part("key", "o"),), encode(1)),)), {"objects"}),
    ],
)
def test_what_a_case_needs(case, needed):
    assert needs_of_all(case) == needed


OBJECTS = replace(plain(W), objects=(ObjectLeaf((Part("key", "o"),), encode(1)),))
RESHARDED = plain(W, loaded_on=1)


@pytest.mark.parametrize(
    ("name", "case", "status", "rule"),
    [
        ("refuses_values", OBJECTS, "UNSUPPORTED", None),
        ("refuses_values", RESHARDED, "PASS", None),
        ("refuses_layouts", RESHARDED, "UNSUPPORTED", None),
        ("refuses_layouts", OBJECTS, "PASS", None),
        ("refuses_on_one_rank", OBJECTS, "FAIL", "C001"),
        ("ends_when_asked", OBJECTS, "FAIL", "C001"),
        ("waits_when_asked", OBJECTS, "FAIL", "C001"),
        ("fills_and_refuses", RESHARDED, "FAIL", "C001"),
        ("drops_values", OBJECTS, "FAIL", "C002"),
        ("understates_itself", OBJECTS, "PASS", None),
    ],
)
def test_what_is_declared_absent_is_judged(name, case, status, rule, pool):
    pool.pool.rank_timeout_s = 3.0
    verdict = judge(case, pool.run(case, f"tests.mutants.absences:{name}"))
    assert (verdict.status, [found.rule for found in verdict.findings]) == (status, [rule] if rule else [])
    declared = set(getattr(absences, name).absent)
    assert set(verdict.absent) == declared & needs_of_all(case)


def test_a_certificate_says_what_is_refused_and_what_works(tmp_path):
    backends = [f"--backend=tests.mutants.absences:{name}" for name in ("understates_itself", "refuses_values")]
    command = [sys.executable, "-m", "dcpbench", "conformance", f"--out={tmp_path}", "--world-size=2", *backends]
    selected = [*command, "--", "-k", "test_what_is_absent or test_resharding"]
    done = subprocess.run(selected, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout
    assert "4 passed" in done.stdout
    assert len(re.findall("C003 works-though-absent: .* declares 'objects' absent, but it works", done.stdout)) == 1
    text = (tmp_path / "certificate.md").read_text(encoding="utf-8")
    assert re.search(r"\| C003 .* \| ✗ FAIL \(over all cases\) \| ✓ PASS \(\d+\) \|", text)
    assert re.search(r"\| R401 .* \| ✓ PASS .* \| – UNSUPPORTED \(\d+ unsupported\) \|", text)
    assert re.search(r"\| R101 .* \| ✓ PASS .* \| ✓ PASS .* \|", text)


def test_a_name_that_is_none_is_one_line(pool):
    with pytest.raises(UsageError, match="Expected a capability but got absent of backend 'odd'='colour'"):
        pool.backends.of("tests.test_capabilities:odd")


def test_each_rule_on_capabilities_has_its_mutant():
    for code, rule in RULES.items():
        assert (rule.family == "capabilities") == code.startswith("C")
        if rule.family == "capabilities":
            assert getattr(absences, rule.mutant).absent


def test_each_capability_has_a_sentence():
    assert all(one.sentence.endswith(".") and name == one.name for name, one in CAPABILITIES.items())
    assert {rule.capability for rule in RULES.values()} - {""} <= set(CAPABILITIES)


def __getattr__(name: str) -> object:
    """Makes the backend ``odd`` where a rank asks for it: the controller has no need of it."""
    if name == "odd":
        return replace(absences.refuses_values, name="odd", absent=("colour",))
    raise AttributeError(name)
