"""Storages and planners by themselves, under virtual ranks: any plan, any order of ranks, a stop at any call."""

from __future__ import annotations

import pytest
from hypothesis import given

from dcpbench import judge, protocol


def settle(case, pool, backend, check):
    verdict = judge(case, pool.run(case, backend))
    check(verdict)
    if verdict.status == "UNSUPPORTED":
        pytest.skip(verdict.reason)


@given(case=protocol.storages())
def test_a_storage_takes_any_plan(case, pool, backend, check):
    settle(case, pool, backend, check)


@given(case=protocol.stopped_storages())
def test_a_stop_at_any_call_harms_no_checkpoint(case, pool, backend, check):
    settle(case, pool, backend, check)


@given(case=protocol.planners())
def test_planners_cover_each_element_once(case, pool, backend, check):
    settle(case, pool, backend, check)


@given(case=protocol.stopped_planners())
def test_each_rank_hears_of_a_planner_that_fails(case, pool, backend, check):
    settle(case, pool, backend, check)
