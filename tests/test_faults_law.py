"""The law of crashes, the books of damage and the list of known faults, each alone."""

from dataclasses import replace

import pytest

from dcpbench.errors import UsageError
from dcpbench.faults.crash import SCENARIOS
from dcpbench.faults.crash_images import Image
from dcpbench.faults.damage import KINDS, Damage, damaged, damages
from dcpbench.faults.known import KnownFault, load_known_faults, sort_findings
from dcpbench.faults.law import LoadSeen, content_of, crash_findings, judge_crash, version_of
from dcpbench.faults.live import Fault, LiveTrial, faults_of, judge_live
from dcpbench.faults.operations import OpenFile, Rename, Sync, Write
from dcpbench.faults.score import rows_of, wilson
from dcpbench.messages import ErrorReport, Observation
from dcpbench.oracle.verdict import Finding

OVERWRITE, BESIDE = SCENARIOS["overwrite"], SCENARIOS["beside"]
NEW, OLD = 1, 0


def image(*, lost=(), done=(0,), crash="kill", returned=False):
    return Image({}, crash, done, lost, returned)


def loaded(version, scenario=OVERWRITE):
    return LoadSeen("loaded", content_of(scenario.case(), len(scenario.before) + 1, version))


def mixed():
    return LoadSeen("loaded", (*loaded(OLD).content[:1], *loaded(NEW).content[1:]))


REFUSED = LoadSeen("refused", error="CheckpointException: no such file")


def rules(seen, *, scenario=OVERWRITE, others=None, **more):
    case, step = scenario.case(), len(scenario.before) + 1
    found = judge_crash(case, step, scenario.stakes(), image(**more), {"ckpt": seen, **(others or {})})
    return [finding.rule for finding in found]


@pytest.mark.parametrize("version", [OLD, NEW])
def test_the_old_one_whole_or_the_new_one_whole(version):
    assert rules(loaded(version)) == []


@pytest.mark.parametrize(
    ("seen", "rule"),
    [
        (mixed(), "R801"),
        (REFUSED, "R802"),
        (LoadSeen("hung", error="not within 10 s"), "R805"),
        (LoadSeen("died", error="SIGSEGV"), "R805"),
        (LoadSeen("refused", error=" "), "R805"),
    ],
)
def test_anything_else_breaks_the_law(seen, rule):
    assert rules(seen) == [rule]


@pytest.mark.parametrize("seen", [loaded(OLD), REFUSED])
def test_after_the_return_it_must_be_the_new_one(seen):
    assert rules(seen, returned=True) == ["R804"]
    assert rules(loaded(NEW), returned=True) == []


def test_a_first_save_may_leave_an_error():
    first = SCENARIOS["first"]
    assert rules(REFUSED, scenario=first) == []
    assert rules(loaded(0, first), scenario=first) == []


def test_a_neighbour_stays_as_it_was():
    assert rules(REFUSED, scenario=BESIDE, others={"older": loaded(0, BESIDE)}) == []
    assert rules(REFUSED, scenario=BESIDE, others={"older": REFUSED}) == ["R803"]
    assert rules(REFUSED, scenario=BESIDE, others={"older": loaded(1, BESIDE)}) == ["R803"]


def test_versions_are_told_apart():
    case = OVERWRITE.case()
    assert version_of(case, 2, loaded(NEW), [OLD, NEW]) == NEW
    assert version_of(case, 2, loaded(NEW), [OLD]) is None
    assert version_of(case, 2, REFUSED, [OLD, NEW]) is None


TRACE = (
    OpenFile(path="ckpt/t", rank=0),
    Write(path="ckpt/t", data=b"1234", offset=0, rank=0),
    Rename(path="ckpt/t", target="ckpt/a", rank=0),
    Sync(path="ckpt", rank=1),
)


def test_a_finding_names_the_operation_and_the_missing_order():
    judged = [
        (image(lost=(1,), done=(0, 1, 2), crash="posix"), Finding("R802", "gone")),
        (image(lost=(0, 1), done=(0, 1, 2, 3), crash="posix", returned=True), Finding("R802", "gone")),
        (image(lost=(1,), done=(0, 1), crash="posix"), Finding("R802", "gone")),
        (image(done=(0, 1)), Finding("R801", "mixed")),
    ]
    found = dict.fromkeys(finding.text() for _, finding in crash_findings(TRACE, judged))
    assert len(found) == 3
    text = "\n".join(found)
    assert "posix: gone, without write 4 bytes to ckpt/t at byte 0" in text
    assert "an fsync of 'ckpt/t' after operation 1" in text
    assert "before the save returns" in text
    assert "kill: mixed, after write 4 bytes" in text


def test_ranks_that_lag_are_named():
    (_, finding), *_ = crash_findings(TRACE, [(image(done=(0, 3)), Finding("R801", "mixed"))])
    assert dict(finding.facts)["while"] == "rank 0 has not come to operation 1 (write 4 bytes to ckpt/t at byte 0)"


def test_faults_are_counted_by_rank_path_and_call():
    trace = tuple(
        replace(op, call=call) for op, call in zip(TRACE, ["openat", "write", "rename", "fsync"], strict=True)
    )
    again = replace(trace[1], offset=4)
    found = list(faults_of((*trace[:2], again, *trace[2:]), ["EIO"]))
    assert [(fault.call, fault.path, fault.when, fault.rank) for fault in found] == [
        ("openat", "ckpt/t", 1, 0),
        ("write", "ckpt/t", 1, 0),
        ("write", "ckpt/t", 2, 0),
        ("rename", "ckpt/t", 1, 0),
        ("fsync", "ckpt", 1, 1),
    ]
    assert "inject=write:error=EIO:when=2" in found[2].arguments("/s")


def live_rules(*outcomes, seen, kind="EIO", error="Input/output error"):
    observations = tuple(
        Observation(rank, 2, 1, "save", outcome, error=ErrorReport("E", error, "") if outcome != "ok" else None)
        for rank, outcome in enumerate(outcomes)
    )
    trial = LiveTrial(Fault(kind, 0, 1, "write", "ckpt/t", 1), observations, was_hit=True, loads={"ckpt": seen})
    return [finding.rule for finding in judge_live(OVERWRITE.case(), OVERWRITE, trial)]


def test_a_live_fault_is_raised_everywhere_or_made_good():
    assert live_rules("raised", "raised", seen=loaded(OLD)) == []
    assert live_rules("ok", "ok", seen=loaded(NEW)) == []
    assert live_rules("died", "raised", seen=loaded(OLD), kind="kill") == []


@pytest.mark.parametrize(
    ("outcomes", "seen", "more", "rule"),
    [
        (("ok", "raised"), loaded(OLD), {}, "R502"),
        (("raised", "hung"), loaded(OLD), {}, "R503"),
        (("raised", "died"), loaded(OLD), {}, "R504"),
        (("died", "hung"), loaded(OLD), {"kind": "kill"}, "R503"),
        (("ok", "ok"), loaded(OLD), {}, "R806"),
        (("ok", "ok"), REFUSED, {}, "R806"),
        (("raised", "raised"), REFUSED, {}, "R802"),
        (("raised", "raised"), mixed(), {}, "R801"),
        (("raised", "raised"), loaded(OLD), {"error": "it failed"}, "R807"),
    ],
)
def test_what_a_live_fault_may_not_do(outcomes, seen, more, rule):
    assert live_rules(*outcomes, seen=seen, **more) == [rule]


GOOD = {"a": b"1" * 512 + b"2" * 512, "b": b"3" * 512 + b"4" * 512, "meta": b"index", "folder": None}


def test_damage_changes_what_it_says():
    assert damaged(GOOD, Damage("flip a bit", "meta", 0, 1))["meta"] == b"kndex"
    assert damaged(GOOD, Damage("change a byte", "meta", 4, 65))["meta"] == b"indeA"
    assert damaged(GOOD, Damage("cut", "meta", 2))["meta"] == b"in"
    assert damaged(GOOD, Damage("extend", "meta", value=2))["meta"] == b"index\0\0"
    assert damaged(GOOD, Damage("zero a block", "a", 1))["a"][512:] == bytes(512)
    assert damaged(GOOD, Damage("move a block", "a", 1, 0))["a"][:512] == GOOD["a"][512:]
    swapped = damaged(GOOD, Damage("swap two files", "a", other="b"))
    assert (swapped["a"], swapped["b"]) == (GOOD["b"], GOOD["a"])
    assert damaged(GOOD, Damage("copy over another", "a", other="b"))["a"] == GOOD["b"]
    assert "a" not in damaged(GOOD, Damage("delete", "a"))
    assert damaged(GOOD, Damage("empty", "a"))["a"] == b""
    with pytest.raises(ValueError, match="a kind of damage"):
        damaged(GOOD, Damage("burn", "a"))


def test_damages_are_different_and_each_changes_something():
    is_metadata = {path: path == "meta" for path in GOOD}
    found = damages(GOOD, is_metadata, 300, seed=1)
    assert len({damage for _, damage in found}) == len(found) == 300
    assert all(damaged(GOOD, damage) != GOOD for _, damage in found)
    assert {target for target, _ in found} == {"data", "metadata"}
    assert {damage.kind for _, damage in found} == set(KINDS)
    assert found == damages(GOOD, is_metadata, 300, seed=1)
    assert found != damages(GOOD, is_metadata, 300, seed=2)


def test_the_interval_is_wilsons():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(10, 10) == (pytest.approx(0.7225, abs=1e-4), 1.0)
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))


def test_rows_have_their_kinds_and_a_sum():
    rows = rows_of([("data", "cut", "wrong"), ("data", "empty", "harmless"), ("data", "cut", "detected")], KINDS)
    assert [(row.target, row.kind, row.total) for row in rows] == [
        ("data", "cut", 2),
        ("data", "empty", 1),
        ("all", "all", 3),
    ]
    assert rows[0].share("wrong")[0] == 0.5


ENTRY = KnownFault("x", ("R801",), ("crash/first",), "Something.", "data loss", "source", text="kill")


def test_known_faults_are_strict():
    hit, other = Finding("R801", "kill: mixed"), Finding("R801", "posix: mixed")
    assert sort_findings([ENTRY], "crash/first", [hit, other]).new == (other,)
    assert sort_findings([ENTRY], "crash/first", [hit]).known == {"x": 1}
    assert sort_findings([ENTRY], "crash/first", [other]).stale == ("x",)
    assert sort_findings([ENTRY], "crash/nested", [hit]).new == (hit,)
    assert sort_findings([ENTRY], "crash/nested", []).stale == ()


def test_a_malformed_list_of_faults_is_answered_in_one_line(tmp_path):
    path = tmp_path / "torch.toml"
    assert load_known_faults(path, "torch") == ()
    good = 'id="x"\nrules=["R801"]\nruns=["a"]\nsentence="s"\nseverity="data loss"\nreference="r"\n'
    path.write_text(f"[[fault]]\n{good}")
    assert load_known_faults(path, "torch")[0].backend == "torch"
    for old, new in [("R801", "R999"), ("data loss", "bad"), ('id="x"', ""), ("[[fault]]", "[[fault")]:
        path.write_text(f"[[fault]]\n{good}".replace(old, new))
        with pytest.raises(UsageError) as caught:
            load_known_faults(path, "torch")
        assert "\n" not in str(caught.value)
