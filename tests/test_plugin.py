"""The plugin as users run it: whole pytest runs of the suites in processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent
MARK = "DCPBENCH_TEST_MARK"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "suites", "-p", "no:cacheprovider", "--world-size=2", *arguments]


def run(*arguments: str, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=ROOT, timeout=240, check=False, **more
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--backend=torhc"],
            "Unknown backend 'torhc'. Known: fsspec, gathered, huggingface, reference, s3, torch. Or give 'package.",
        ),
        (["--world-size=0"], "Expected 1 to 128 ranks but got --world-size=0. Give a number in that range."),
        (["--profile=fast"], "Expected one of quick, standard, nightly but got --profile='fast'. Give one of them."),
        (["--device=tpu"], "Expected 'cpu' or 'cuda' but got --device='tpu'. Give one of them."),
        (["--rank-timeout=0"], "Expected seconds above 0, at most a day but got --rank-timeout=0.0."),
        (["--results=pyproject.toml/results"], "Expected a results folder that can be written but got"),
        (["--backend=no_such_module:x"], "ModuleNotFoundError: No module named 'no_such_module'."),
        (["--backend=json:x"], "Expected an attribute 'x' in module 'json' for backend 'json:x' but it has none."),
        (["--backend=json:dumps"], "Expected 'json:dumps' to be a backend but got function."),
        (["--backend=no_such_module:x", "-n2"], "ModuleNotFoundError: No module named 'no_such_module'."),
    ],
)
def test_bad_options_are_answered_in_one_line(arguments, says, tmp_path):
    if not any(argument.startswith("--results") for argument in arguments):
        arguments = [*arguments, f"--results={tmp_path}"]
    done = run(*arguments)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert "Traceback" not in done.stdout + done.stderr


def test_a_run_prints_a_table_and_writes_records_and_junit(tmp_path):
    done = run(
        "--profile=quick",
        "--backend=reference",
        "-k",
        "resharding",
        f"--results={tmp_path}",
        f"--junit-xml={tmp_path}/j.xml",
    )
    assert done.returncode == 0, done.stdout
    assert (
        "dcpbench: 2 ranks on cpu, backends reference, profile quick (20 cases a test), known defects: none"
        in done.stdout
    )
    assert re.search(r"resharding_keeps_every_byte reference +20 +20 +0 +0 +0 +[\d.]+ +[\d.]+ +[\d.]+", done.stdout)
    (path,) = tmp_path.glob("suites-*.parquet")
    frame = pd.read_parquet(path)
    assert len(frame) == 20
    assert (frame["save_s"] > 0).all()
    assert ET.parse(tmp_path / "j.xml").getroot()[0].get("tests") == "1"


def test_workers_of_xdist_have_ranks_of_their_own_and_merge_records(tmp_path):
    done = run("--profile=quick", "-k", "resharding or round_trip", "-n2", f"--results={tmp_path}")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^80 cases judged", done.stdout, re.MULTILINE)
    (path,) = tmp_path.glob("suites-*.parquet")
    assert set(pd.read_parquet(path)["save_backend"]) == {"torch", "reference"}


def test_a_failure_explains_itself_and_replays(tmp_path):
    done = run(
        "--profile=quick",
        "--backend=tests.mutants.geometry:shifted_reader",
        "-k",
        "resharding",
        f"--results={tmp_path}",
    )
    assert done.returncode == 1
    assert re.search(r"^R101 wrong-bytes: .* differs after load on rank \d of \d$", done.stdout, re.MULTILINE)
    for label in ("at  ", "expected", "got", "saved on", "loaded on", "replay", "rule"):
        assert re.search(rf"^  {label}", done.stdout, re.MULTILINE), label
    assert "Traceback" not in done.stdout
    file = re.search(r"^R101 .*?dcpbench replay (\S+) --backend", done.stdout, re.MULTILINE | re.DOTALL)
    again = subprocess.run(
        [sys.executable, "-m", "dcpbench", "replay", file[1]], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert again.returncode == 1
    assert "R101 wrong-bytes" in again.stdout
    assert json.loads(Path(file[1]).read_text())["verdict"]["status"] == "FAIL"


def test_a_known_defect_that_was_mended_is_reported(tmp_path):
    own = f"--known-defects={ROOT}/suites/known_defects/torch.toml"
    done = run("--backend=reference", own, "-k", "known_defect", f"--results={tmp_path}")
    assert done.returncode == 1
    assert "The known defect 'int-key' of reference is stale" in done.stdout


def test_a_missing_list_of_known_defects_is_one_line(tmp_path):
    done = run(f"--known-defects={tmp_path}/none.toml", f"--results={tmp_path}")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "Expected a file of known defects but got --known-defects=" in done.stderr


def processes_with(mark: str) -> list[int]:
    """Pids of all processes whose environment holds ``mark``; ranks and their launcher inherit it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def home_of(pid: int) -> Path | None:
    """The folder in memory of the ranks that a process belongs to, told by its environment."""
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    found = [entry for entry in environment if entry.startswith(b"TMPDIR=") and b"dcpbench-" in entry]
    return Path(os.fsdecode(found[0].partition(b"=")[2])) if found else None


def wait_until(is_true, deadline_s: float) -> bool:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if is_true():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_behind(how, tmp_path):
    mark = f"{os.getpid()}-{how}"
    process = subprocess.Popen(
        command("--backend=reference", f"--results={tmp_path}"),
        cwd=ROOT,
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert wait_until(lambda: len(processes_with(mark)) >= 5, 240), "the ranks never came up"
    homes = {home_of(pid) for pid in processes_with(mark)} - {None}
    assert homes
    process.send_signal(how)
    out, _ = process.communicate(timeout=240)
    assert wait_until(lambda: not processes_with(mark), 60), "processes were left behind"
    assert wait_until(lambda: not any(home.exists() for home in homes), 60)
    if how == signal.SIGINT:
        assert process.returncode == pytest.ExitCode.INTERRUPTED
        assert "KeyboardInterrupt" in out
