"""The simulator itself: every legal order and no other, ranks that stop, ranks that wait for ever."""

from __future__ import annotations

import json
from math import factorial

import pytest
from hypothesis import given, settings

from dcpbench import judge, load_case, protocol
from dcpbench.backends import registry
from dcpbench.bench.simulator import Options, measure
from dcpbench.case_files import loads_case
from dcpbench.errors import UsageError
from dcpbench.geometry import Box
from dcpbench.messages import Observation
from dcpbench.protocol_case import Halt, ProtocolCase, ProtocolLeaf, ProtocolPart, ProtocolStep
from dcpbench.simulate import drive, every_order, follow, pause
from dcpbench.simulate.fibres import kill
from dcpbench.simulate.run import run_case
from reference.collectives import Broadcast, Gather, Ok, Scatter


def one(rank, trace=None, num_pauses=0):
    """A rank that gathers its number, is scattered twice that, and hears the sum."""
    trace = trace if trace is not None else []
    for _ in range(num_pauses):
        pause()
        trace.append(rank)
    gathered = yield Gather("numbers", Ok(rank))
    numbers = [message.value for message in gathered] if rank == 0 else []
    doubled = yield Scatter("doubled", [Ok(2 * number) for number in numbers] if rank == 0 else None)
    total = yield Broadcast("sum", Ok(sum(numbers)) if rank == 0 else None)
    return doubled.value, total.value


@pytest.mark.parametrize("is_pickled", [True, False])
@pytest.mark.parametrize("is_fine", [True, False])
@pytest.mark.parametrize("schedule", [(), (3, 1, 4, 1, 5, 9, 2, 6), (7,) * 40])
def test_each_rank_gets_its_answers(is_pickled, is_fine, schedule):
    run = drive([one(rank) for rank in range(5)], follow(schedule), is_pickled=is_pickled, is_fine=is_fine)
    assert run.values() == [(2 * rank, 10) for rank in range(5)]


def test_ranks_take_turns_at_calls_only_where_they_may():
    coarse, fine = [], []
    drive([one(rank, coarse, 2) for rank in range(2)], follow((1, 0, 1, 0)))
    drive([one(rank, fine, 2) for rank in range(2)], follow((1, 0, 1, 0, 1, 0)), is_fine=True)
    assert coarse == [1, 1, 0, 0]
    assert sorted(fine) == sorted(coarse)
    assert fine not in ([0, 0, 1, 1], [1, 1, 0, 0])


def test_every_order_is_run_once():
    runs = list(every_order(lambda choose: drive([one(rank) for rank in range(3)], choose)))
    orders = [tuple(run.order) for run in runs]
    assert len(set(orders)) == len(orders) >= factorial(3)
    assert {order[:3] for order in orders} >= {(0, 1, 2), (2, 1, 0), (1, 0, 2)}
    assert all(run.values() == [(0, 3), (2, 3), (4, 3)] for run in runs)


def test_a_rank_that_is_gone_takes_along_who_waits_for_it():
    def dies(rank):
        yield Gather("numbers", Ok(rank))
        kill()

    run = drive([one(0), dies(1), one(2)])
    assert [end.outcome for end in run.ends] == ["ok", "died", "ok"]  # it had given what the others wait for

    def dies_at_once(rank):
        kill()
        yield Gather("numbers", Ok(rank))

    run = drive([one(0), dies_at_once(1), one(2)])
    assert [end.outcome for end in run.ends] == ["raised", "died", "raised"]
    assert "rank 1 is gone" in str(run.ends[2].value)


def test_ranks_that_wait_for_ever_are_reported():
    def leaves(rank):
        yield Gather("numbers", Ok(rank))
        raise ValueError("on its own")

    def never_asks(rank):
        return rank
        yield

    run = drive([never_asks(0), one(1)])
    assert "ranks [1] wait for ever in scatter 'doubled'" in run.problem
    assert [end.outcome for end in drive([leaves(0), one(1)]).ends] == ["raised", "stuck"]


def test_different_collectives_are_reported():
    def other(rank):
        yield Gather("numbers", Ok(rank))
        yield Broadcast("sum", None)

    run = drive([one(0), other(1)])
    assert "scatter 'doubled'" in run.problem
    assert "broadcast 'sum'" in run.problem


@settings(max_examples=60, deadline=None)
@given(case=protocol.stopped_storages())
def test_cases_go_to_json_and_back(case):
    assert loads_case(case.dumps()) == case
    assert loads_case(json.dumps({"case": json.loads(case.dumps())})).id == case.id


WHOLE = ProtocolPart(0, 0, Box((0,), (4,)))
SAVE, LOAD = ProtocolStep("save", "a", 2, (WHOLE,)), ProtocolStep("load", "a", 1, (WHOLE,))
STOPS = {
    "before anything is there": Halt(1, "set_up_storage_writer", "dies"),
    "before the commit": Halt(0, "finish", "raises", "before"),
    "after the commit": Halt(0, "finish", "dies", "after"),
}


def small(*steps):
    return ProtocolCase("storage", 3, (ProtocolLeaf("w", (4,)),), steps)


@pytest.mark.parametrize("stop", STOPS.values(), ids=list(STOPS))
def test_what_a_stop_leaves(stop, tmp_path):
    stopped = ProtocolStep("save", "a", 2, (WHOLE,), halt=stop)
    case = small(stopped, LOAD)
    seen = run_case(case, registry.resolve("reference"), tmp_path)
    assert seen.steps[0].is_halted
    assert seen.steps[0].is_finishing == (stop.when == "after")
    assert [end.outcome for end in seen.steps[1].ends] == ["ok" if stop.when == "after" else "raised"]
    assert judge(case, [Observation(0, 1, 0, "call", "ok", value=seen)]).status == "PASS"


def test_a_case_file_is_read_and_run_on_a_rank(pool, tmp_path):
    file = tmp_path / "case.json"
    file.write_text(small(SAVE, LOAD).dumps())
    case = load_case(file)
    verdict = judge(case, pool.run(case, "reference"))
    assert verdict.status == "PASS"
    assert {"R001", "R002"} <= set(verdict.checked)


def test_the_benchmark_prints_rates_orders_and_one_case_at_scale(capsys):
    assert measure(Options(seconds=0.05, num_ranks=64, num_tensors=20)) == 0
    printed = capsys.readouterr().out
    assert "reference: " in printed
    assert "a save by 2 ranks, changed where ranks wait: 70 legal orders" in printed
    assert "64 ranks x 20 tensors, 1280 items: " in printed
    with pytest.raises(UsageError, match="--seconds"):
        measure(Options(seconds=0))


def test_whole_engines_are_left_out(tmp_path):
    seen = run_case(small(SAVE, LOAD), registry.resolve("tests.odd_backends:dense"), tmp_path)
    verdict = judge(small(SAVE, LOAD), [Observation(0, 1, 0, "call", "ok", value=seen)])
    assert verdict.status == "UNSUPPORTED"
    assert "whole engine" in verdict.reason
