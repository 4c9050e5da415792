"""What users get for a backend that breaks the contract itself: one clear finding, never a traceback of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcpbench import UsageError
from dcpbench.ranks.backends_seen import BackendsSeen

ROOT = Path(__file__).parent.parent


def run(backend, tmp_path):
    suite = [sys.executable, "-m", "pytest", "suites/test_roundtrip.py", "-k", "round_trip", "-p", "no:cacheprovider"]
    options = ["--world-size=2", "--profile=quick", f"--backend={backend}", f"--results={tmp_path}"]
    return subprocess.run(
        [*suite, *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


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
    done = run(f"tests.bad_backends:{name}", tmp_path)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-3000:] + done.stderr
    broken = [line for line in done.stdout.splitlines() if line.startswith("R") and line[1:4].isdigit()]
    assert [line.split(":")[0] for line in broken] == [rule], done.stdout[-3000:]
    assert says in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "dcpbench/ranks" not in done.stdout
    assert len(done.stdout) < 20_000


@pytest.mark.parametrize(
    ("specification", "says"),
    [
        ("tests.bad_backends.raises_at_import:x", "to import but got RuntimeError: no licence was found."),
        ("tests.bad_backends.exits_at_import:x", "to import but got SystemExit: 0."),
        ("tests.bad_backends.dies_at_import:x", "to open but its rank died: "),
        ("tests.bad_backends:absent", "Expected an attribute 'absent' in module 'tests.bad_backends'"),
        ("tests.bad_backends:unheard_of", "Expected a capability but got absent of backend 'unheard-of'='colour'."),
        ("tests.bad_backends:has_no_location", "to be entered but ConnectionError: the server did not start. Mend it."),
        ("tests.bad_backends:ends_its_location", "to be entered but its process ended. Mend it."),
    ],
)
def test_one_clear_line_before_any_case(specification, says, pool):
    seen = BackendsSeen(lambda: pool.pool)
    with pytest.raises(UsageError) as caught:
        seen.place(specification)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    seen.close()


def test_the_line_ends_the_run(tmp_path):
    done = run("tests.bad_backends:has_no_location", tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    assert [line for line in done.stderr.splitlines() if line.startswith("ERROR: Expected the location of backend")]
    assert "Traceback" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
