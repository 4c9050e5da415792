"""Backends put together from parts: their spelling, and which part a failure moves with."""

from __future__ import annotations

import pytest

from dcpbench import judge
from dcpbench.backends import parts, registry
from dcpbench.case import Case, Layout, LeafLayout, Mesh, Part, Placement, Step, TensorLeaf
from dcpbench.errors import UsageError
from dcpbench.oracle.verdict import RULE_ERRORS

MIXED = "engine=torch,planner=reference,storage=torch"


def test_spelling_goes_both_ways():
    assert parts.spell(["torch", "reference", "torch"]) == MIXED
    assert parts.parts_of(MIXED) == {"engine": "torch", "planner": "reference", "storage": "torch"}
    assert parts.names_in(MIXED) == ("torch", "reference")
    assert parts.parts_of("torch") is None
    assert parts.names_in("torch") == ("torch",)


def test_combinations_are_all_different():
    found = parts.combinations("a", "b")
    assert len(set(found)) == 8
    assert found[0] == parts.spell("aaa")
    assert found[-1] == parts.spell("bbb")


@pytest.mark.parametrize("part", parts.PARTS)
def test_the_part_that_all_failures_share_is_guilty(part):
    outcomes = {s: parts.parts_of(s)[part] == "b" for s in parts.combinations("a", "b")}
    assert parts.guilty_part(outcomes) == (part, "b")


@pytest.mark.parametrize("number", [0, 1, 2, 8])
def test_no_part_is_guilty_of_what_does_not_move_with_it(number):
    assert parts.guilty_part({s: n < number for n, s in enumerate(parts.combinations("a", "b"))}) is None


@pytest.mark.parametrize("wrong", ["engine=torch,planner=torch", "engine=torch,planner=torhc,storage=torch"])
def test_wrong_spelling_is_refused(wrong):
    with pytest.raises(UsageError, match="Unknown backend"):
        registry.check_spelling(wrong)


def case() -> Case:
    """A matrix sharded by columns on two ranks, loaded by rows: needs right offsets, in both dims."""
    mesh = Mesh(("dp",), (2,), (0, 1))
    by_columns, by_rows = (Layout(2, mesh, (LeafLayout((Placement(dim),)),)) for dim in (1, 0))
    tensors = (TensorLeaf((Part("key", "w"),), (4, 6)),)
    return Case("swap", 1, tensors, (), (by_columns, by_rows), (Step("save", 0), Step("load", 1)))


@pytest.mark.parametrize(
    ("mutant", "part"),
    [("tests.mutants.geometry:shifted_reader", "storage"), ("tests.mutants.planning:dedup_by_first_offset", "planner")],
)
def test_the_planted_part_is_named(mutant, part, pool):
    mixed = [s for s in parts.combinations("torch", mutant) if parts.parts_of(s)[part] == mutant]
    verdicts = [judge(case(), pool.run(case(), specification)) for specification in mixed]
    assert [verdict.status for verdict in verdicts] == ["FAIL"] * 4
    finding = verdicts[0].findings[0]
    error = RULE_ERRORS[finding.rule](finding, case(), mixed[0], "")
    assert pool.guilty_part(error) == f"the {part} of {mutant}: what has it fails, 4 of 8 combinations"
