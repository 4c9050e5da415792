"""async_save on real gloo ranks of different speeds, and in processes that end."""

import signal
import time

import pytest
import torch
import torch.distributed as dist
from rank_pool import Ranks, make_state
from scripts import run_script
from torch.distributed.tensor import Shard
from virtual_ranks import load_into_blank, raw_bytes

import reference
from reference import CheckpointException, DefaultSavePlanner, FileSystemWriter, async_save
from reference.staging import DefaultStager, StagingOptions
from reference.state_dict_saver import AsyncCheckpointerType

WORLD_SIZE = 3
KINDS = [AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS]


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(WORLD_SIZE)
    yield started
    started.close()


def save_while_training(path, kind):
    """Ranks of different speeds save twice while they also communicate on the same group, in another thread."""
    rank = dist.get_rank()
    time.sleep(0.1 * rank)
    state = make_state(Shard(0), 1)
    expected = raw_bytes(state["w"])
    futures = []
    for n in range(3):
        futures.append(async_save(state, checkpoint_id=path / str(n), async_checkpointer_type=kind))
        time.sleep(0.03 * ((rank + n) % WORLD_SIZE))
        with torch.no_grad():
            state["w"].to_local().add_(1)
        for _ in range(50):
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total.item() == WORLD_SIZE
    reference.save({"x": 1}, checkpoint_id=path / "meanwhile")
    for future in futures:
        future.result(30)
    kept = []
    for n in range(3):
        loaded = make_state(Shard(0), 2)
        reference.load(loaded, checkpoint_id=path / str(n))
        with torch.no_grad():
            local = torch.frombuffer(bytearray(expected), dtype=torch.float32)
            for _ in range(n):
                local = local + 1
        kept.append(raw_bytes(loaded["w"]) == raw_bytes(local))
    return kept


@pytest.mark.parametrize("kind", KINDS)
def test_overlapping_saves_beside_other_traffic_on_the_same_group(ranks, tmp_path, kind):
    results = ranks.values(save_while_training, tmp_path, kind)
    assert results == [[True] * 3] * WORLD_SIZE


def groups_in_any_order(path):
    rank = dist.get_rank()
    groups = [dist.new_group(list(range(WORLD_SIZE))) for _ in range(2)]
    for group in groups:  # the first save of each makes its private group, which all must do in the same order
        async_save({"x": 0}, checkpoint_id=path / "first", process_group=group).result(30)
    order = [0, 1] if rank else [1, 0]
    futures = [async_save({"x": n}, checkpoint_id=path / str(n), process_group=groups[n]) for n in order]
    return [len(future.result(30).state_dict_metadata) for future in futures]


def test_groups_do_not_wait_for_each_other(ranks, tmp_path):
    assert ranks.values(groups_in_any_order, tmp_path) == [[1, 1]] * WORLD_SIZE


def fail_on(path, where, error, failing_rank, kind):
    def fail(*args, **kwargs):
        raise error

    planner, stager = DefaultSavePlanner(), DefaultStager(StagingOptions(False, True, False, False))
    writer = FileSystemWriter(path)
    if dist.get_rank() == failing_rank:
        if where == "stage":
            stager.stage = fail
        elif where == "planner":
            planner = FailingPlanner(error)
        else:
            writer = FailingWriter(path, error)
    state = make_state(Shard(0), 1)
    future = async_save(
        state, storage_writer=writer, planner=planner, async_stager=stager, async_checkpointer_type=kind
    )
    after = async_save(state, checkpoint_id=path / "after", async_checkpointer_type=kind)
    try:
        future.result(30)
    except CheckpointException as raised:
        after.result(30)
        return list(raised.failures), "boom" in str(raised)
    return None


class FailingPlanner(DefaultSavePlanner):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def create_local_plan(self):
        raise self.error


class FailingWriter(FileSystemWriter):
    def __init__(self, path, error):
        super().__init__(path)
        self.error = error

    def write_data(self, plan, planner):
        raise self.error


@pytest.mark.parametrize("error", [OSError(28, "boom"), KeyboardInterrupt("boom")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["stage", "planner", "storage"])
@pytest.mark.parametrize("failing_rank", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_on_one_rank_reaches_every_future(ranks, tmp_path, where, error, failing_rank, kind):
    results = ranks.values(fail_on, tmp_path, where, error, failing_rank, kind)
    assert results == [([failing_rank], True)] * WORLD_SIZE
    assert not (tmp_path / ".metadata").exists()


def test_a_process_that_ends_finishes_its_save(tmp_path):
    body = """
        from reference import FileSystemWriter, async_save
        class Slow(FileSystemWriter):
            def write_data(self, plan, planner):
                time.sleep(1)
                return super().write_data(plan, planner)
        for n in range(2):
            async_save({"w": torch.ones(2_000_000), "n": n}, storage_writer=Slow(f"{path}/{n}"))
    """
    assert run_script(body, tmp_path) == [(0, "")]
    for n in range(2):
        assert load_into_blank({"n": 0}, tmp_path / str(n))["n"] == n


def test_a_process_that_ends_does_not_wait_for_a_save_that_hangs(tmp_path):
    body = """
        import reference.lanes
        reference.lanes.EXIT_GRACE_S = 1.0
        class Stuck(reference.FileSystemWriter):
            def write_data(self, plan, planner):
                time.sleep(1000)
        reference.async_save({"x": 1}, storage_writer=Stuck(path))
    """
    [(status, error)] = run_script(body, tmp_path)
    assert status == 0
    assert "is abandoned, uncommitted" in error
    assert not (tmp_path / ".metadata").exists()


@pytest.mark.parametrize("ends", ["plainly", "destroying the group"])
def test_ranks_that_end_while_another_never_saves(tmp_path, ends):
    body = """
        import reference.lanes
        reference.lanes.EXIT_GRACE_S = 2.0
        reference.async_save({"x": 1}, checkpoint_id=path + "/a").result()
        if rank != 1:
            future = reference.async_save({"x": 2}, checkpoint_id=path + "/b")
            time.sleep(0.5)
            if sys.argv[5] == "destroying the group":
                dist.destroy_process_group()
        else:
            time.sleep(4)
    """
    ended = run_script(body, tmp_path, ends, world_size=2, timeout_s=40)
    assert (tmp_path / "a" / ".metadata").exists()
    assert not (tmp_path / "b" / ".metadata").exists()
    # What counts is that they end: a thread abandoned inside a gloo collective may abort the process as it goes.
    assert {status for status, _ in ended} <= {0, -signal.SIGABRT}, ended


def test_ranks_may_end_right_after_the_call(tmp_path):
    body = """
        reference.async_save({"x": rank, "w": torch.ones(1000)}, checkpoint_id=path)
    """
    ended = run_script(body, tmp_path, world_size=2)
    # gloo may abort a process that ends just after a collective without destroying its group, with or without us.
    assert {status for status, _ in ended} <= {0, -signal.SIGABRT}, ended
    assert (tmp_path / ".metadata").exists()
