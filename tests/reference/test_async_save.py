"""async_save: in one process, and on real gloo ranks of different speeds."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_group import WORLD_SIZE, Ranks, make_state, values
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType as TorchsType
from torch.distributed.tensor import Shard
from virtual_ranks import blank_like, free_port, noise, raw_bytes

import reference
from reference import CheckpointException, DefaultSavePlanner, FileSystemWriter, async_save
from reference.staging import DefaultStager, StagingOptions
from reference.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROOT = Path(reference.__file__).parent.parent
BACKGROUND = StagingOptions(False, False, True, False)
FAILURES = [OSError(28, "boom"), KeyboardInterrupt("boom"), SystemExit("boom"), CheckpointException("boom", {})]


@pytest.fixture(scope="module")
def ranks():
    started = Ranks()
    yield started
    started.close()


class HeldWriter(FileSystemWriter):
    """Writes when it is told to."""

    def __init__(self, path):
        super().__init__(path)
        self.may_write = threading.Event()
        self.began = threading.Event()

    def write_data(self, plan, planner):
        self.began.set()
        assert self.may_write.wait(30)
        return super().write_data(plan, planner)


def load_into_blank(state, path):
    loaded = {key: blank_like(value) for key, value in state.items()}
    reference.load(loaded, checkpoint_id=path)
    return loaded


def test_what_was_there_at_the_call_is_saved_whatever_training_does_next(tmp_path):
    weight, numbers = noise((100, 3), torch.float32, 1), [1, [2]]
    expected = raw_bytes(weight)
    writer = HeldWriter(tmp_path)
    state = {"w": weight, "view": weight[10:20], "numbers": numbers, "nested": {"x": 1}}
    future = async_save(state, storage_writer=writer)
    assert writer.began.wait(30)
    weight.zero_()
    numbers[1].append(3)
    state["nested"]["y"] = 2
    del state["w"]
    assert not future.done()
    writer.may_write.set()
    assert isinstance(future.result(30), reference.Metadata)
    loaded = {"w": torch.zeros(100, 3), "view": torch.zeros(10, 3), "numbers": None, "nested": {"x": 0}}
    for load in (reference.load, dcp.load):
        loaded["w"].zero_()
        load(loaded, checkpoint_id=tmp_path, no_dist=True)
        assert raw_bytes(loaded["w"]) == expected
    assert raw_bytes(loaded["view"]) == expected[10 * 12 : 20 * 12]
    assert loaded["numbers"] == [1, [2]]
    assert "nested.y" not in future.result().state_dict_metadata


def test_stateful_values_are_asked_before_the_call_returns(tmp_path):
    class Model:
        def __init__(self):
            self.weight, self.threads = torch.ones(2), []

        def state_dict(self):
            self.threads.append(threading.current_thread())
            return {"w": self.weight}

        def load_state_dict(self, state):
            self.weight = state["w"]

    model = Model()
    future = async_save({"m": model}, checkpoint_id=tmp_path)
    model.weight.zero_()
    future.result(30)
    assert model.threads == [threading.current_thread()]
    loaded = {"m": {"w": torch.zeros(2)}}
    reference.load(loaded, checkpoint_id=tmp_path)
    assert loaded["m"]["w"].tolist() == [1, 1]


def test_a_background_stager_gives_two_futures(tmp_path):
    stager = DefaultStager(BACKGROUND)
    response = async_save({"w": torch.ones(3)}, checkpoint_id=tmp_path, async_stager=stager)
    assert isinstance(response, AsyncSaveResponse)
    assert response.staging_completion.result(30) is None
    assert isinstance(response.upload_completion.result(30), reference.Metadata)
    stager.close()
    failed = async_save({"w": torch.ones(3)}, checkpoint_id=tmp_path, async_stager=stager)
    with pytest.raises(RuntimeError, match="after shutdown"):
        failed.staging_completion.result(30)
    with pytest.raises(CheckpointException, match="after shutdown"):
        failed.upload_completion.result(30)


def test_a_background_copy_that_fails_fails_both_futures(tmp_path):
    stager = DefaultStager(BACKGROUND)
    response = async_save({"x": threading.Lock()}, checkpoint_id=tmp_path, async_stager=stager)
    for future in (response.staging_completion, response.upload_completion):
        with pytest.raises(BaseException, match=r"state_dict\['x'\], a lock"):
            future.result(30)
    stager.close()
    assert not (tmp_path / ".metadata").exists()


def test_a_storage_writer_that_stages_is_the_stager(tmp_path):
    class Staging(FileSystemWriter):
        _synchronize_after_execute = should_synchronize_after_execute = True
        calls = ()

        def stage(self, state_dict):
            self.calls += ("stage",)
            return {"w": state_dict["w"] + 1}

        def synchronize_staging(self):
            self.calls += ("synchronize",)

        def close(self):
            self.calls += ("close",)

    writer = Staging(tmp_path)
    async_save({"w": torch.ones(2)}, storage_writer=writer).result(30)
    assert writer.calls == ("stage", "synchronize")
    assert load_into_blank({"w": torch.ones(2)}, tmp_path)["w"].tolist() == [2, 2]


def test_torchs_own_writer_planner_and_stager_work(tmp_path):
    state = {"w": noise((5,), torch.float32, 1), "o": {"x": 1}}
    stager = dcp.staging.DefaultStager(StagingOptions(False, False, False, False))
    async_save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "a"), planner=dcp.DefaultSavePlanner()).result(30)
    async_save(state, checkpoint_id=tmp_path / "b", async_stager=stager).result(30)
    stager.close()
    for name in "ab":
        assert raw_bytes(load_into_blank({"w": state["w"]}, tmp_path / name)["w"]) == raw_bytes(state["w"])


def test_saves_that_overlap_run_in_order(tmp_path):
    writers = [HeldWriter(tmp_path / str(n)) for n in range(3)]
    futures = [async_save({"n": n}, storage_writer=writer) for n, writer in enumerate(writers)]
    assert writers[0].began.wait(30)
    writers[2].may_write.set()
    writers[1].may_write.set()
    assert not writers[1].began.wait(0.1)
    assert not any(future.done() for future in futures)
    assert not any(future.cancel() for future in futures)
    writers[0].may_write.set()
    for future in futures:
        future.result(30)
    assert [load_into_blank({"n": 0}, tmp_path / str(n))["n"] for n in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["stateful", "stage", "planner", "storage"])
def test_whatever_fails_reaches_the_future_and_the_next_save_works(tmp_path, where, error):
    def fail(*args, **kwargs):
        raise error

    class Bad:
        state_dict = load_state_dict = fail

    planner, writer, stager = (
        DefaultSavePlanner(),
        FileSystemWriter(tmp_path),
        DefaultStager(StagingOptions(*[False] * 4)),
    )
    if where == "stage":
        stager.stage = fail
    elif where == "planner":
        planner.create_local_plan = fail
    elif where == "storage":
        writer.write_data = fail
    state = {"x": Bad() if where == "stateful" else 1}
    future = async_save(state, storage_writer=writer, planner=planner, async_stager=stager)
    with pytest.raises(CheckpointException) as caught:
        future.result(30)
    assert caught.value.failures[0][0] is error
    assert not (tmp_path / ".metadata").exists()
    async_save({"x": 1}, checkpoint_id=tmp_path).result(30)


@pytest.mark.parametrize("kind", [AsyncCheckpointerType.THREAD, TorchsType.THREAD])
def test_both_enumerations_are_understood(tmp_path, kind):
    async_save({"x": 1}, checkpoint_id=tmp_path, async_checkpointer_type=kind).result(30)


def test_an_unknown_type_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="async_checkpointer_type='green'"):
        async_save({}, checkpoint_id=tmp_path, async_checkpointer_type="green")


def test_nothing_of_the_state_is_kept_once_it_is_saved(tmp_path):
    kept = []

    class Stager(DefaultStager):
        def stage(self, state_dict):
            staged = super().stage(state_dict)
            kept.append(staged["w"].untyped_storage()._weak_ref())
            return staged

    future = async_save({"w": torch.ones(9)}, checkpoint_id=tmp_path, async_stager=Stager(StagingOptions(*[False] * 4)))
    future.result(30)
    deadline = time.monotonic() + 10
    while not torch.UntypedStorage._expired(kept[0]):
        assert time.monotonic() < deadline, "the staged copy is still in memory"
        time.sleep(0.01)


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


def test_overlapping_saves_beside_other_traffic_on_the_same_group(ranks, tmp_path):
    results = values(ranks(save_while_training, tmp_path, AsyncCheckpointerType.THREAD))
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
    assert values(ranks(groups_in_any_order, tmp_path)) == [[1, 1]] * WORLD_SIZE


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
def test_a_failure_on_one_rank_reaches_every_future(ranks, tmp_path, where, error, failing_rank):
    results = values(ranks(fail_on, tmp_path, where, error, failing_rank, AsyncCheckpointerType.THREAD))
    assert results == [([failing_rank], True)] * WORLD_SIZE
    assert not (tmp_path / ".metadata").exists()


def run_script(body, *words, world_size=1, timeout_s=60):
    """Run `body` in fresh processes, one per rank; return their exit codes and what they wrote on stderr."""
    header = """
        import os, sys, time, warnings, torch, reference
        import torch.distributed as dist
        warnings.simplefilter("ignore")
        rank, world_size, port = (int(word) for word in sys.argv[1:4])
        path = sys.argv[4]
        if world_size > 1:
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    """
    code = textwrap.dedent(header) + textwrap.dedent(body)
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, (rank, world_size, port, *words))],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(world_size)
    ]
    ended = []
    try:
        for process in started:
            error = process.communicate(timeout=timeout_s)[1]
            ended.append((process.returncode, error))
    finally:
        for process in started:
            process.kill()
            process.wait()
    return ended


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


def test_the_future_is_a_plain_future(tmp_path):
    assert type(async_save({}, checkpoint_id=tmp_path)) is Future
