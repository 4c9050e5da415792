"""Whatever goes wrong on one rank reaches every rank, and no rank is left waiting (`drive` asserts that)."""

import traceback

import pytest
import torch
from torch.distributed.tensor import Shard
from virtual_ranks import blank_like, drive, load_all, save_all, shard

import reference
from reference import CheckpointException, DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from reference.collectives import Abort, Failure, Ok, attempt, pack, unpack
from reference.open_storage import open_reader, open_writer

WORLD_SIZE = 3
SAVE_CALLS = [
    ("planner", "set_up_planner", "plan"),
    ("planner", "create_local_plan", "plan"),
    ("planner", "create_global_plan", "plan"),
    ("planner", "finish_plan", "write"),
    ("planner", "resolve_data", "write"),
    ("storage", "storage_meta", "plan"),
    ("storage", "set_up_storage_writer", "plan"),
    ("storage", "prepare_local_plan", "plan"),
    ("storage", "prepare_global_plan", "plan"),
    ("storage", "write_data", "write"),
    ("storage", "finish", "write"),
]
LOAD_CALLS = [
    ("planner", "set_up_planner", "plan"),
    ("planner", "create_local_plan", "plan"),
    ("planner", "create_global_plan", "plan"),
    ("planner", "finish_plan", "read"),
    ("planner", "resolve_tensor", "read"),
    ("planner", "commit_tensor", "read"),
    ("planner", "load_bytes", "read"),
    ("storage", "read_metadata", "plan"),
    ("storage", "set_up_storage_reader", "plan"),
    ("storage", "prepare_local_plan", "plan"),
    ("storage", "prepare_global_plan", "plan"),
    ("storage", "read_data", "read"),
]
COORDINATOR_ONLY = {"create_global_plan", "prepare_global_plan", "finish"}


class Unpicklable(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.handle = lambda: None


class BrokenOnArrival(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


ERRORS = [
    OSError(28, "boom on disk"),
    KeyboardInterrupt("boom"),
    SystemExit("boom"),
    Unpicklable("boom"),
    BrokenOnArrival("boom", "twice"),
    CheckpointException("boom", {}),
    GeneratorExit("boom"),
]


def states():
    whole = torch.arange(12.0).reshape(6, 2)
    return [{"w": shard(whole, rank, range(WORLD_SIZE), [Shard(0)]), "o": rank} for rank in range(WORLD_SIZE)]


def failing(cls, method, error):
    def fail(self, *args, **kwargs):
        raise error

    # The signature stays, since the engine looks at it.
    fail.__signature__ = pytest.importorskip("inspect").signature(getattr(cls, method))
    return type(f"Failing{cls.__name__}", (cls,), {method: fail})


def assert_all_know(outcomes, rank, step, text):
    for outcome in outcomes:
        assert isinstance(outcome, CheckpointException), outcome
        assert list(outcome.failures) == [rank]
        message = str(outcome)
        assert text in message
        assert f"(RANK {rank})" in message
        assert f"step '{step}' on rank {rank}" in message


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("part", "method", "step"), SAVE_CALLS, ids=str)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failing_call_in_save_reaches_every_rank(tmp_path, part, method, step, rank, error):
    if rank != 0 and method in COORDINATOR_ONLY:
        return
    planner = failing(DefaultSavePlanner, method, error) if part == "planner" else DefaultSavePlanner
    writer = failing(FileSystemWriter, method, error) if part == "storage" else FileSystemWriter
    outcomes = save_all(
        states(),
        tmp_path,
        planners=lambda r: (planner if r == rank else DefaultSavePlanner)(dedup_save_to_lowest_rank=True),
        writers=lambda r: (writer if r == rank else FileSystemWriter)(tmp_path, sync_files=False),
    )
    assert_all_know(outcomes, rank, step, "boom" if type(error) is not CheckpointException else "CheckpointException")
    assert not (tmp_path / ".metadata").exists()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("part", "method", "step"), LOAD_CALLS, ids=str)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failing_call_in_load_reaches_every_rank(tmp_path, part, method, step, rank, error):
    if rank != 0 and method in COORDINATOR_ONLY:
        return
    assert not any(isinstance(outcome, BaseException) for outcome in save_all(states(), tmp_path))
    planner = failing(DefaultLoadPlanner, method, error) if part == "planner" else DefaultLoadPlanner
    reader = failing(FileSystemReader, method, error) if part == "storage" else FileSystemReader
    outcomes = load_all(
        [blank_like(state) for state in states()],
        tmp_path,
        planners=lambda r: (planner if r == rank else DefaultLoadPlanner)(),
        readers=lambda r: (reader if r == rank else FileSystemReader)(tmp_path),
    )
    assert_all_know(outcomes, rank, step, "boom" if type(error) is not CheckpointException else "CheckpointException")


@pytest.mark.parametrize("rank", [0, 2])
def test_a_plan_that_cannot_be_pickled_fails_everywhere(tmp_path, rank):
    class Planner(DefaultSavePlanner):
        def create_local_plan(self):
            plan = super().create_local_plan()
            return reference.SavePlan(plan.items, planner_data={"f": lambda: None})

    planners = lambda r: Planner() if r == rank else DefaultSavePlanner()  # noqa: E731
    assert_all_know(save_all(states(), tmp_path, planners=planners), rank, "plan", "can be pickled")


def test_a_final_plan_that_cannot_be_pickled_fails_everywhere(tmp_path):
    class Planner(DefaultSavePlanner):
        def create_global_plan(self, all_plans):
            plans, metadata = super().create_global_plan(all_plans)
            plans[2] = reference.SavePlan(plans[2].items, planner_data=lambda: None)
            return plans, metadata

    outcomes = save_all(states(), tmp_path, planners=lambda _: Planner())
    assert_all_know(outcomes, 0, "plan", "can be pickled")
    assert not (tmp_path / ".metadata").exists()


def test_too_few_plans_fail_everywhere(tmp_path):
    class Planner(DefaultSavePlanner):
        def create_global_plan(self, all_plans):
            plans, metadata = super().create_global_plan(all_plans)
            return plans[:1], metadata

    outcomes = save_all(states(), tmp_path, planners=lambda _: Planner())
    assert_all_know(outcomes, 0, "plan", "Expected one plan per rank but got 1")


def test_several_failing_ranks_are_all_named(tmp_path):
    class Planner(DefaultSavePlanner):
        def create_local_plan(self):
            raise ValueError("boom")

    outcomes = save_all(states(), tmp_path, planners=lambda r: Planner() if r else DefaultSavePlanner())
    assert all(list(outcome.failures) == [1, 2] for outcome in outcomes)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("method", ["finish_plan", "create_local_plan"])
def test_ranks_that_save_alone_hear_of_each_others_failures(tmp_path, rank, method):
    planner = failing(DefaultSavePlanner, method, ValueError("boom"))
    outcomes = save_all(
        states(), tmp_path, planners=lambda r: planner() if r == rank else DefaultSavePlanner(), use_collectives=False
    )
    assert all(isinstance(o, CheckpointException) and list(o.failures) == [rank] for o in outcomes)


def test_a_stateful_that_fails_on_saving_reaches_every_rank(tmp_path):
    class Bad:
        def state_dict(self):
            raise Unpicklable("boom")

        def load_state_dict(self, state):
            pass

    made = states()
    made[2]["s"] = Bad()
    assert_all_know(save_all(made, tmp_path), 2, "plan", "boom")
    assert not (tmp_path / ".metadata").exists()


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
def test_a_failing_stateful_reaches_every_rank(tmp_path, method):
    class Good:
        def state_dict(self):
            return {"x": 1}

        def load_state_dict(self, state):
            pass

    bad = failing(Good, method, ValueError("boom"))
    save_all([{"s": Good()} for _ in range(WORLD_SIZE)], tmp_path)
    outcomes = load_all([{"s": bad() if rank == 1 else Good()} for rank in range(WORLD_SIZE)], tmp_path)
    assert_all_know(outcomes, 1, "plan" if method == "state_dict" else "apply", "boom")


def test_no_place_to_save_to_is_a_plain_error_where_nobody_waits():
    for error in (ValueError, RuntimeError):  # the second is torch's
        with pytest.raises(error, match="Expected a local path but got checkpoint_id=None"):
            reference.save({})
        with pytest.raises(error, match="pass storage_reader"):
            reference.load({}, checkpoint_id="s3://bucket/x")


def test_no_place_to_save_to_on_one_rank_fails_everywhere(tmp_path):
    writers = lambda rank: open_writer(None, None if rank == 1 else tmp_path)  # noqa: E731
    assert_all_know(save_all(states(), tmp_path, writers=writers), 1, "plan", "checkpoint_id=None")
    readers = lambda rank: open_reader(None, None if rank == 1 else tmp_path)  # noqa: E731
    save_all(states(), tmp_path)
    assert_all_know(load_all(states(), tmp_path, readers=readers), 1, "plan", "checkpoint_id=None")


def test_in_one_process_the_original_error_is_the_cause(tmp_path):
    error = ValueError("boom")
    planner = failing(DefaultSavePlanner, "create_local_plan", error)()
    with pytest.raises(CheckpointException) as caught:
        reference.save({}, checkpoint_id=tmp_path, planner=planner)
    assert caught.value.__cause__ is error
    assert caught.value.failures[0][0] is error
    assert "in fail" in "".join(traceback.format_list(caught.value.failures[0][1]))


def test_messages_survive_the_wire():
    message, raw = Ok({"a": 1}), pack(Ok({"a": 1}), 0, "plan")[0]
    assert unpack(raw, 0, "plan") == message
    failure = attempt(3, "write", lambda: 1 / 0)
    back = unpack(pack(failure, 3, "write")[0], 0, "write")
    assert isinstance(back, Failure)
    assert (back.rank, back.step, type(back.error)) == (3, "write", ZeroDivisionError)
    abort = unpack(pack(Abort("write", (failure,)), 0, "write")[0], 0, "write")
    assert isinstance(abort, Abort)
    assert "ZeroDivisionError" in str(abort.exception())
    assert isinstance(unpack(b"junk", 2, "plan"), Failure)


def test_a_message_that_breaks_on_arrival_is_a_failure_of_the_receiver(tmp_path):
    class Planner(DefaultSavePlanner):
        def create_global_plan(self, all_plans):
            plans, metadata = super().create_global_plan(all_plans)
            plans[1] = reference.SavePlan(plans[1].items, planner_data=Bomb())
            return plans, metadata

    outcomes = save_all(states(), tmp_path, planners=lambda _: Planner())
    assert all(isinstance(o, CheckpointException) and list(o.failures) == [1] for o in outcomes)
    assert not (tmp_path / ".metadata").exists()


class Bomb:
    def __reduce__(self):
        return explode, ()


def explode():
    raise RuntimeError("boom on arrival")


def test_the_driver_of_these_tests_notices_a_rank_that_waits_alone():
    def lonely():
        yield reference.collectives.Gather("plan", Ok())

    with pytest.raises(AssertionError, match="wait alone"):
        drive([lonely(), iter_nothing()])


def iter_nothing():
    return
    yield
