"""The judge, on observations made by hand: a perfect run passes, each damage is found by the rule that names it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from dcpbench import codec, judge
from dcpbench.case import Case, Layout, LeafLayout, Mesh, ObjectLeaf, Part, Placement, Step, TensorLeaf
from dcpbench.geometry import Box
from dcpbench.messages import ChunkTable, ErrorReport, ObjectObservation, Observation, TensorObservation
from dcpbench.objects import NEVER_LOADED, encode
from dcpbench.oracle.verdict import RULE_ERRORS, Finding, Verdict
from dcpbench.strategies import cases as suite_cases


def key(name):
    return (Part("key", name),)


def perfect(case: Case) -> list[Observation]:
    """What the ranks of a backend without fault would see."""
    return [
        seen
        for number, step in enumerate(case.steps)
        for rank in range(case.layouts[step.layout].world_size)
        for seen in [observe(case, number, rank)]
    ]


def observe(case: Case, number: int, rank: int) -> Observation:
    step = case.steps[number]
    layout = case.layouts[step.layout]
    base = Observation(rank, layout.world_size, number, step.action, "ok")
    if step.misuse != "none":
        text = f"Missing key in checkpoint: {case.leaves[step.misused].fqn if case.leaves else ''}"
        base = replace(base, outcome="raised", error=ErrorReport("RuntimeError", text, ""))
    if step.action not in ("save", "load", "wait", "convert") or (step.misuse != "none" and step.saves):
        return base
    version, asked_for = case.version_held(number), case.asked_for(number, rank)
    tensors = []
    for index in range(len(case.tensors)):
        leaf = case.tensor(index, version)
        shape = case.shape_asked(index, number, rank)
        region = layout.region(index, shape, rank)
        if index not in asked_for:
            tensors.append(TensorObservation(leaf.fqn, asked_for=False))
        elif region is None:
            tensors.append(TensorObservation(leaf.fqn, leaf.dtype, ()))
        else:
            is_untouched = step.misuse != "none" or case.is_missing(number, index)
            data = case.destination_bytes(index, number, rank) if is_untouched else None
            data = case.expected_bytes(index, version, region) if data is None else data
            tensors.append(TensorObservation(leaf.fqn, leaf.dtype, region.shape, data.tobytes()))
    objects = tuple(
        ObjectObservation(
            leaf.fqn,
            NEVER_LOADED
            if step.misuse != "none" or case.is_missing(number, index)
            else _value(case, number, rank, leaf),
            asked_for=index in asked_for,
        )
        for index, leaf in enumerate(case.objects, len(case.tensors))
    )
    paths = [case.leaves[index].path for index in asked_for]
    keys = tuple(sorted("/".join(repr(part.value) for part in path) for path in paths))
    tables = None
    if step.action in ("save", "wait") and rank == 0:
        tables = tuple(
            ChunkTable(leaf.fqn, leaf.dtype, leaf.shape, (Box((0,) * len(leaf.shape), leaf.shape),))
            for leaf in (one.at(version) for one in case.tensors)
        )
    if step.action == "wait":
        return replace(base, tables=tables)
    return replace(base, tensors=tuple(tensors), objects=objects, keys=keys, tables=tables)


def _value(case, number, rank, leaf):
    """What a rank holds: its own value after a save, that of the first rank which saved one after a load."""
    step = case.steps[number]
    source = number if step.saves and not step.resaves else case.source_of(number)
    layout = case.layouts[case.steps[number if source is None else source].layout]
    index = case.leaves.index(leaf)
    first = next(r for r in range(layout.world_size) if layout.holds(index, r))
    return leaf.encoded_at(case.version_held(number), rank if step.saves and not step.resaves else first)


@pytest.mark.parametrize("name", [name for name in suite_cases.__all__ if name != "absences"])
def test_a_perfect_run_passes(name):
    @settings(max_examples=40)
    @given(case=getattr(suite_cases, name)())
    def check(case):
        for one in case if isinstance(case, tuple) else (case,):  # `absences` draws one for each that is declared
            assert judge(one, perfect(one)).status == "PASS"

    check()


def example(rows: int = 6) -> Case:
    """Two tensors and an object; four ranks cut along dim 0 save, three load."""

    def layout(world_size):
        mesh = Mesh(("dp",), (world_size,), tuple(range(world_size)))
        return Layout(world_size, mesh, (LeafLayout((Placement(0),)), LeafLayout(None)))

    return Case(
        "reshard",
        1,
        (TensorLeaf(key("w"), (rows, 64)), TensorLeaf(key("b"), (3,), "bool")),
        (ObjectLeaf(key("step"), encode(7)),),
        (layout(4), layout(3)),
        (Step("save", 0), Step("load", 1)),
    )


def damaged(case: Case, rank: int, **changes) -> list[Observation]:
    """A perfect run but for the first tensor on one rank of the load."""
    return [
        replace(seen, tensors=(replace(seen.tensors[0], **changes), *seen.tensors[1:]))
        if (seen.step, seen.rank) == (1, rank)
        else seen
        for seen in perfect(case)
    ]


def rules_of(verdict: Verdict) -> list[str]:
    assert verdict.status == "FAIL"
    return [finding.rule for finding in verdict.findings]


def rows(case: Case, first: int, count: int) -> bytes:
    whole = case.expected_bytes(0, 0, case.layouts[0].region(1, (6, 64), 0))
    return whole.reshape(6, -1)[first : first + count].tobytes()


def test_the_message_tells_what_where_expected_got_setting_reason_rule():
    case = example()
    run = [
        replace(
            seen,
            tables=(
                ChunkTable("w", "float32", (6, 64), tuple(Box((2 * i, 0), (2, 64)) for i in range(3))),
                ChunkTable("b", "bool", (3,), (Box((0,), (3,)),)),
            ),
        )
        if seen.tables
        else seen
        for seen in damaged(case, 1, data=rows(case, 0, 2))
    ]
    (finding,) = judge(case, run).findings
    lines = finding.text("dcpbench replay results/failures/x.json --backend torch").splitlines()
    assert len(lines) <= 12
    assert lines[0] == "R101 wrong-bytes: 'w' differs after load on rank 1 of 3"
    labels = [line.split()[0] for line in lines[1:]]
    assert labels == ["at", "expected", "got", "saved", "loaded", "because", "replay", "rule"]
    assert lines[1].strip() == "at         global index (2, 0), box offsets=(2, 0) sizes=(2, 64), float32"
    want = rows(case, 2, 1)[:4][::-1].hex()
    got = rows(case, 0, 1)[:4][::-1].hex()
    assert lines[2].split()[1] == want
    assert lines[3].strip() == (
        f"got        {got}, which belongs at (0, 0) of the same tensor  (first of 128 of 128 elements)"
    )
    assert lines[4].strip() == "saved on   4 ranks, mesh dp=4: [Shard(0)]"
    assert lines[6].strip() == "because    it was read from the chunk at (0, 0); the chunk at (2, 0) holds it"


def test_zeros_other_versions_and_the_destination_itself_are_told_apart():
    case = example()
    region = case.layouts[1].region(0, (6, 64), 0)
    assert "zeros" in judge(case, damaged(case, 0, data=bytes(512))).findings[0].text()
    untouched = bytes(byte ^ 0xFF for byte in case.expected_bytes(0, 0, region).tobytes())
    assert rules_of(judge(case, damaged(case, 0, data=untouched))) == ["R107"]
    several = replace(case, steps=(Step("save", 0), Step("load", 1), Step("save", 0, "other", 1)))
    other = several.expected_bytes(0, 1, region).tobytes()
    run = damaged(case, 0, data=other)
    assert "R106" in [finding.rule for finding in judge(several, run).findings]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"dtype": "float64"}, "R102"),
        ({"shape": (128,)}, "R103"),
        ({"shape": None, "dtype": "list"}, "R104"),
        ({"same_tensor": False}, "R201"),
        ({"same_storage": False}, "R202"),
        ({"outside_intact": False}, "R203"),
    ],
)
def test_damage_to_a_tensor(changes, rule):
    assert rules_of(judge(example(), damaged(example(), 2, **changes))) == [rule]


@pytest.mark.parametrize("changes", [{"data": bytes(512)}, {"same_tensor": False}, {"shape": None}])
def test_a_save_that_changes_its_source(changes):
    run = [
        replace(seen, tensors=(replace(seen.tensors[0], **changes), *seen.tensors[1:]))
        if (seen.step, seen.rank) == (0, 0)
        else seen
        for seen in perfect(example())
    ]
    assert rules_of(judge(example(), run)) == ["R204"]


@pytest.mark.parametrize(
    ("encoded", "present", "rule"),
    [
        (encode(8), True, "R401"),
        (encode(7.0), True, "R401"),
        ("dcpbench: this value was never loaded", True, "R402"),
        (None, False, "R104"),
    ],
)
def test_damage_to_a_value(encoded, present, rule):
    run = [
        replace(seen, objects=(ObjectObservation("step", encoded, present),))
        if (seen.step, seen.rank) == (1, 1)
        else seen
        for seen in perfect(example())
    ]
    assert rules_of(judge(example(), run)) == [rule]


def test_an_added_key():
    run = [replace(seen, keys=(*seen.keys, "'0'")) if seen.step else seen for seen in perfect(example())]
    assert set(rules_of(judge(example(), run))) == {"R105"}


@pytest.mark.parametrize(
    ("table", "rule"),
    [
        (ChunkTable("w", "float32", (6, 64), (Box((0, 0), (5, 64)),)), "R301"),
        (ChunkTable("w", "float32", (6, 64), (Box((0, 0), (6, 64)), Box((5, 0), (1, 64)))), "R302"),
        (ChunkTable("w", "float32", (6, 64), (Box((0, 0), (7, 64)),)), "R303"),
        (ChunkTable("w", "float32", (6, 63), (Box((0, 0), (6, 63)),)), "R304"),
        (ChunkTable("w", "float16", (6, 64), (Box((0, 0), (6, 64)),)), "R304"),
        (ChunkTable("v", "float32", (6, 64), (Box((0, 0), (6, 64)),)), "R304"),
    ],
)
def test_damage_to_the_metadata(table, rule):
    run = [replace(seen, tables=(table, *seen.tables[1:])) if seen.tables else seen for seen in perfect(example())]
    assert rules_of(judge(example(), run)) == [rule]


def outcomes(case: Case, *kinds: str, text: str = "boom") -> list[Observation]:
    """A run whose load ends on rank r as ``kinds[r]`` says."""
    error = ErrorReport("RuntimeError", text, "")
    return [
        seen
        if seen.step == 0
        else replace(seen, outcome=kinds[seen.rank], error=None if kinds[seen.rank] == "ok" else error)
        for seen in perfect(case)
    ]


@pytest.mark.parametrize(
    ("kinds", "rules"),
    [
        (("raised", "raised", "raised"), ["R501"]),
        (("ok", "raised", "ok"), ["R502"]),
        (("raised", "hung", "hung"), ["R503"]),
        (("hung", "died", "raised"), ["R504"]),
    ],
)
def test_how_the_ranks_ended(kinds, rules):
    assert rules_of(judge(example(), outcomes(example(), *kinds))) == rules


def test_bad_input_must_be_refused_and_named():
    case = replace(example(), steps=(Step("save", 0), Step("load", 1, misuse="unknown-key", misused=0)))
    assert judge(case, outcomes(case, *["raised"] * 3, text="no key w here")).status == "PASS"
    assert rules_of(judge(case, outcomes(case, "ok", "ok", "ok"))) == ["R505"]
    assert rules_of(judge(case, outcomes(case, *["raised"] * 3, text="no such thing"))) == ["R506"]
    assert rules_of(judge(case, outcomes(case, "raised", "ok", "raised", text="no key w"))) == ["R502"]


def test_what_cannot_be_told_is_no_pass():
    case = example()
    assert judge(case, outcomes(case, "ok", "unconnected", "ok")).status == "UNKNOWN"
    assert judge(case, perfect(case)[:-1]).status == "UNKNOWN"
    assert judge(case, []).status == "UNKNOWN"


def test_each_rule_has_an_exception_of_its_own():
    assert len({error.__name__ for error in RULE_ERRORS.values()}) == len(RULE_ERRORS)
    assert RULE_ERRORS["R101"].__name__ == "R101WrongBytesError"


def test_verdicts_go_to_json_and_back():
    verdict = Verdict("FAIL", (Finding("R101", "x", (("at", "here"),), "w", 1, 1),))
    assert codec.from_json(Verdict, codec.to_json(verdict)) == verdict


def test_ranks_outside_the_group_have_no_say_in_its_outcome():
    layout = Layout(2, Mesh(("dp",), (1,), (0,)), (LeafLayout((Placement(0),)),), members=(0,))
    case = Case("group", 0, (TensorLeaf(key("w"), (4,)),), (), (layout,), (Step("save", 0),))
    raised = replace(observe(case, 0, 0), outcome="raised", error=ErrorReport("ValueError", "no room", ""))
    (found,) = judge(case, [raised, observe(case, 0, 1)]).findings
    assert found.rule == "R501"
