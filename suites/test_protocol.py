"""Storages and planners by themselves, under virtual ranks: any plan, any order of ranks, a stop at any call."""

from __future__ import annotations

import pytest
from hypothesis import given

from dcpbench import judge, protocol


@pytest.fixture
def settle(pool, backend, check):
    def run_and_judge(case):
        verdict = judge(case, pool.run(case, backend))
        check(verdict)
        if verdict.status == "UNSUPPORTED":
            pytest.skip(verdict.reason)

    return run_and_judge


@given(case=protocol.storages())
def test_a_storage_takes_any_plan(case, settle):
    settle(case)


@given(case=protocol.stopped_storages())
def test_a_stop_at_any_call_harms_no_checkpoint(case, settle):
    settle(case)


@given(case=protocol.planners())
def test_planners_cover_each_element_once(case, settle):
    settle(case)


@given(case=protocol.stopped_planners())
def test_each_rank_hears_of_a_planner_that_fails(case, settle):
    settle(case)
