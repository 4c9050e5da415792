"""Every optimizer of torch.optim, with its switches, groups and schedulers: training goes on as if it never stopped."""

from __future__ import annotations

from hypothesis import given

from dcpbench import judge, share, training


@share(1 / 3)
@given(case=training.optimizers())
def test_an_optimizer_goes_on_where_it_stopped(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))
