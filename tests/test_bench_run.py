"""The benchmark on real ranks: rows with their proofs, backends that cheat, refusals, runs that are cut off."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dcpbench.bench import gate, run
from dcpbench.bench.group import Group, Rounds, measure_group
from dcpbench.bench.planted_names import LARGER, PLANTED_BYTES
from dcpbench.bench.row import SCHEMA_VERSION, Row
from dcpbench.bench.run import Matrix, measure
from dcpbench.bench.store import RunWriter, read_run, runs_below
from dcpbench.bench.workloads import fitted
from dcpbench.cli import main
from dcpbench.errors import DcpbenchError, MalformedFile, UsageError
from dcpbench.messages import Call
from dcpbench.ranks.pool import RankPool

ROOT = Path(__file__).parent.parent
EXPECTED = Path(__file__).parent / "expected_counters.json"
CHEATS = "tests.bench_backends"
SMALL = fitted("few-huge", 1 << 20)
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace: apt-get install strace")


@pytest.fixture(autouse=True)
def as_if_alone(monkeypatch):
    """Benchmarks refuse to run in a worker of xdist; here no figure of theirs is used."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.fixture(scope="module")
def two_ranks():
    with RankPool(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def rows(two_ranks, tmp_path_factory):
    """Honest and dishonest backends, side by side, by name."""
    names = ("skips_fsync", "reads_from_memory", "wrong_bytes", "forgets_a_rank", "raises")
    backends = ("reference", "gathered", *(f"{CHEATS}:{name}" for name in names))
    group = Group(SMALL, "fsdp2", 2, 2, backends)
    said = []
    found = measure_group(two_ranks, group, Rounds(timed=2), tmp_path_factory.mktemp("storage"), said.append)
    assert "round 2 of 2: reference" in said
    return {row.backend.rpartition(":")[2]: row for row in found}


@needs_strace
def test_a_row_holds_its_proof(rows):
    row = rows["reference"]
    assert (row.status, row.reason) == ("VALID", "")
    assert len(row.save_s) == len(row.load_s) == len(row.raw_write_s) == len(row.async_durable_s) == 2
    assert row.num_warmups == len(row.warmup_save_s) == 2
    assert row.written_bytes == row.synced_bytes >= row.stored_bytes >= row.state_bytes
    assert row.resident_share == 0
    assert row.storage_read_bytes >= row.state_bytes
    assert row.save_gib_per_s == pytest.approx(row.state_bytes / row.median_save_s / 2**30)
    assert row.rank_save_gib_per_s <= row.save_gib_per_s
    assert sum((row.save_planning_s, row.save_data_s, row.save_commit_s)) == pytest.approx(row.median_save_s, rel=0.5)
    assert all(b <= d for b, d in zip(row.async_blocking_s, row.async_durable_s, strict=True))
    assert 0 < row.goodput <= 1


@needs_strace
def test_gathering_needs_memory_for_all_of_it(rows):
    row = rows["gathered"]
    assert row.status == "VALID"
    assert row.save_data_s is None
    assert row.async_blocking_s == []
    assert row.save_peak_bytes > rows["reference"].save_peak_bytes + row.state_bytes // 2


@needs_strace
@pytest.mark.parametrize(
    ("cheat", "status", "says"),
    [
        ("skips_fsync", "INVALID", "had no fsync behind them"),
        ("reads_from_memory", "INVALID", "the rest came from a cache"),
        ("wrong_bytes", "FAIL", "wrong content: 'table.0.weight' holds other bytes than were saved on rank 1"),
        ("forgets_a_rank", "FAIL", "wrong content: 'table.0.weight' holds what it held before the load on rank 1"),
        ("raises", "FAIL", "save raised on rank 0: RuntimeError: no room for this"),
    ],
)
def test_who_cheats_is_found_out(rows, cheat, status, says):
    assert rows[cheat].status == status
    assert says in rows[cheat].reason
    assert (rows[cheat].save_gib_per_s is None) == (status == "FAIL")


def test_a_page_cache_that_is_not_cold_is_seen(two_ranks, tmp_path):
    two_ranks.step(Call(0, 2, f"{CHEATS}:stay_resident", {}, distributed=False))
    try:
        (row,) = measure_group(
            two_ranks,
            Group(SMALL, "tp", 2, 2, ("reference",)),
            Rounds(timed=1, with_async=False),
            tmp_path,
            lambda _: None,
        )
    finally:
        two_ranks.close()
        two_ranks.start()
    assert row.status == "INVALID"
    assert "lay in the page cache before a load" in row.reason or shutil.which("strace") is None


@pytest.mark.parametrize(("layout", "load_world_size"), [("3d", 2), ("hsdp", 2), ("fsdp2", 1)])
def test_layouts_and_other_world_sizes_come_back_whole(two_ranks, tmp_path, layout, load_world_size):
    rounds = Rounds(timed=1, is_cold=False, with_async=False, with_counts=False)
    group = Group(SMALL, layout, 2, load_world_size, ("reference", "gathered"))
    for row in measure_group(two_ranks, group, rounds, tmp_path, lambda _: None):
        assert row.reason == "bytes written and fsynced were not counted: it was not asked for"
        assert len(row.save_s) == 1


def test_damage_is_named(two_ranks):
    arguments = {"name": SMALL.name, "scale": SMALL.scale, "layout": "fsdp2"}
    seen = two_ranks.step(Call(0, 2, f"{CHEATS}:digests", arguments))
    for one in seen:
        before, damaged, fault, stale, mended = one.value
        assert before != damaged
        assert "holds other bytes than were saved" in fault
        assert "1 of 4 tensors are wrong" in fault
        assert "holds what it held before the load" in stale
        assert mended == ""


def test_collectives_and_copies_are_counted(two_ranks):
    for one in two_ranks.step(Call(0, 2, f"{CHEATS}:counted", {})):
        collectives, num_copies = one.value
        assert collectives["allreduce"] == 1
        assert collectives["broadcast"] >= 1
        assert num_copies == 2


def test_planted_memory_is_measured(two_ranks, tmp_path):
    setting = {"name": SMALL.name, "scale": SMALL.scale, "layout": "fsdp2"}
    two_ranks.step(Call(0, 2, "dcpbench.bench.measuring:take", setting))
    peaks = {}
    for number, backend in enumerate(("torch", LARGER) * 3):
        arguments = {"setting": tuple(setting.values()), "backend": backend, "folder": str(tmp_path / str(number))}
        call = Call(0, 2, "dcpbench.bench.measuring:save", {**arguments, "is_for_memory": True})
        peaks.setdefault(backend, []).append(max(one.value.peak_bytes for one in two_ranks.step(call)))
    more = statistics.median(peaks[LARGER]) - statistics.median(peaks["torch"])
    assert abs(more - PLANTED_BYTES) < 2 << 20


@needs_strace
def test_counters_are_what_they_were():
    """A change here is a change of what a save does: look at it, then `dcpbench bench counters --write FILE`."""
    assert gate.differences(gate.read_counters(EXPECTED), gate.measure_counters()) == []


def test_changed_counters_are_named():
    wanted = {"torch a": {"num_files": 3}, "torch b": {"num_files": 3}}
    assert gate.differences(wanted, {"torch a": {"num_files": 4}}) == [
        "torch a: num_files is 4, expected 3",
        "torch b: not measured",
    ]


ARGUMENTS = ["--workload=few-huge", "--layout=fsdp2", "--size=1", "--rounds=2", "--backend=reference"]


def test_a_run_is_kept_shown_and_reported(tmp_path, capsys):
    code = main(["bench", "run", *ARGUMENTS, "--load-world-size=1", "--load-world-size=2", f"--results={tmp_path}"])
    out = capsys.readouterr().out
    (folder,) = runs_below(tmp_path)
    found = read_run(folder)
    assert code == (0 if all(row.status == "VALID" for row in found.rows) else 1)
    assert [(row.world_size, row.load_world_size) for row in found.rows] == [(2, 1), (2, 2)]
    assert found.manifest["is_complete"]
    assert out.count("few-huge") == 2
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "report.csv",
        "report.html",
        "report.md",
        "rows.parquet",
    ]
    frame = pd.read_parquet(folder / "rows.parquet")
    assert list(frame.columns) == [field.name for field in dataclasses.fields(Row)]
    assert len(frame.loc[0, "save_s"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == [folder.parent.name]


def test_an_interrupted_run_keeps_the_finished_rows(tmp_path):
    command = [sys.executable, "-m", "dcpbench", "bench", "run", *ARGUMENTS, "--workload=many-small", "--layout=tp"]
    process = subprocess.Popen(
        [*command, f"--results={tmp_path}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]  # the title and the first row
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "few-huge" in lines[1]
    assert err.endswith("dcpbench: interrupted\n")
    (folder,) = runs_below(tmp_path)
    found = read_run(folder)
    assert [row.workload for row in found.rows][:1] == ["few-huge"]
    assert len(found.rows) < found.manifest["num_rows_planned"]
    assert not found.manifest["is_complete"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.parent.name]


def row(**more) -> Row:
    """A row of few figures."""
    known = {"backend": "torch", "workload": "w", "workload_version": 1, "workload_digest": "d", "scale": 1.0}
    where = {"layout": "fsdp2", "layout_digest": "l", "world_size": 2, "device": "cpu", "is_cold": True}
    load = {"load_layout": "fsdp2", "load_layout_digest": "l", "load_world_size": 2}
    size = {"num_tensors": 1, "state_bytes": 8, "local_bytes": 4, "status": "VALID", "reason": ""}
    return Row(**{**known, **where, **load, **size, **more})


def test_a_killed_run_keeps_the_finished_rows_but_not_half_of_one(tmp_path):
    writer = RunWriter(tmp_path, "here", {})
    writer.add(row(save_s=[1.0, 2.0]))
    writer.add(row(workload="v"))
    lines = writer.folder / "rows.jsonl"
    assert [one.workload for one in read_run(writer.folder).rows] == ["w", "v"]
    lines.write_text(lines.read_text()[:-20])
    assert read_run(writer.folder).rows == [row(save_s=[1.0, 2.0])]


def test_rows_survive_the_table(tmp_path):
    writer = RunWriter(tmp_path, "here", {})
    rows = [row(save_s=[1.0, 2.5], num_files=3, save_of_raw=0.5), row(workload="v")]
    for one in rows:
        writer.add(one)
    assert read_run(writer.finish(is_complete=True).folder).rows == rows
    assert sorted(path.name for path in writer.folder.iterdir()) == ["manifest.json", "rows.parquet"]


def test_files_that_cannot_be_read_are_refused(tmp_path):
    writer = RunWriter(tmp_path, "here", {})
    writer.add(row())
    folder = writer.finish(is_complete=True).folder
    table, manifest = folder / "rows.parquet", folder / "manifest.json"
    table.write_bytes(table.read_bytes()[:-30])
    with pytest.raises(MalformedFile, match="expected a whole Parquet file"):
        read_run(folder)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 1}))
    with pytest.raises(UsageError, match=f"Expected a run of schema {SCHEMA_VERSION} but .* has schema 1"):
        read_run(folder)
    manifest.write_text("{")
    with pytest.raises(MalformedFile, match="expected JSON"):
        read_run(folder)
    with pytest.raises(UsageError, match=r"Expected a benchmark run but .* is none"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--workload=llama4"], "Expected one of llama3-8b"),
        (["--layout=ddp"], "Expected one of fsdp2, hsdp, tp, 3d but got --layout='ddp'"),
        (["--layout=hsdp", "--world-size=3"], "a number of ranks that 2 divides"),
        (["--backend=torhc"], "Unknown backend 'torhc'"),
        (["--rounds=0"], "Expected at least one round but got --rounds=0"),
        (["--size=0"], "Expected at least 1 MiB"),
        (["--mtbf=0"], "Expected more than 0 hours"),
        (["--storage=/nowhere"], "Expected a folder that can be written but got --storage='/nowhere'"),
        (["--storage=/dev/shm"], "Expected a file system on a device for cold loads"),
        (["--workload=llama3-405b", "--scale=1.0"], "MiB of memory for llama3-405b on fsdp2 with 2 ranks but"),
        (["--results=/proc/none"], "Expected a results folder that can be written"),
    ],
)
def test_refusals_are_one_line_and_come_before_the_start(more, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "RankPool", None)
    assert main(["bench", "run", f"--results={tmp_path / 'r'}", *more]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_too_little_room_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RankPool", None)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1 << 20))
    with pytest.raises(UsageError, match=r"Expected \d+ MiB free in --storage=.* but 1 MiB are"):
        measure(Matrix(workloads=("few-huge",), results=tmp_path), lambda _: None, lambda _: None)


def test_no_measuring_beside_other_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    with pytest.raises(UsageError, match="worker of pytest-xdist"):
        measure(Matrix(results=tmp_path), lambda _: None, lambda _: None)


def test_the_page_names_each_column_with_its_unit():
    page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    table = page.split("## Benchmark columns")[1]
    named = re.findall(r"^\| `(\w+)` \| [\w/ %]+ \|", table, re.MULTILINE)
    assert named == [field.name for field in dataclasses.fields(Row)]
    assert f"schema version {SCHEMA_VERSION}" in table


def test_counters_are_taken_below_paths_that_are_as_long_and_as_deep_everywhere(tmp_path):
    folders = [gate._like_everywhere(tmp_path / at) for at in ("a", "longer", "deeper/and/deeper")]
    assert len({(len(str(folder)), len(folder.parts)) for folder in folders}) == 1
    with pytest.raises(DcpbenchError, match="Set TMPDIR"):
        gate._like_everywhere(tmp_path / ("x" * 200))
