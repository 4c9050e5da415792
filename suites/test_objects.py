"""Values and objects that a training loop keeps beside tensors."""

from __future__ import annotations

from hypothesis import given

from dcpbench import cases, judge, share


@share(1 / 6)
@given(case=cases.stateful_round_trips())
def test_stateful_objects_give_and_take_their_state(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))
