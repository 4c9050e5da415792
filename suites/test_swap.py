"""Engine, planner and storage of two implementations, mixed: a failure moves with the part that is wrong."""

from __future__ import annotations

from hypothesis import given

from dcpbench import cases, judge, share


@share(1 / 6)
@given(case=cases.resharding())
def test_parts_can_be_swapped(case, pool, swapped, check):
    check(judge(case, pool.run(case, swapped)))
