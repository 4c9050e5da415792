"""Known defects, strictly: each reproducer must still fail by the rule of its entry."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcpbench import judge, load_case

HANG_S = 2.0
"""Reproducers are small: what takes longer hangs."""


def test_known_defect_is_still_there(known_defect, pool):
    case = load_case(Path(known_defect.reproducer))
    if case.max_world_size > pool.settings.world_size:
        pytest.skip(f"needs {case.max_world_size} ranks: give --world-size={case.max_world_size} or more")
    if known_defect.severity == "hang":
        pool.pool.rank_timeout_s = min(pool.pool.rank_timeout_s, HANG_S)
    verdict = judge(case, pool.run(case, known_defect.backend))
    assert verdict.status != "UNKNOWN", verdict.reason
    broken = {finding.rule for finding in verdict.findings}
    assert broken & set(known_defect.rules), (
        f"The known defect {known_defect.id!r} of {known_defect.backend} is stale: its reproducer "
        f"{known_defect.reproducer} ended with {verdict.status}, rules broken: {sorted(broken) or 'none'}. "
        f"If the backend was mended, remove the entry and keep the case under suites/regressions/."
    )
