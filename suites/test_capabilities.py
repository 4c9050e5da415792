"""What a backend declares absent, it refuses: cleanly, on all ranks, and not for nothing."""

from __future__ import annotations

import pytest
from hypothesis import given

from dcpbench import cases, judge, share


@share(1 / 4)
@given(wanting=cases.absences())
def test_what_is_absent_is_refused(wanting, pool, backend, check):
    if not wanting:
        pytest.skip("the backend declares nothing absent that a case could ask for")
    for case in wanting:
        check(judge(case, pool.run(case, backend)))


@share(1 / 10)
@given(case=cases.concurrent_readers())
def test_many_read_at_once(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))
