"""Lists of known defects: what they explain, what they do not, and what is wrong with a malformed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcpbench.case import Case, Layout, LeafLayout, Mesh, ObjectLeaf, Part, Placement, Step, TensorLeaf
from dcpbench.errors import UsageError
from dcpbench.facts import facts_of
from dcpbench.known_defects import explains, load_defects
from dcpbench.objects import encode
from dcpbench.oracle.verdict import Finding

ENTRY = """
[[defect]]
id = "x"
rules = ["R101"]
when = ["load-several-boxes", "dtype:float32"]
sentence = "Something."
severity = "silent wrong data"
reference = "somewhere"
reproducer = "x.json"
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "x.json").touch()
        (tmp_path / "torch.toml").write_text(text)
        return tmp_path / "torch.toml"

    return write


def case() -> Case:
    """A plain tensor and an object under an int key; loaded on two ranks as strided shards, uneven."""
    mesh = Mesh(("dp",), (2,), (0, 1))
    tensors = (TensorLeaf((Part("key", "w"),), (5,)), TensorLeaf((Part("key", "v"),), (5,), "int8"))
    plain = (LeafLayout(), LeafLayout(None, "sliced"))
    strided = (LeafLayout((Placement(0, 2),)), LeafLayout((Placement(0, 2),)))
    values = (ObjectLeaf((Part("key", "o"), Part("key", 1)), encode(1)),)
    layouts = (Layout(2, mesh, plain), Layout(2, mesh, strided))
    return Case("f", 0, tensors, values, layouts, (Step("save", 0), Step("load", 1)))


def test_an_entry_explains_its_leaf_only(write):
    defects = load_defects(write(ENTRY), "torch")
    assert defects[0].backend == "torch"
    assert explains(defects, case(), Finding("R101", "", fqn="w", step=1)) is defects[0]
    assert explains(defects, case(), Finding("R101", "", fqn="", step=1)) is defects[0]
    assert explains(defects, case(), Finding("R101", "", fqn="v", step=1)) is None
    assert explains(defects, case(), Finding("R107", "", fqn="w", step=1)) is None
    assert explains(defects, case(), Finding("R101", "", fqn="w", step=0)) is None


def test_an_entry_may_ask_for_the_text(write):
    defects = load_defects(write(f'{ENTRY}text = "boom"'), "torch")
    assert explains(defects, case(), Finding("R101", "boom", fqn="w", step=1)) is defects[0]
    assert explains(defects, case(), Finding("R101", "bang", fqn="w", step=1)) is None


def test_facts():
    (save_facts,) = facts_of(case(), Finding("R101", "", fqn="v", step=0))
    assert save_facts == {"tensor", "plain", "dtype:int8", "memory:sliced"}
    (load_facts,) = facts_of(case(), Finding("R101", "", fqn="w", step=1))
    assert {"load-strided", "load-sharded", "load-several-boxes", "load-memory:contiguous", "plain"} < load_facts
    (value_facts,) = facts_of(case(), Finding("R402", "", fqn="o.1", step=1))
    assert value_facts == {"object", "int-key"}


def test_no_file_is_no_entries(tmp_path):
    assert load_defects(tmp_path / "absent.toml", "torch") == ()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[[defect]]", "[[defect", "cannot be read"),
        ('"R101"', '"R999"', "expected codes of docs/rules.md but got 'R999'"),
        ("silent wrong data", "bad", "expected a severity of"),
        ("load-several-boxes", "many-boxes", "expected facts such as"),
        ('sentence = "Something."', "", "expected the field 'sentence'"),
        ("x.json", "y.json", "expected the case file 'y.json' beside the list"),
        ('id = "x"', "id = 1", "expected str but got 1"),
    ],
)
def test_a_malformed_list_is_answered_in_one_line(write, old, new, says):
    with pytest.raises(UsageError) as caught:
        load_defects(write(ENTRY.replace(old, new)), "torch")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
