"""A checkpoint is data: whatever it holds, a load runs none of it, stays in its folder, and ends soon."""

from __future__ import annotations

import pytest

from dcpbench.faults.hostile import try_hostile
from dcpbench.faults.verdicts import FaultRun, check_run

QUICK = ("planner-data-that-calls", "path-above", "link-to-a-file", "doubling-lists", "a-chunk-is-missing")


def test_hostile_checkpoints_are_refused(pool, backend):
    if why := pool.lacks(backend, "local-folders", "objects", "resharding"):
        pytest.skip(why)
    if pool.settings.world_size < 2:
        pytest.skip("needs 2 ranks: give --world-size=2 or more")
    is_quick = pool.settings.profile == "quick"
    report = try_hostile(pool.pool, backend, QUICK if is_quick else None)
    if not report.is_applicable:
        pytest.skip("the samples are in DCP's format, which this backend does not write")
    found = [(None, finding) for attack in report.attacks for finding in report.findings(attack)]
    check_run(pool, FaultRun("hostile", backend, report.case, found, is_complete=not is_quick))
