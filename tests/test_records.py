"""Records: rows of real runs, the page that names their columns, files that are whole or absent."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pandas as pd
import pytest

from dcpbench.bench.record import SCHEMA_VERSION, Record, RunContext, as_frame, check_writable, records_of, write_frame
from dcpbench.case import Case, Layout, LeafLayout, Mesh, Part, Step, TensorLeaf
from dcpbench.errors import UsageError
from dcpbench.messages import Observation, Usage

PAGE = Path(__file__).parent.parent / "results" / "README.md"
CONTEXT = RunContext("test_x", "torch", "reference", "cpu", "PASS")


def case() -> Case:
    layout = Layout(2, Mesh(("dp",), (2,), (0, 1)), (LeafLayout(),))
    steps = (Step("save", 0), Step("load", 0), Step("load", 0))
    return Case("f", 1, (TensorLeaf((Part("key", "w"),), (5, 2), "int16"),), (), (layout,), steps)


def seen(step, rank, seconds, peak, **more):
    action = "save" if step == 0 else "load"
    return Observation(rank, 2, step, action, "ok", usage=Usage(seconds, 0.0, peak, peak + 1), **more)


def test_the_slowest_and_largest_rank_counts():
    run = [seen(0, 0, 1.0, 10, bytes_on_storage=99), seen(0, 1, 2.0, 5), seen(1, 0, 3.0, 7), seen(1, 1, 0.5, 8)]
    (record,) = records_of(case(), run, CONTEXT)
    assert (record.save_s, record.load_s) == (2.0, 3.0)
    assert (record.save_peak_bytes, record.load_peak_bytes, record.load_device_peak_bytes) == (10, 8, 9)
    assert (record.state_bytes, record.stored_bytes) == (20, 99)
    assert (record.save_backend, record.load_backend, record.verdict) == ("torch", "reference", "PASS")


def test_a_broken_step_gives_no_record():
    lost = Observation(1, 2, 1, "load", "died")
    assert records_of(case(), [seen(0, 0, 1.0, 1), seen(0, 1, 1.0, 1), seen(1, 0, 1.0, 1), lost], CONTEXT) == []


def test_the_page_names_each_column_with_its_unit():
    table = PAGE.read_text(encoding="utf-8").split("## Columns")[1].split("## Benchmark")[0]
    named = re.findall(r"^\| `(\w+)` \| \w+ \|", table, re.MULTILINE)
    assert named == [*(field.name for field in dataclasses.fields(Record)), "schema_version"]
    assert f"schema version {SCHEMA_VERSION}" in table


def test_a_frame_is_written_whole(tmp_path):
    (record,) = records_of(case(), [seen(n, r, 1.0, 1) for n in (0, 1) for r in (0, 1)], CONTEXT)
    write_frame(as_frame([record]), tmp_path / "a.parquet")
    frame = pd.read_parquet(tmp_path / "a.parquet")
    assert frame.loc[0, "save_s"] == 1.0
    assert frame.loc[0, "schema_version"] == SCHEMA_VERSION
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_an_empty_frame_has_the_columns():
    assert list(as_frame([])) == [field.name for field in dataclasses.fields(Record)]


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_frame(as_frame([]), tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_folder_that_cannot_be_written_is_answered_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"Expected a results folder .* Give another folder\."):
        check_writable(tmp_path / "file" / "results")
