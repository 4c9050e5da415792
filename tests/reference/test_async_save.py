"""async_save: in one process, and on real gloo ranks of different speeds."""

import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType as TorchsType
from virtual_ranks import load_into_blank, noise, raw_bytes

import reference
from reference import CheckpointException, DefaultSavePlanner, FileSystemWriter, async_save
from reference.staging import DefaultStager, StagingOptions
from reference.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROOT = Path(reference.__file__).parent.parent
BACKGROUND = StagingOptions(False, False, True, False)
FAILURES = [OSError(28, "boom"), KeyboardInterrupt("boom"), SystemExit("boom"), CheckpointException("boom", {})]


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


def test_the_future_is_a_plain_future(tmp_path):
    assert type(async_save({}, checkpoint_id=tmp_path)) is Future
