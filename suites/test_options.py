"""Options of planners, writers and calls: other names, flags and partial loads; states that change between saves."""

from __future__ import annotations

from hypothesis import given

from dcpbench import cases, judge, share


@share(1 / 3)
@given(case=cases.switched())
def test_options_change_no_byte(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@share(1 / 6)
@given(case=cases.lenient_loads())
def test_a_partial_load_leaves_what_is_missing(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@share(1 / 5)
@given(case=cases.changing_states())
def test_a_changed_state_is_saved_as_it_is(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))
