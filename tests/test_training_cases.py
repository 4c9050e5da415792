"""Training cases: their data, their strategies, and that the rules of the family "training" catch what is planted."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import get_args

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings

from dcpbench import judge, load_case, training
from dcpbench.case_files import loads_case
from dcpbench.errors import MalformedFile, UsageError
from dcpbench.geometry import Region, full_region
from dcpbench.models.case import Form, ParallelismKind, TrainingCase
from dcpbench.models.facts import TRAINING_FACTS, training_facts_of
from dcpbench.models.observed import Shard, State
from dcpbench.models.tree import Block, BlockKind, ModelSpec
from dcpbench.oracle.training_states import differences, whole_state
from dcpbench.rules import RULES
from dcpbench.strategies.modules import model_specs
from dcpbench.strategies.optimizers import OPTIMIZERS
from dcpbench.training_script import as_training_script
from tests.mutants.training import TRAINING_MUTANTS

ROOT = Path(__file__).parent.parent
STRATEGIES = ("models", "optimizers", "options")
MAX_RUNS = 12


@functools.cache
def drawn(strategy: str) -> tuple[TrainingCase, ...]:
    """Returns the cases that a strategy gives, each once."""
    found: dict[str, TrainingCase] = {}

    def collect(case: TrainingCase) -> None:
        found.setdefault(case.id, case)

    options = settings(max_examples=120, database=None, phases=[hypothesis.Phase.generate])
    for number in range(2):
        options(hypothesis.seed(number)(given(getattr(training, strategy)())(collect)))()
    return tuple(found.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cases_survive_json(strategy):
    for case in drawn(strategy):
        again = loads_case(case.dumps())
        assert again == case
        assert again.id == case.id


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cases_shrink_towards_one_plain_rank_one_linear_layer_and_sgd(strategy):
    quiet = settings(database=None, max_examples=200)
    case = hypothesis.find(getattr(training, strategy)(), lambda case: bool(case.optimizers), settings=quiet)
    assert case.model == ModelSpec(5, (Block(name="a"),))
    assert {layout.kind for layout in case.layouts} == {"plain"}
    assert case.max_world_size == 1
    assert [(spec.kind, len(spec.groups)) for spec in case.optimizers] == [("SGD", 1)]


def test_strategies_reach_everything():
    cases = [case for strategy in STRATEGIES for case in drawn(strategy)]
    assert {block.kind for case in cases for _, block in case.model.walk()} == set(get_args(BlockKind))
    assert {spec.kind for case in cases for spec in case.optimizers} == set(OPTIMIZERS)
    assert {layout.kind for case in cases for layout in case.layouts} == set(get_args(ParallelismKind))
    assert {case.form for case in cases} == set(get_args(Form))
    parameters = [parameter for case in cases for parameter in case.model.parameters()]
    assert any(not p.shape for p in parameters)
    assert any(0 in p.shape for p in parameters)
    assert any(not p.is_trained for p in parameters)
    assert any(p.is_sparse for p in parameters)
    assert any(not case.model.blocks for case in cases)


@settings(max_examples=60, deadline=None)
@given(spec=model_specs())
def test_what_a_spec_says_is_what_is_built(spec):
    from dcpbench.models.modules import build_model

    model = build_model(spec, seed=1, instance=0)
    said, built = spec.parameters(), list(model.named_parameters(remove_duplicate=False))
    assert [(p.fqn, p.shape, p.is_trained) for p in said] == [(n, tuple(p.shape), p.requires_grad) for n, p in built]
    assert [p.same_as for p in said] == [[q is p for _, q in built].index(True) for _, p in built]
    persistent = {key for key in model.state_dict() if "_extra_state" not in key}
    buffers = [(n, tuple(b.shape), n in persistent) for n, b in model.named_buffers()]
    assert sorted((b.fqn, b.shape, b.is_persistent) for b in spec.buffers()) == sorted(buffers)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"blocks": [{"kind": "linear", "name": "a.b"}]}}, "expected a name without a dot but got 'a.b'"),
        ({"model": {"blocks": [{"name": "a"}, {"name": "a"}]}}, "expected children with names, each once"),
        ({"model": {"blocks": [{"name": "a", "tied_to": 0}]}}, "expected a linear block tied to one of 0 earlier ones"),
        ({"layouts": [{"kind": "tp", "sizes": [2, 2]}]}, "expected sizes of ('tp',) but got (2, 2)"),
        ({"steps": [{"action": "read", "layout": 1}]}, "expected steps that name one of 1 layouts"),
        ({"options": {"broadcast_from_rank0": True}}, "expected full_state_dict with broadcast_from_rank0"),
        ({"optimizers": [{"groups": [{"parameters": [7]}]}]}, "expected each parameter in one group"),
        ({"form": "all"}, "expected one of 'both', 'apart'"),
    ],
)
def test_a_malformed_case_names_the_place(change, says):
    data = {"family": "f", "model": {"blocks": []}, "layouts": [{}], "steps": [{"action": "read"}], **change}
    with pytest.raises(MalformedFile) as caught:
        loads_case(json.dumps(data))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_case(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_case(tmp_path / "absent.json")
    with pytest.raises(MalformedFile, match="expected JSON"):
        loads_case("{")


def test_facts_are_among_those_that_are_told():
    plain = {fact.split("<")[0] for fact in TRAINING_FACTS}
    for strategy in STRATEGIES:
        for case in drawn(strategy):
            keys = [
                "",
                *(f"model/{parameter.fqn}" for parameter in case.model.parameters()),
                "optim/state/a.weight/step",
            ]
            for key in keys:
                for facts in training_facts_of(case, key, len(case.steps) - 1):
                    assert all(fact in plain or f"{fact.split(':')[0]}:" in plain for fact in facts), facts


def _state(*values: int, region: Region | None = None, shape: tuple[int, ...] = (4,)) -> State:
    data = np.array(values, np.int32).tobytes()
    return State({"w": Shard("int32", shape, region or full_region(shape), data)}, {"o": {"int": "1"}})


def test_whole_tensors_are_put_together_and_compared():
    halves = [_state(1, 2, region=Region((((0, 2),),))), _state(3, 4, region=Region((((2, 2),),)))]
    tensors, values, problem = whole_state(halves)
    assert not problem
    assert differences(tensors, values, _state(1, 2, 3, 4), ["w", "o"]) == []
    (wrong,) = differences(tensors, values, _state(1, 2, 3, 2), ["w", "o"])
    assert wrong.lines[0][1].startswith("global index (3,)")
    assert wrong.lines[1:] == (
        ("expected", "00000004"),
        ("got", "00000002, which belongs at (1,) of the same tensor  (first of 1 elements)"),
    )
    kinds = [d.kind for d in differences(tensors, values, State(objects={"o": {"int": "2"}}), ["w", "o"])]
    assert kinds == ["missing", "value"]


@pytest.mark.parametrize(
    ("states", "says"),
    [
        ([_state(1, 2, 3, 4), _state(1, 2, 3, 5)], "'w' is not the same on all ranks"),
        ([_state(1, 2, region=Region((((0, 2),),)))], "no rank holds all of 'w'"),
        ([_state(1, 2, 3, 4), _state(1, 2, 3, 4, shape=(2, 2))], "'w' is not of one dtype and shape"),
    ],
)
def test_ranks_that_contradict_each_other_are_told(states, says):
    assert says in whole_state(states)[2]


@pytest.fixture
def ranks(pool):
    if pool.settings.world_size < 4:
        pytest.skip("some cases need 4 ranks")
    return pool


@pytest.mark.parametrize("mutant", TRAINING_MUTANTS.values(), ids=list(TRAINING_MUTANTS))
def test_what_is_planted_is_found_and_what_is_sound_is_not(mutant, ranks):
    fitting = (case for case in drawn(mutant.strategy) if mutant.shows_on(case) and case.max_world_size <= 4)
    broken: set[str] = set()
    for case in islice(fitting, MAX_RUNS):
        sound = judge(case, ranks.run(case, "tests.mutants.training:sound"))
        assert sound.status == "PASS", sound.reason or sound.findings[0].text()
        broken |= {finding.rule for finding in judge(case, ranks.run(case, mutant.backend)).findings}
        if mutant.rule in broken:
            return
    pytest.fail(f"not found by {mutant.rule} but by {sorted(broken)}: {mutant.defect}")


def test_an_engine_that_offers_no_stateful_is_not_judged_on_one(ranks):
    case = next(case for case in drawn("models") if case.form == "stateful" and case.max_world_size <= 2)
    verdict = judge(case, ranks.run(case, "tests.odd_backends:dense"))
    assert verdict.status == "UNSUPPORTED"
    assert "stateful" in verdict.reason


def test_each_rule_has_its_mutant():
    rules = {code: rule.mutant for code, rule in RULES.items() if rule.family == "training"}
    assert set(rules) == {mutant.rule for mutant in TRAINING_MUTANTS.values()}
    assert all(TRAINING_MUTANTS[name].rule == code for code, name in rules.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["copies", "backwards"])
def test_odd_but_correct_functions_are_not_flagged(name, strategy, ranks):
    for case in islice((case for case in drawn(strategy) if case.max_world_size <= 4), MAX_RUNS):
        verdict = judge(case, ranks.run(case, f"tests.mutants.training:{name}"))
        assert verdict.status == "PASS", verdict.reason or verdict.findings[0].text()


@pytest.mark.parametrize(("engine", "code"), [("torch", 1), ("reference", 0)])
def test_a_training_case_becomes_a_script_that_stands_alone(engine, code, tmp_path):
    case = load_case(ROOT / "suites/known_defects/torch/shared-moments.json")
    text = as_training_script(case, engine)
    assert "dcpbench" not in text.replace("github.com", "")
    (tmp_path / "script.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "script.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT) if engine == "reference" else ""},
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert ("the defect is there" if code else "the defect is not there") in done.stdout


def test_what_a_script_is_made_of_has_no_name_twice():
    text = as_training_script(drawn("models")[0], "torch")
    names = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(set(names)) == len(names)


def test_a_training_case_replays():
    file = ROOT / "suites/known_defects/torch/fresh-step.json"
    command = [sys.executable, "-m", "dcpbench", "replay", str(file), "--backend", "torch"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "R603 changed-by-reading: reading changed the training after it" in done.stdout
