"""What of torch a backend is built on, and whose known defects it may therefore show."""

from __future__ import annotations

import sys
import threading

import pytest

from dcpbench.backends import registry
from dcpbench.backends.lineage import torch_parts
from dcpbench.known_defects import Defect, defects_of


@pytest.mark.parametrize(
    ("specification", "parts"),
    [
        ("torch", "engine planner state_dict storage"),
        ("reference", ""),
        ("tests.odd_backends:chatty", "engine planner state_dict storage"),
        ("tests.odd_backends:row_chunks", "engine planner state_dict storage"),
        ("tests.odd_backends:database", "engine planner state_dict"),
        ("tests.odd_backends:dense", "state_dict"),
        ("tests.mutants.absences:refuses_values", "engine planner state_dict storage"),
        ("engine=reference,planner=torch,storage=reference", "planner"),
        ("engine=torch,planner=reference,storage=tests.odd_backends:database", "engine state_dict"),
    ],
)
def test_what_runs_of_torch_is_seen(specification, parts, tmp_path):
    assert torch_parts(registry.resolve(specification), tmp_path) == tuple(parts.split())
    assert sys.getprofile() is None
    assert threading.getprofile() is None


def defect(name: str, backend: str, part: str) -> Defect:
    return Defect(name, backend, ("R101",), (), "Something.", "crash", "somewhere", "x.json", part)


LISTS = {
    "torch": [defect("e", "torch", "engine"), defect("p", "torch", "planner"), defect("s", "torch", "storage")],
    "mine": [defect("mine", "mine", "")],
}
STATE_DICT = [defect("d", "torch", "state_dict"), defect("n", "torch", "")]


@pytest.mark.parametrize(
    ("specification", "ids"),
    [
        ("torch", "epsdn"),
        ("reference", ""),
        ("mine", ["mine", "e", "p"]),
        ("engine=torch,planner=reference,storage=reference", "edn"),
        ("engine=reference,planner=torch,storage=torch", "psn"),
        ("engine=torch,planner=torch,storage=mine", [*"epdn", "mine"]),
    ],
)
def test_defects_are_inherited_with_the_part(specification, ids):
    lists = {**LISTS, "torch": LISTS["torch"] + STATE_DICT}
    found = defects_of(specification, lists, {"mine": ("engine", "planner")})
    assert [defect.id for defect in found] == list(ids)


@pytest.mark.parametrize("name", ["tests.rank_backends:asks_for_its_rank", "tests.rank_backends:asks_for_no_group"])
def test_what_runs_in_one_process_or_on_two_ranks_is_seen(name, pool):
    assert pool.backends.torch_parts(name) == ("engine", "planner", "state_dict", "storage")
