"""From a checkpoint to a torch.save file and back."""

from __future__ import annotations

from hypothesis import given

from dcpbench import cases, judge, share


@share(1 / 6)
@given(case=cases.conversions())
def test_conversion_loses_nothing(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))
