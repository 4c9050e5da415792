"""What a user of the quick profile sees of a wrong backend: pytest fails, by the rule that names the defect."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dcpbench.rules import RULES
from tests.mutants import MUTANTS

ROOT = Path(__file__).parent.parent

CAUGHT = {
    "shifted_reader": "resharding",
    "scalar_as_vector": "round_trip",
    "generous_loader": "round_trip",
    "replacing_loader": "round_trip",
    "overrunning_reader": "round_trip",
    "alters_sources": "round_trip",
    "forgetful_metadata": "round_trip",
    "values_as_json": "round_trip",
    "refuses_empty_tensors": "round_trip",
    "own_failures_only": "bad_loads",
    "waits_for_ever": "round_trip",
    "lenient_loader": "bad_loads",
}
"""Mutants of every family, and the test of the suites that is to catch each."""


@pytest.mark.parametrize("name", CAUGHT)
def test_quick_profile_catches(name, tmp_path):
    mutant = MUTANTS[name]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "suites", "-k", CAUGHT[name], "--profile=quick", "--world-size=4"),
            *(f"--backend={mutant.backend}", f"--results={tmp_path}", "--rank-timeout=5", "-p", "no:cacheprovider"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    code = mutant.rules[0]
    assert re.search(rf"^{code} {RULES[code].name}: ", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^  replay +dcpbench replay \S+\.json --backend ", done.stdout, re.MULTILINE)
