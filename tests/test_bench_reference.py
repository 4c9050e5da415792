"""The benchmark of the reference: that it runs, checks what it measures, counts bytes and leaves nothing behind.

No test here says how long anything may take.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dcpbench.bench import counters, goals, reference, reference_planning, reference_ranks, roofline
from dcpbench.bench.figures import Figures, Planned, Sample, Workload, combined
from dcpbench.bench.power_law import fit
from dcpbench.bench.reference_goals import goals_of
from dcpbench.cli import main
from dcpbench.errors import DcpbenchError, UsageError

ROOT = Path(__file__).parent.parent
SMALL = Workload("small", 6, 4096, 32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run of the whole, as small as it gets: what it printed and what it wrote."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "dcpbench", "bench", "reference", "--rounds=2", "--scale=0.004"]
    done = subprocess.run(
        [*command, f"--disk={folder}", f"--json={folder / 'out.json'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "out.json").read_text()), folder


def test_every_side_is_measured_everywhere(run):
    _, written, folder = run
    seen = {(s["place"], s["workload"], s["side"], s["action"], s["round"]) for s in written["samples"]}
    assert len(seen) == len(written["samples"]) == 2 * 2 * 3 * 2 * 3
    assert {place for place, *_ in seen} == {"/dev/shm", "disk"}
    assert [path.name for path in folder.iterdir()] == ["out.json"]
    for sample in written["samples"]:
        assert sample["begin_s"] <= sample["data_begin_s"] < sample["data_end_s"] <= sample["end_s"]


def test_loads_from_disk_are_from_disk_or_invalid(run):
    printed, written, _ = run
    for workload in ("small", "large"):
        loads = [
            s for s in written["samples"] if (s["place"], s["workload"], s["action"]) == ("disk", workload, "load")
        ]
        is_cold = all(sample["resident_share"] <= 0.01 for sample in loads if sample["round"])
        (title,) = [
            line for line in printed.splitlines() if line.startswith("disk: ") and _title_of(written, workload) in line
        ]
        assert ("loads from disk" in title, "loads INVALID" in title) == (is_cold, not is_cold)


def _title_of(written, name):
    (workload,) = [workload for workload in written["workloads"] if workload["name"] == name]
    return f"{workload['num_tensors']:,} tensors"


def test_bytes_are_counted_by_the_system(run):
    _, written, _ = run
    sizes = {w["name"]: w["num_tensors"] * w["tensor_bytes"] for w in written["workloads"]}
    for sample in written["samples"]:
        if sample["action"] == "load":
            assert sizes[sample["workload"]] <= sample["read_bytes"] < 1.5 * sizes[sample["workload"]]
    shares = {(q["workload"], q["side"], q["dim"]): q["read_over_wanted"] for q in written["quarters"]}
    assert shares["large", "reference", 0] < 1.1
    assert shares["large", "reference", 1] < 1.1
    assert 1 < shares["small", "reference", 0] < 1.5  # few tensors: the metadata shows
    assert shares["large", "torch", 0] > 3.9


def test_planning_is_measured_for_every_destination(run):
    _, written, _ = run
    sides = {(plan["side"], plan["destination"]) for plan in written["plans"]}
    assert sides == {(s, d) for s in ("torch", "reference") for d in ("1 of 2 ranks", "1 of 64 ranks", "as many boxes")}
    items = {}
    for plan in written["plans"]:
        items.setdefault((plan["destination"], plan["num_chunks"], plan["num_tensors"]), set()).add(plan["num_items"])
    assert all(len(counts) == 1 for counts in items.values())


def test_the_table_shows_each_goal_with_its_verdict(run):
    printed, written, _ = run
    assert "at 0.004 of the size that they are meant for" in printed
    for goal in written["goals"]:
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  {goal['name']}  ")]
        assert ("met" if goal["is_met"] else "MISSED") in line.split()
    assert len(written["goals"]) == 18 + 4 + 3 + 4


def test_an_interrupted_run_leaves_nothing_behind(tmp_path):
    command = [
        sys.executable,
        "-m",
        "dcpbench",
        "bench",
        "reference",
        "--rounds=50",
        "--scale=0.01",
        f"--disk={tmp_path}",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pattern = f"dcpbench-{process.pid}-*"
    try:
        deadline = time.monotonic() + 120
        while not list(Path("/dev/shm").glob(f"{pattern}/*/*")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert not list(Path("/dev/shm").glob(pattern))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_gate", [False, True])
def test_only_a_gate_turns_a_missed_goal_into_an_exit_code(monkeypatch, is_gate, capsys):
    monkeypatch.setattr(reference, "RankPool", lambda _: nullcontext(SimpleNamespace()))
    monkeypatch.setattr(reference, "_call", lambda *_, **__: ["zlib", "zlib"])
    monkeypatch.setattr(reference._Run, "measure", lambda *_: None)
    monkeypatch.setattr(reference._Run, "measure_quarters", lambda *_: None)
    monkeypatch.setattr(reference._Run, "measure_plans", lambda *_: None)
    monkeypatch.setattr(reference, "run_lines", lambda *_: ())
    monkeypatch.setattr(
        reference, "goals_of", lambda _: [goals.at_least("speed", 1.0, 2.0), goals.at_most("size", 1.0, 2.0)]
    )
    assert reference.measure(reference.Options(is_gate=is_gate)) == int(is_gate)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in printed[-2:]] == ["MISSED", "met"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds=0"], "--rounds=0"),
        (["--scale=0"], "--scale=0.0"),
        (["--scale=9"], "--scale=9.0"),
        (["--disk=/proc/nowhere"], "--disk"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message, capsys):
    assert main(["bench", "reference", *options]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_too_little_room_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(reference.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UsageError, match="smaller --scale"):
        reference._check_room({"disk": tmp_path}, 100)


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr(dist, "barrier", lambda: None)
    reference_ranks.take(0, 1, workload=SMALL)
    yield
    reference_ranks.forget(0, 1)


def sampled(side, folder, action):
    folder.mkdir(exist_ok=True)
    return reference_ranks.sample(
        0, 1, side=side, action=action, folder=str(folder), is_cold=False, is_for_memory=False
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("side", ["raw", "torch", "reference"])
def test_what_comes_back_wrong_is_noticed(side, one_rank, tmp_path):
    sampled(side, tmp_path / side, "save")
    assert sampled(side, tmp_path / side, "load").peak_bytes >= 0
    reference_ranks._held[0].source["layers.4.weight"][3, 5] += 1
    with pytest.raises(DcpbenchError, match=rf"{side} loaded other content.*'layers\.4\.weight' and 0 more"):
        sampled(side, tmp_path / side, "load")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_quarter_that_comes_back_wrong_is_noticed(one_rank, tmp_path):
    sampled("reference", tmp_path / "r", "save")
    for dim in (0, 1):
        read, wanted = reference_ranks.quarter(0, 1, side="reference", dim=dim, folder=str(tmp_path / "r"))
        assert wanted == SMALL.num_bytes // 4 <= read
    reference_ranks._held[0].source["layers.0.weight"][0, 0] += 1
    with pytest.raises(DcpbenchError, match="other content"):
        reference_ranks.quarter(0, 1, side="reference", dim=0, folder=str(tmp_path / "r"))


def test_a_plan_that_covers_too_little_is_noticed(monkeypatch):
    arguments = {"side": "reference", "num_chunks": 64, "num_tensors": 1, "destination": "as many boxes"}
    assert reference_planning.plan_load(0, 1, **arguments).num_items == 128
    none = lambda _self, _fqn, _entry, boxes: [[] for _ in boxes]  # noqa: E731
    monkeypatch.setattr("reference.load_planner.PartFinder.parts", none)
    with pytest.raises(DcpbenchError, match="planned reads of 0 elements"):
        reference_planning.plan_load(0, 1, **arguments)


def test_the_raw_limit_moves_the_bytes_themselves(tmp_path):
    contents = [memoryview(bytes([i]) * (1000 * i)) for i in range(4)]
    roofline.write(tmp_path / "raw", contents)
    assert (tmp_path / "raw").read_bytes() == b"".join(contents)
    back = [memoryview(bytearray(len(content))) for content in contents]
    roofline.read(tmp_path / "raw", back)
    assert back == contents
    with pytest.raises(EOFError):
        roofline.read(tmp_path / "raw", [memoryview(bytearray(7000))])


def test_counters_count(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    before = counters.bytes_read()
    (tmp_path / "file").read_bytes()
    assert 1 << 20 <= counters.bytes_read() - before < (1 << 20) + 10_000
    assert counters.resident_share(tmp_path) == 1.0
    assert counters.resident_share(tmp_path / "nothing") == 0.0


def test_ranks_are_combined_to_the_slowest_and_the_largest():
    one = Sample(1.0, 5.0, 2.0, 4.0, 10, 100, 0.0)
    other = Sample(1.5, 6.0, 3.0, 3.5, 30, 50, 0.5)
    both = combined([one, other])
    assert both == Sample(1.0, 6.0, 2.0, 4.0, 30, 150, 0.5)
    assert (both.seconds, both.data_s, both.planning_s) == (5.0, 2.0, 3.0)


def figures_of(**seconds):
    """Figures of one place and workload in which each side takes so many seconds, half of them for the data path."""
    figures = Figures([SMALL], ["here"], "zlib")
    for side, spent in seconds.items():
        for action in ("save", "load"):
            slow_for_memory = Sample(0, 1000, 0, 1000, 5 << 20, 0, 0)
            sample = Sample(0, spent, 0, spent / (1 if side == "raw" else 2), 1 << 20, 0, 0)
            figures.samples["here", "small", side, action] = [slow_for_memory, sample, sample]
    for chunks in (10, 20):
        figures.plans["reference", "as many boxes", chunks, 1] = [Planned(0, chunks, 1)]
    return figures


def test_goals_hold_medians_of_rounds_against_their_limits():
    by_name = {goal.name: goal for goal in goals_of(figures_of(raw=3.0, torch=12.0, reference=4.0))}
    assert by_name["small save, here: of raw"].value == pytest.approx(0.75)
    assert by_name["small save, here: of raw"].is_met
    assert by_name["small save, here: data path of raw"].value == pytest.approx(1.5)
    assert by_name["small save, here: times torch"].value == pytest.approx(3.0)
    assert not by_name["small load, here: times torch"].is_met
    assert by_name["small load, here: times torch"].note == "raw itself is 4 times torch"
    assert by_name["small load: peak beyond the state"].value == 5.0
    slower = {goal.name: goal for goal in goals_of(figures_of(raw=3.0, torch=12.0, reference=4.1))}
    assert not slower["small save, here: of raw"].is_met


def test_growth_is_an_exponent():
    assert fit({n: 7.0 * n for n in (10, 100, 1000)}).exponent == pytest.approx(1.0)
    assert fit({n: n * math.log(n) for n in (1024, 16384)}).exponent == pytest.approx(1.121, abs=0.001)
    assert fit({n: n**2 for n in (10, 100)}).exponent == pytest.approx(2.0)


def test_torch_is_never_needed_to_start():
    script = "import sys, dcpbench.bench.reference; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert torch.__version__
