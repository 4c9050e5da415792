"""Values and objects that a training loop keeps beside tensors."""

from __future__ import annotations

from hypothesis import given, settings

from dcpbench import cases, judge


@settings(max_examples=max(settings.default.max_examples // 4, 4))
@given(case=cases.stateful_round_trips())
def test_stateful_objects_give_and_take_their_state(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))
