"""Cases that once showed a defect, in any backend or in ourselves."""

from __future__ import annotations

import pytest

from dcpbench import judge, load_case


def test_case_that_once_failed(regression, pool, backend, check):
    case = load_case(regression)
    if case.max_world_size > pool.settings.world_size:
        pytest.skip(f"needs {case.max_world_size} ranks: give --world-size={case.max_world_size} or more")
    check(judge(case, pool.run(case, backend)))
