"""Cases go to JSON and back, and a malformed file is answered with the place and the reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings

from dcpbench import objects
from dcpbench.case import Case
from dcpbench.errors import MalformedFile, UsageError
from dcpbench.strategies import bad_loads, multi_checkpoint, resharding, round_trips, values, without_process_group


@pytest.mark.parametrize("strategy", [bad_loads, multi_checkpoint, resharding, round_trips, without_process_group])
def test_cases_survive_json(strategy):
    @settings(max_examples=50)
    @given(case=strategy())
    def check(case):
        again = Case.loads(case.dumps())
        assert again == case
        assert again.id == case.id
        fqns = [leaf.fqn for leaf in (*case.tensors, *case.objects)]
        assert len(set(fqns)) == len(fqns)

    check()


@given(encoded=values())
def test_values_survive_encoding(encoded):
    again = objects.encode(objects.decode(json.loads(json.dumps(encoded))))
    assert objects.differs_at(encoded, again) is None


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [
        (1, True, ""),
        (1, 1.0, ""),
        (0.0, -0.0, ""),
        ((1, 2), [1, 2], ""),
        ([1, [2, 3]], [1, [2, 4]], "[1][1]"),
        ([1], [1, 2], ""),
        (float("nan"), float("nan"), None),
        ({"a": 1}, {"a": 1}, None),
        ("a", b"a", ""),
        (None, "None", ""),
        ([None], ["None"], "[0]"),
    ],
)
def test_values_are_compared_without_mercy(one, other, place):
    assert objects.differs_at(objects.encode(one), objects.encode(other)) == place


def _data():
    return json.loads(
        """{"family": "f", "seed": 1, "tensors": [{"path": ["a"], "shape": [5]}], "objects": [],
        "layouts": [{"world_size": 1, "mesh": {"axes": ["dp"], "sizes": [1], "ranks": [0]},
                     "leaves": [{"placements": ["Shard(0)"]}]}],
        "steps": [{"action": "save", "layout": 0}]}"""
    )


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["seed"], "x", "case.seed: expected int but got 'x'"),
        (["seed"], True, "case.seed: expected int but got True"),
        (["tensors", 0, "dtype"], "float33", "case.tensors[0]: expected a dtype such as"),
        (["tensors", 0, "shape"], [-1], "expected sizes of 0 and more"),
        (["tensors", 0, "path"], [], "expected a path with at least one part"),
        (["layouts", 0, "mesh", "ranks"], [0, 1], "expected as many ranks as places"),
        (["layouts", 0, "mesh", "ranks"], [3], "expected the mesh within the world"),
        (["layouts", 0, "leaves", 0, "placements"], ["Shard(1)"], "expected placements within 1 dims"),
        (["layouts", 0, "leaves", 0, "placements"], ["Shard"], "expected 'Replicate()', 'Shard(0)'"),
        (["layouts", 0, "leaves"], [], "expected 1 leaf layouts but got 0"),
        (["steps", 0, "action"], "sav", "case.steps[0].action: expected one of 'save', 'load', "),
        (["steps", 0, "layout"], 1, "expected steps that name one of 1 layouts"),
        (["steps", 0, "colour"], 1, "but got 'colour'"),
    ],
)
def test_a_malformed_case_names_the_place(path, value, says):
    data = _data()
    at = data
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    with pytest.raises(MalformedFile) as caught:
        Case.loads(json.dumps(data))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_field_and_no_json(tmp_path):
    data = _data()
    del data["seed"]
    with pytest.raises(MalformedFile, match="expected the field 'seed' of Case but it is missing"):
        Case.loads(json.dumps(data))
    with pytest.raises(MalformedFile, match="expected JSON"):
        Case.loads("{")
    with pytest.raises(UsageError, match="cannot be read"):
        Case.load(tmp_path / "absent.json")
