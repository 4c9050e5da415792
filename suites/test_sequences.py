"""One thing after another: chains of layouts, and any sequence of steps."""

from __future__ import annotations

from hypothesis import given

from dcpbench import cases, judge, share


@share(1 / 6)
@given(case=cases.chains())
def test_any_path_of_layouts_ends_at_the_same_bytes(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@share(1 / 3)
@given(case=cases.sequences())
def test_any_sequence_of_steps(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))
