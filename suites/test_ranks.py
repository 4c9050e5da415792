"""State that differs from rank to rank: pipeline stages, values of each rank's own, process groups."""

from __future__ import annotations

from hypothesis import given

from dcpbench import cases, judge, share


@share(1 / 3)
@given(case=cases.stages())
def test_each_rank_gets_what_some_rank_held(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@share(1 / 30)
@given(case=cases.lonely_failures())
def test_each_rank_hears_of_a_failure_on_one(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@share(1 / 5)
@given(case=cases.process_groups())
def test_a_process_group_saves_and_loads_by_itself(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))
