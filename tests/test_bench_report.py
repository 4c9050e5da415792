"""Reports of benchmark runs: the page in a browser, Markdown, CSV, comparisons and their exit codes."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser

import pytest

from dcpbench.bench.row import Row
from dcpbench.bench.store import RunWriter, read_run
from dcpbench.cli import main
from dcpbench.errors import UsageError
from dcpbench.report.bench_page import as_html
from dcpbench.report.bench_tables import as_csv, as_markdown, terminal_line
from dcpbench.report.comparison import compare_backends, compare_runs, exit_code

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 0.99, 1.005, 0.995]
MANIFEST = {
    "dcpbench": "0",
    "commit": "abc",
    "versions": {"torch": "2"},
    "machine": {"id": "m", "cpu": "c <&>", "num_cores": 2, "memory_gib": 8},
    "file_system": "ext4",
    "options": {"rounds": {"timed": 10}},
    "workloads": {"w": {"digest": "d", "scale": 1.0}},
    "num_rows_planned": 3,
}


def row(backend="torch", times=1.0, **more) -> Row:
    """A valid row whose times are ``times`` seconds."""
    seconds = [times * one for one in SECONDS]
    known = {"workload": "w", "workload_version": 1, "workload_digest": "d", "scale": 1.0, "layout": "fsdp2"}
    where = {"layout_digest": "l", "world_size": 2, "load_layout": "fsdp2", "load_layout_digest": "l"}
    size = {"load_world_size": 2, "device": "cpu", "is_cold": True, "num_tensors": 1, "state_bytes": 1 << 30}
    status = {"local_bytes": 1 << 29, "status": "VALID", "reason": "", "save_s": seconds, "load_s": seconds}
    raw = {"raw_write_s": [0.5] * 10, "raw_read_s": [0.25] * 10, "median_save_s": times, "median_load_s": times}
    figures = {"save_of_raw": 0.5 / times, "load_of_raw": 0.25 / times, "save_gib_per_s": 1 / times}
    memory = {"save_peak_bytes": 10 << 20, "load_peak_bytes": 5 << 20, "num_files": 3, "num_storage_calls": 30}
    split = {"save_planning_s": 0.1, "save_data_s": 0.7, "save_commit_s": 0.2} if backend == "torch" else {}
    given = {**known, **where, **size, **status, **raw, **figures, **memory, **split, **more}
    return Row(backend=backend, **given)


def run_of(folder, rows, **more):
    writer = RunWriter(folder, "m", {**MANIFEST, **more})
    for one in rows:
        writer.add(one)
    return writer.finish(is_complete=True)


@pytest.fixture
def run(tmp_path):
    bad = row("mine<b>", 2.0, status="INVALID", reason="not cold: 2 % <of> the files", workload="v", world_size=4)
    return run_of(tmp_path, [row(), row("reference", 0.5), bad])


class Page(HTMLParser):
    """What a page has: tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_nothing_from_elsewhere(run):
    text = as_html(run)
    page = Page(text)
    assert {"svg", "table", "details", "style", "script"} <= {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
    assert "mine&lt;b&gt;" in text
    assert "mine<b>" not in text


def test_every_row_has_its_proof(run):
    tags = Page(as_html(run)).tags
    links = [attributes["href"] for tag, attributes in tags if tag == "a"]
    assert links == ["#proof-0", "#proof-1", "#proof-2"]
    assert {f"#{attributes['id']}" for tag, attributes in tags if tag == "details"} == set(links)


def test_history_and_scaling_are_plotted(tmp_path):
    first = run_of(tmp_path, [row(times=1.1)])
    first = replace(first, folder=first.folder.with_name("20200101T000000Z-1"))
    second = run_of(tmp_path / "later", [row(), row(world_size=4)])
    text = as_html(second, [first])
    assert 'aria-label="history of save"' in text
    assert 'aria-label="scaling of w, fsdp2"' in text
    alone = as_html(run_of(tmp_path / "alone", [row()]))
    assert "history of save" not in alone
    assert "scaling of" not in alone


SCRIPT = """
<script>{
const seen = {errors: window.seenErrors}, texts = () => [...document.querySelectorAll("#table tbody tr")]
  .filter(row => !row.hidden).map(row => row.cells[3].textContent);
const press = title => [...document.querySelectorAll("#table th button")].find(b => b.textContent === title).click();
seen.before = texts(); press("save s"); seen.up = texts(); press("save s"); seen.down = texts();
press("backend"); seen.byName = texts();
const input = document.querySelector("#filter");
input.value = "REFERENCE fsdp2"; input.dispatchEvent(new Event("input")); seen.filtered = texts();
seen.count = document.querySelector("#count").textContent;
location.hash = "#proof-2";
seen.width = [document.documentElement.scrollWidth, innerWidth];
addEventListener("hashchange", () => { seen.isOpen = document.querySelector("#proof-2").open;
  parent.document.body.textContent = "SEEN" + JSON.stringify(seen) + "SEEN"; });
}</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1200, 390])
def test_sort_and_filter_work_in_a_browser(run, tmp_path, width):
    listen = "<script>window.seenErrors = []; onerror = text => { seenErrors.push(text); };</script>"
    text = as_html(run).replace("<head>", f"<head>{listen}").replace("</html>", f"{SCRIPT}</html>")
    page = tmp_path / "page.html"  # a frame, since a window of Chromium is at least 500 pixels wide
    page.write_text(f'<iframe width={width} height=900 style="border:0" srcdoc="{escape(text)}"></iframe>')
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    match = re.search(r"SEEN(.*)SEEN", done.stdout)
    assert match, done.stdout[-500:] + done.stderr[-500:]
    seen = json.loads(unescape(match[1]))
    assert seen["errors"] == []
    assert "CONSOLE" not in done.stderr
    assert seen["before"] == ["torch", "reference", "mine<b>"]
    assert seen["up"] == ["reference", "torch", "mine<b>"]
    assert seen["down"] == ["mine<b>", "torch", "reference"]
    assert seen["byName"] == ["mine<b>", "reference", "torch"]
    assert seen["filtered"] == ["reference"]
    assert seen["count"] == "1 of 3 rows"
    assert seen["isOpen"]
    assert seen["width"][0] <= seen["width"][1] == width


def test_markdown_csv_and_terminal(run):
    markdown = as_markdown(run)
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert len({line.count("|") for line in table}) == 1
    assert "- **INVALID** mine<b>, v, fsdp2: not cold: 2 % <of> the files" in markdown
    rows = list(csv.DictReader(io.StringIO(as_csv(run))))
    assert [one["backend"] for one in rows] == ["torch", "reference", "mine<b>"]
    assert [float(one) for one in rows[0]["save_s"].split()] == SECONDS
    assert terminal_line(run.rows[2]).endswith("INVALID: not cold: 2 % <of> the files")


def test_backends_of_one_run(run):
    compared = compare_backends(run, "torch", "reference")
    assert [(one.action, one.verdict) for one in compared] == [("save", "faster"), ("load", "faster")]
    assert compared[0].comparison.ratio == pytest.approx(0.5)
    assert exit_code(compared, [], is_strict=True) == 0
    assert exit_code(compare_backends(run, "reference", "torch"), [], is_strict=False) == 1
    assert compare_backends(run, "torch", "mine<b>") == []
    with pytest.raises(UsageError, match=r"Expected a backend of .* but got 'other'"):
        compare_backends(run, "torch", "other")


def test_runs_of_two_nights(tmp_path):
    old = run_of(tmp_path / "old", [row()])
    slower = run_of(tmp_path / "new", [row(times=1.1, num_files=4, save_peak_bytes=80 << 20)])
    compared, changes = compare_runs(old, slower)
    assert [one.verdict for one in compared] == ["slower", "slower"]
    assert [change.text for change in changes] == [
        "num_files was 3, is 4",
        "save_peak_bytes was 10 MiB, is 80 MiB",
    ]
    assert exit_code(compared, changes, is_strict=False) == 1
    same, none = compare_runs(old, run_of(tmp_path / "same", [row()]))
    assert [one.verdict for one in same] == ["same", "same"]
    assert (none, exit_code(same, none, is_strict=True)) == ([], 0)
    broken = run_of(tmp_path / "broken", [row(status="FAIL", reason="wrong content")])
    compared, changes = compare_runs(old, broken)
    assert compared == []
    assert [(change.text, change.is_worse) for change in changes] == [("was VALID, is FAIL: wrong content", True)]


def test_a_slow_night_of_the_machine_is_not_the_backends(tmp_path):
    old = run_of(tmp_path / "old", [row()])
    raw = {"raw_write_s": [1.0] * 10, "raw_read_s": [0.5] * 10}
    compared, _ = compare_runs(old, run_of(tmp_path / "new", [row(times=2.0, **raw)]))
    assert [one.verdict for one in compared] == ["same", "same"]


def test_few_samples_cannot_tell(tmp_path):
    def few(times):
        return row(save_s=[times], load_s=[times], raw_write_s=[0.5], raw_read_s=[0.5])

    compared, changes = compare_runs(run_of(tmp_path / "a", [few(1.0)]), run_of(tmp_path / "b", [few(1.5)]))
    assert [one.verdict for one in compared] == ["cannot tell", "cannot tell"]
    assert exit_code(compared, changes, is_strict=False) == 0
    assert exit_code(compared, changes, is_strict=True) == 3


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"machine": {**MANIFEST["machine"], "id": "n"}}, "two runs of one machine but got m and n"),
        ({"file_system": "xfs"}, "one kind of file system but got ext4 and xfs"),
        ({"workloads": {"w": {"digest": "e"}}}, "the same workload w but its digests are d and e"),
        ({"workloads": {}}, "rows in common"),
    ],
)
def test_what_differs_is_not_compared(tmp_path, capsys, more, says):
    old = run_of(tmp_path / "old", [row()])
    new = run_of(tmp_path / "new", [row(workload="x")], **more)
    assert main(["compare", str(old.folder), str(new.folder)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_the_commands(tmp_path, capsys):
    old = run_of(tmp_path / "old", [row(), row("reference", 0.5)])
    new = run_of(tmp_path / "new", [row(times=1.2), row("reference", 0.5)])
    assert main(["compare", str(old.folder), str(new.folder)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"torch w fsdp2 x2 +save +1\.2\d\d \(1\.\d+ \.\. 1\.\d+\) .* slower\n", out)
    assert re.search(r"reference w fsdp2 x2 +save .* same\n", out)
    assert main(["compare", f"--in={old.folder}", "torch", "reference"]) == 0
    assert main(["report", str(old.folder), f"--out={tmp_path / 'page'}", f"--history={tmp_path / 'old'}"]) == 0
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == ["report.csv", "report.html", "report.md"]
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(old.folder), f"--out={old.folder / 'rows.parquet'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert read_run(old.folder).rows == old.rows
