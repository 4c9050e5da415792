"""What was saved is what is loaded: same layout, other layout, no process group, several checkpoints, bad input."""

from __future__ import annotations

from hypothesis import given

from dcpbench import cases, judge, share


@given(case=cases.round_trips())
def test_round_trip_keeps_every_byte(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@given(case=cases.resharding())
def test_resharding_keeps_every_byte(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@share(1 / 2)
@given(case=cases.without_process_group())
def test_one_process_loads_what_many_ranks_saved(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@share(1 / 2)
@given(case=cases.multi_checkpoint())
def test_checkpoints_do_not_mix(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@given(case=cases.bad_loads())
def test_bad_loads_are_refused_on_all_ranks(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@share(1 / 2)
@given(case=cases.overwriting())
def test_an_overwritten_checkpoint_is_the_new_one(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@share(1 / 2)
@given(case=cases.partial_loads())
def test_a_load_brings_what_was_asked_for(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@given(case=cases.bad_saves())
def test_bad_saves_are_refused_on_all_ranks(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))
