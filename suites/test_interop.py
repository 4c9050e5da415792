"""What one implementation of the DCP format saves, another loads."""

from __future__ import annotations

from hypothesis import given

from dcpbench import cases, judge, share


@share(1 / 2)
@given(case=cases.resharding())
def test_one_loads_what_the_other_saved(case, pool, saver, loader, check):
    check(judge(case, pool.run(case, saver, load_backend=loader)))
