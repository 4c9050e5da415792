"""Bytes that rot on storage are refused, and never loaded as if they were good."""

from __future__ import annotations

import pytest

from dcpbench.faults.corruption import corrupt
from dcpbench.faults.verdicts import FaultRun, check_run

NUM_TRIALS = {"quick": 120, "standard": 3000, "nightly": 20_000}


def test_damage_is_seen(pool, backend):
    if why := pool.lacks(backend, "local-folders", "objects", "resharding"):
        pytest.skip(why)
    if pool.settings.world_size < 2:
        pytest.skip("needs 2 ranks: give --world-size=2 or more")
    profile = pool.settings.profile
    report = corrupt(pool.pool, backend, NUM_TRIALS[profile])
    found = [(tree, finding) for _, tree, finding in report.findings]
    case = report.findings[0][0] if found else report.case
    check_run(pool, FaultRun("corruption", backend, case, found, is_complete=profile != "quick"))
