"""Saves in the background: the state at the call is what is saved."""

from __future__ import annotations

from hypothesis import given

from dcpbench import cases, judge, share


@share(1 / 5)
@given(case=cases.async_saves())
def test_what_follows_the_call_does_not_show(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@share(1 / 10)
@given(case=cases.bad_async_saves())
def test_each_rank_hears_of_a_failure_in_the_background(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))
