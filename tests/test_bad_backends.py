"""What users get for a backend that breaks the contract itself: one clear finding, never a traceback of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "rule", "says"),
    [
        ("takes_no_argument", "R501 refused-good-input", "takes 0 positional arguments but 1 was given"),
        ("returns_nonsense", "R501 refused-good-input", "int"),
        ("kills_itself", "R504 lost-rank", "SIGKILL"),
        ("prints_without_end", "R501 refused-good-input", "nothing was saved"),
    ],
)
def test_one_clear_finding(name, rule, says, tmp_path):
    suite = [sys.executable, "-m", "pytest", "suites/test_roundtrip.py", "-k", "round_trip", "-p", "no:cacheprovider"]
    options = ["--world-size=2", "--profile=quick", f"--backend=tests.bad_backends:{name}", f"--results={tmp_path}"]
    done = subprocess.run(
        [*suite, *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-3000:] + done.stderr
    broken = [line for line in done.stdout.splitlines() if line.startswith("R") and line[1:4].isdigit()]
    assert [line.split(":")[0] for line in broken] == [rule], done.stdout[-3000:]
    assert says in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "dcpbench/ranks" not in done.stdout
    assert len(done.stdout) < 20_000
