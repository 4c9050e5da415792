"""The command line: what it prints, how it ends, what it says of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcpbench import rules
from dcpbench.cli import main

ROOT = Path(__file__).parent.parent
DEFECTS = ROOT / "suites" / "known_defects" / "torch"


def test_rules(capsys):
    assert main(["rules"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(rules.RULES)
    assert main(["rules", "--markdown"]) == 0
    assert capsys.readouterr().out == rules.as_markdown()


def test_replay_shows_a_defect_and_the_lack_of_it(capsys):
    assert main(["replay", str(DEFECTS / "strided-load.json"), "--backend=torch"]) == 1
    out = capsys.readouterr().out
    assert "R101 wrong-bytes: 'w' differs after load on rank 0 of 2" in out
    assert out.splitlines()[-1].endswith("on torch: FAIL")
    assert main(["replay", str(DEFECTS / "strided-load.json"), "--backend=reference"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("on reference: PASS")


def test_replay_takes_the_backend_that_the_file_names(tmp_path, capsys):
    case = json.loads((DEFECTS / "int-key.json").read_text())
    (tmp_path / "f.json").write_text(json.dumps({"case": case, "backend": "torch", "load_backend": "reference"}))
    assert main(["replay", str(tmp_path / "f.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("on torch to reference: PASS")


def test_a_script_shows_the_defect_without_dcpbench(tmp_path, capsys):
    case = DEFECTS / "strided-load.json"
    for backend, code, says in (("torch", 1, "the defect is there"), ("reference", 0, "the defect is not there")):
        assert main(["script", str(case), f"--backend={backend}"]) == 0
        script = tmp_path / f"show_{backend}.py"
        script.write_text(capsys.readouterr().out)
        assert "dcpbench" not in script.read_text()
        environment = {**os.environ, "PYTHONPATH": str(ROOT) if backend == "reference" else ""}
        done = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )
        assert done.returncode == code
        assert done.stdout.splitlines()[-1].endswith(says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["replay", "absent.json"], "Expected a case file but absent.json cannot be read"),
        (["replay", __file__], "expected JSON"),
        (
            ["replay", str(DEFECTS / "int-key.json"), "--backend=torhc"],
            "Unknown backend 'torhc'. Known: fsspec, gathered, huggingface, reference, s3, torch.",
        ),
        (
            ["script", str(DEFECTS / "int-key.json"), "--backend=mine"],
            "Expected one of reference, torch but got --backend=",
        ),
        (["bench", "harness", "--world-size=0"], "Expected 1 to 128 ranks but got --world-size=0."),
        (["bench", "harness", "--trips=0"], "Expected at least one round trip but got --trips=0."),
    ],
)
def test_bad_input_is_answered_in_one_line(arguments, says, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dcpbench: ")
    assert says in err
    assert err.count("\n") == 1
