"""Real ranks on gloo: started once for this module, each runs the functions below on command."""

import multiprocessing
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard as LegacyShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from virtual_ranks import blank_like, free_port, init_gloo, noise, raw_bytes

import reference
from reference import CheckpointException, DefaultSavePlanner

WORLD_SIZE = 3
TIMEOUT_S = 60


def rank_main(rank, port, pipe):
    init_gloo(rank, WORLD_SIZE, port)
    while True:
        command = pipe.recv()
        if command is None:
            break
        function, args = command
        try:
            pipe.send(("ok", function(*args)))
        except BaseException as error:
            pipe.send((type(error).__name__, str(error)))
    dist.destroy_process_group()


class Ranks:
    def __init__(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "torch.distributed.tensor"])
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(WORLD_SIZE):
            here, there = context.Pipe()
            process = context.Process(target=rank_main, args=(rank, port, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, function, *args):
        for pipe in self.pipes:
            pipe.send((function, args))
        deadline = time.monotonic() + TIMEOUT_S
        results = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(max(0, deadline - time.monotonic())), (
                f"rank {rank} was left waiting in {function.__name__}"
            )
            results.append(pipe.recv())
        return results

    def close(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
            pipe.close()


@pytest.fixture(scope="module")
def ranks():
    started = Ranks()
    yield started
    started.close()


def values(results):
    assert [kind for kind, _ in results] == ["ok"] * WORLD_SIZE, results
    return [value for _, value in results]


def make_state(placement_of, seed):
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    return {
        "w": distribute_tensor(noise((7, 4), torch.float32, seed), mesh, [placement_of]),
        "m": {"r": noise((5,), torch.bfloat16, seed), "o": {"seed": seed}},
    }


def save_then_load_resharded(path, save_with, load_with):
    savers = {"reference": reference.save, "torch": dcp.save}
    loaders = {"reference": reference.load, "torch": dcp.load}
    savers[save_with](make_state(Shard(0), 1), checkpoint_id=path)
    loaded = make_state(Shard(1), 2)
    loaders[load_with](loaded, checkpoint_id=path)
    expected = make_state(Shard(1), 1)
    return (
        raw_bytes(loaded["w"]) == raw_bytes(expected["w"])
        and raw_bytes(loaded["m"]["r"]) == raw_bytes(expected["m"]["r"])
        and loaded["m"]["o"] == {"seed": 1}
    )


@pytest.mark.parametrize("save_with", ["reference", "torch"])
@pytest.mark.parametrize("load_with", ["reference", "torch"])
def test_resharding_between_real_ranks(ranks, tmp_path, save_with, load_with):
    assert values(ranks(save_then_load_resharded, tmp_path, save_with, load_with)) == [True] * WORLD_SIZE


def fail_on(path, failing_rank, where):
    class Planner(DefaultSavePlanner):
        def create_local_plan(self):
            plan = super().create_local_plan()
            if where == "plan" and dist.get_rank() == failing_rank:
                raise KeyboardInterrupt("boom")
            if where == "unpicklable" and dist.get_rank() == failing_rank:
                return reference.SavePlan(plan.items, planner_data={"f": lambda: None})
            return plan

        def resolve_data(self, write_item):
            if where == "write" and dist.get_rank() == failing_rank:
                raise OSError(28, "boom")
            return super().resolve_data(write_item)

    state = make_state(Shard(0), 1)
    try:
        reference.save(state, checkpoint_id=path, planner=Planner())
    except CheckpointException as error:
        return list(error.failures), "boom" in str(error) or "pickled" in str(error)
    return None


@pytest.mark.parametrize("where", ["plan", "write", "unpicklable"])
@pytest.mark.parametrize("failing_rank", range(2))
def test_a_failure_reaches_every_rank_and_nobody_waits(ranks, tmp_path, where, failing_rank):
    assert values(ranks(fail_on, tmp_path, failing_rank, where)) == [([failing_rank], True)] * WORLD_SIZE
    assert not (tmp_path / ".metadata").exists()


def save_in_subgroup(path):
    group = dist.new_group([2, 1])
    if dist.get_rank() == 0:
        try:
            reference.save({}, checkpoint_id=path, process_group=group)
        except ValueError as error:
            return "belongs to" in str(error)
        return False
    mesh = DeviceMesh.from_group(group, "cpu")
    state = {"w": distribute_tensor(noise((5,), torch.int32, 3), mesh, [Shard(0)])}
    reference.save(state, checkpoint_id=path, process_group=group)
    loaded = {"w": blank_like(state["w"])}
    reference.load(loaded, checkpoint_id=path, process_group=group)
    return raw_bytes(loaded["w"]) == raw_bytes(state["w"])


def test_a_group_of_some_ranks(ranks, tmp_path):
    assert values(ranks(save_in_subgroup, tmp_path)) == [True] * WORLD_SIZE


def save_and_load_alone(path):
    rank = dist.get_rank()
    state = {"x": torch.full((3,), float(rank))}
    reference.save(state, checkpoint_id=path / str(rank), no_dist=True)
    reference.save(state, checkpoint_id=path / "together", use_collectives=False)
    both = []
    for name in (str(rank), "together"):
        loaded = {"x": torch.zeros(3)}
        reference.load(loaded, checkpoint_id=path / name, no_dist=name != "together")
        both.append(loaded["x"].tolist())
    return both


def test_ranks_that_save_alone(ranks, tmp_path):
    assert values(ranks(save_and_load_alone, tmp_path)) == [[[float(rank)] * 3] * 2 for rank in range(WORLD_SIZE)]


def replicated_once(path):
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    state = {f"w{i}": distribute_tensor(noise((10,), torch.int64, i), mesh, [Replicate()]) for i in range(6)}
    metadata = reference.save(state, checkpoint_id=path)
    return sorted(info.relative_path for info in metadata.storage_data.values())


def test_replicas_are_spread_over_ranks(ranks, tmp_path):
    expected = [f"__{rank}_0.distcp" for rank in range(WORLD_SIZE) for _ in range(2)]
    assert values(ranks(replicated_once, tmp_path)) == [expected] * WORLD_SIZE


def sharded_tensor_round_trip(path):
    rank = dist.get_rank()

    def make(seed):
        rows = noise((2, 3), torch.float32, seed + rank)
        shards = [LegacyShard.from_tensor_and_offsets(rows, [2 * rank, 0], rank)]
        return init_from_local_shards(shards, 2 * WORLD_SIZE, 3)

    reference.save({"w": make(1)}, checkpoint_id=path / "ours")
    dcp.save({"w": make(1)}, checkpoint_id=path / "theirs")
    kept = []
    for name in ("ours", "theirs"):
        loaded = {"w": make(100)}
        reference.load(loaded, checkpoint_id=path / name)
        whole = {"w": torch.zeros(2 * WORLD_SIZE, 3)}
        reference.load(whole, checkpoint_id=path / name)
        expected = torch.cat([noise((2, 3), torch.float32, 1 + r) for r in range(WORLD_SIZE)])
        mine = loaded["w"].local_shards()[0].tensor
        kept.append(raw_bytes(whole["w"]) == raw_bytes(expected))
        kept.append(raw_bytes(mine) == raw_bytes(expected[2 * rank : 2 * rank + 2]))
    return all(kept)


def test_legacy_sharded_tensors(ranks, tmp_path):
    assert values(ranks(sharded_tensor_round_trip, tmp_path)) == [True] * WORLD_SIZE
