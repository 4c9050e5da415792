"""async_save in another process: what it shares, what goes wrong there, and that it is gone afterwards."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_pool import Ranks, make_state
from scripts import run_script
from torch.distributed.checkpoint.staging import BlockingAsyncStager as TorchsBlockingStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType as TorchsType
from torch.distributed.tensor import Shard
from virtual_ranks import load_into_blank, noise, raw_bytes

import reference
from reference import CheckpointException, DefaultSavePlanner, FileSystemWriter, async_save
from reference.shared_arena import Arena
from reference.shared_pickle import share, take_over
from reference.staged_copy import staged_copy
from reference.staging import BlockingAsyncStager, DefaultStager, StagingOptions
from reference.state_dict_saver import AsyncCheckpointerType

WORLD_SIZE = 3
PROCESS = AsyncCheckpointerType.PROCESS
pytestmark = pytest.mark.filterwarnings("ignore:Pinned memory needs CUDA")


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(WORLD_SIZE)
    yield started
    started.close()


class Telling(FileSystemWriter):
    """Leaves word of the process that writes."""

    def write_data(self, plan, planner):
        group = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else None
        (Path(self.path) / f"by-{os.getpid()}").write_text(repr(group))
        return super().write_data(plan, planner)


class Dying(FileSystemWriter):
    def __init__(self, path, how):
        super().__init__(path)
        self.how = how

    def write_data(self, plan, planner):
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(7)


class Unpicklable(DefaultSavePlanner):
    def __init__(self):
        super().__init__()
        self.handle = lambda: None


class Opaque:
    def __reduce__(self):
        raise TypeError("boom: not to be pickled")


def num_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def told(path):
    return {int(p.name[3:]): p.read_text() for p in path.iterdir() if p.name.startswith("by-")}


@pytest.mark.parametrize("kind", [PROCESS, TorchsType.PROCESS])
def test_without_any_group_one_process_does_all_saves(tmp_path, kind):
    state = {"w": noise((100, 3), torch.float32, 1), "o": [1, (2,)]}
    expected = raw_bytes(state["w"])
    for n in range(2):
        writer = Telling(tmp_path / str(n))
        future = async_save(state, storage_writer=writer, async_checkpointer_type=kind)
        state["w"].add_(1)
        assert isinstance(future.result(60), reference.Metadata)
    (first,), (second,) = (told(tmp_path / str(n)) for n in range(2))
    assert first == second != os.getpid()
    assert told(tmp_path / "0")[first] == "None"
    loaded = load_into_blank({"w": state["w"], "o": None}, tmp_path / "0")
    assert raw_bytes(loaded["w"]) == expected
    assert loaded["o"] == [1, (2,)]


STAGERS = {
    "default": lambda: None,
    "shared": lambda: DefaultStager(StagingOptions(False, True, False, False)),
    "shared, in the background": lambda: DefaultStager(StagingOptions(False, True, True, False)),
    "ordinary memory": lambda: DefaultStager(StagingOptions(False, False, False, False)),
    "pinned": lambda: DefaultStager(StagingOptions(True, False, False, False)),
    "blocking": BlockingAsyncStager,
    "torch's": TorchsBlockingStager,
}


@pytest.mark.parametrize("stager", STAGERS)
def test_every_kind_of_staged_copy_gets_there(tmp_path, stager):
    base = noise((40, 6), torch.float32, 1)
    state = {"w": base, "view": base[3:7], "t": base.t(), "tied": {"w": base}, "e": torch.empty(0, 3), "s": base[0, 0]}
    expected = {
        "w": raw_bytes(base),
        "view": raw_bytes(base[3:7]),
        "t": raw_bytes(base.t()),
        "s": raw_bytes(base[0, 0]),
    }
    made = STAGERS[stager]()
    response = async_save(state, checkpoint_id=tmp_path, async_stager=made, async_checkpointer_type=PROCESS)
    getattr(response, "upload_completion", response).result(60)
    if made is not None:
        made.close()
    loaded = load_into_blank(state, tmp_path)
    assert {key: raw_bytes(loaded[key]) for key in expected} == expected
    assert raw_bytes(loaded["tied"]["w"]) == expected["w"]


def test_thousands_of_tensors_need_one_file_and_none_stays_open(tmp_path):
    before = num_files()
    async_save({"x": 0}, checkpoint_id=tmp_path, async_checkpointer_type=PROCESS).result(60)
    connected = num_files()
    state = {str(n): torch.full((5,), n) for n in range(2000)}
    state["objects"] = (torch.ones(2), torch.ones(3))
    future = async_save(state, checkpoint_id=tmp_path, async_checkpointer_type=PROCESS)
    assert num_files() < connected + 20
    future.result(60)
    del future
    deadline = time.monotonic() + 10
    while num_files() > connected:
        assert time.monotonic() < deadline, (before, connected, num_files())
        time.sleep(0.05)
    assert load_into_blank({"1999": state["1999"]}, tmp_path)["1999"].tolist() == [1999] * 5
    # An object that holds tensors takes what these take, not the memory that all of them lie in.
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2001 * 4096


def test_sharing_copies_nothing_that_is_shared_already():
    arena = Arena()
    state = staged_copy({"a": noise((1000,), torch.float64, 1), "b": [torch.ones(3)]}, allocate=arena.allocate)
    used = arena._used
    apart = torch.UntypedStorage._new_shared(24)
    state["c"] = torch.empty(0, dtype=torch.int64).set_(apart, 0, (3,)).copy_(torch.arange(3))
    shared = share(state, arena)
    assert arena._used == used
    back = take_over(shared.raw, shared.memories)
    assert raw_bytes(back["a"]) == raw_bytes(state["a"])
    back["a"][0], back["c"][0] = 7, 8
    assert (state["a"][0], state["c"][0]) == (7, 8)
    num_bytes = back["b"][0].untyped_storage().nbytes()
    assert num_bytes == 12


def test_an_arena_grows_and_lets_go_of_its_file():
    arena = Arena()
    fd = arena.fd
    tensors = [arena.allocate(torch.empty(40 << 20, dtype=torch.uint8, device="meta")) for _ in range(4)]
    for n, tensor in enumerate(tensors):
        tensor[:: 4 << 20] = n
    assert [int(tensor[4 << 20]) for tensor in tensors] == [0, 1, 2, 3]
    assert len({arena.find(tensor.untyped_storage()) for tensor in tensors}) == 4
    assert arena.find(torch.ones(3).untyped_storage()) is None
    del arena
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert int(tensors[3][8 << 20]) == 3


def save_together(path):
    state = make_state(Shard(0), 1)
    futures = []
    for n in range(2):
        writer = Telling(path / str(n))
        futures.append(async_save(state, storage_writer=writer, async_checkpointer_type=PROCESS))
    for future in futures:
        future.result(60)
    loaded = make_state(Shard(1), 2)
    reference.load(loaded, checkpoint_id=path / "1")
    expected = make_state(Shard(1), 1)
    return raw_bytes(loaded["w"]) == raw_bytes(expected["w"]) and loaded["m"]["o"] == {"seed": 1}


def test_the_processes_of_all_ranks_have_a_group_of_their_own(ranks, tmp_path):
    assert ranks.values(save_together, tmp_path) == [True] * WORLD_SIZE
    assert sorted(told(tmp_path / "0").values()) == [repr((rank, WORLD_SIZE)) for rank in range(WORLD_SIZE)]
    assert told(tmp_path / "0") == told(tmp_path / "1")


def go_wrong(path, what, failing_rank):
    state, planner, writer = make_state(Shard(0), 1), None, Telling(path / "bad")
    if dist.get_rank() == failing_rank:
        if what == "planner":
            planner = Unpicklable()
        elif what == "state":
            state["x"] = {"deep": Opaque}
            state["x"]["deep"] = Opaque()
        else:
            writer = Dying(path / "bad", what)
    stager = DefaultStager(StagingOptions(False, False, False, False))
    stager.stage = lambda state: state  # The copy would refuse what cannot be pickled.
    future = async_save(
        state, storage_writer=writer, planner=planner, async_stager=stager, async_checkpointer_type=PROCESS
    )
    try:
        future.result(60)
    except CheckpointException as error:
        found = list(error.failures), str(error)
        good = async_save(state | {"x": 1}, storage_writer=Telling(path / "good"), async_checkpointer_type=PROCESS)
        return *found, len(good.result(60).state_dict_metadata)
    return None


@pytest.mark.parametrize(
    ("what", "failing_rank", "words"),
    [
        ("planner", 0, "lambda"),
        ("planner", 1, "lambda"),
        ("state", 2, "boom: not to be pickled"),
        ("killed", 2, "ended with exit code -9"),
        ("ended", 0, "ended with exit code 7"),
    ],
)
def test_what_goes_wrong_there_reaches_every_future_and_the_next_save_works(ranks, tmp_path, what, words, failing_rank):
    for failures, text, num_entries in ranks.values(go_wrong, tmp_path, what, failing_rank):
        assert failures == [failing_rank]
        assert words in text
        assert num_entries == 4
    assert not (tmp_path / "bad" / ".metadata").exists()
    assert len(told(tmp_path / "good")) == WORLD_SIZE


def save_apart(path):
    rank = dist.get_rank()
    state = {"x": torch.full((3,), float(rank))}
    options = {"async_checkpointer_type": PROCESS}
    async_save(state, checkpoint_id=path / str(rank), no_dist=True, **options).result(60)
    async_save(state, checkpoint_id=path / "together", use_collectives=False, **options).result(60)
    found = []
    for name in (str(rank), "together"):
        loaded = {"x": torch.zeros(3)}
        reference.load(loaded, checkpoint_id=path / name, no_dist=name != "together")
        found.append(loaded["x"].tolist())
    return found


def test_ranks_that_save_alone(ranks, tmp_path):
    assert ranks.values(save_apart, tmp_path) == [[[float(rank)] * 3] * 2 for rank in range(WORLD_SIZE)]


ENDS = """
    from reference.state_dict_saver import AsyncCheckpointerType
    import multiprocessing, signal
    class Slow(reference.FileSystemWriter):
        def write_data(self, plan, planner):
            open(path + "/pid", "w").write(str(os.getpid()))
            time.sleep(float(sys.argv[6]))
            return super().write_data(plan, planner)
    def main():
        state = {"w": torch.ones(1000), "r": rank}
        writer = Slow(path)
        kind = AsyncCheckpointerType.PROCESS
        os.makedirs(path, exist_ok=True)
        reference.async_save({"x": 1}, checkpoint_id=path + "/first", async_checkpointer_type=kind).result()
        future = reference.async_save(state, storage_writer=writer, async_checkpointer_type=kind)
        if sys.argv[5] == "killed":
            while not os.path.exists(path + "/pid"):
                time.sleep(0.05)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
    if __name__ == "__main__":
        main()
"""


@pytest.mark.parametrize(("ends", "seconds", "status"), [("plainly", 1, 0), ("killed", 600, -signal.SIGKILL)])
def test_nothing_is_left_of_it_when_training_ends(tmp_path, ends, seconds, status):
    [(found, error)] = run_script(ENDS, tmp_path / "c", ends, seconds, folder=tmp_path)
    assert (found, error) == (status, "")
    pid = int((tmp_path / "c" / "pid").read_text())
    deadline = time.monotonic() + 15
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.1)
    assert (tmp_path / "c" / ".metadata").exists() == (ends == "plainly")
