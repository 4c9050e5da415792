"""Real ranks on gloo: started once for this module, each runs the functions below on command."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_pool import Ranks, make_state
from torch.distributed._shard.sharded_tensor import Shard as LegacyShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from virtual_ranks import blank_like, noise, raw_bytes

import reference
from reference import (
    CheckpointException,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)

WORLD_SIZE = 3


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(WORLD_SIZE)
    yield started
    started.close()


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
    assert ranks.values(save_then_load_resharded, tmp_path, save_with, load_with) == [True] * WORLD_SIZE


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
    assert ranks.values(fail_on, tmp_path, failing_rank, where) == [([failing_rank], True)] * WORLD_SIZE
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
    assert ranks.values(save_in_subgroup, tmp_path) == [True] * WORLD_SIZE


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
    assert ranks.values(save_and_load_alone, tmp_path) == [[[float(rank)] * 3] * 2 for rank in range(WORLD_SIZE)]


def replicated_once(path):
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    state = {f"w{i}": distribute_tensor(noise((10,), torch.int64, i), mesh, [Replicate()]) for i in range(6)}
    metadata = reference.save(state, checkpoint_id=path)
    return sorted(info.relative_path for info in metadata.storage_data.values())


def test_replicas_are_spread_over_ranks(ranks, tmp_path):
    expected = [f"__{rank}_0.distcp" for rank in range(WORLD_SIZE) for _ in range(2)]
    assert ranks.values(replicated_once, tmp_path) == [expected] * WORLD_SIZE


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
    assert ranks.values(sharded_tensor_round_trip, tmp_path) == [True] * WORLD_SIZE


PIECES = [((0, 0), (2, 4), 0), ((2, 0), (8, 1), 0), ((2, 1), (8, 3), 2)]
"""Uneven, two on rank 0 and none on rank 1."""


def uneven_sharded_tensor(path):
    rank = dist.get_rank()
    whole = noise((10, 4), torch.float32, 7)

    def make(source):
        shards = [
            LegacyShard.from_tensor_and_offsets(source[r : r + m, c : c + n].contiguous(), [r, c], rank)
            for (r, c), (m, n), holder in PIECES
            if holder == rank
        ]
        return init_from_local_shards(shards, 10, 4)

    kept = []
    for name, save in (("ours", reference.save), ("theirs", dcp.save)):
        save({"w": make(whole), "n": {"x": make(whole)}}, checkpoint_id=path / name)
        for load in (reference.load, dcp.load):
            mine = {"w": make(torch.zeros(10, 4)), "n": {"x": make(torch.zeros(10, 4))}}
            load(mine, checkpoint_id=path / name)
            for value in (mine["w"], mine["n"]["x"]):
                for one, other in zip(value.local_shards(), make(whole).local_shards(), strict=True):
                    kept.append(raw_bytes(one.tensor) == raw_bytes(other.tensor))
            mesh = init_device_mesh("cpu", (WORLD_SIZE,))
            spread = {"w": distribute_tensor(torch.zeros(10, 4), mesh, [Shard(1)])}
            load(spread, checkpoint_id=path / name)
            kept.append(raw_bytes(spread["w"]) == raw_bytes(distribute_tensor(whole, mesh, [Shard(1)])))
    return all(kept)


def test_sharded_tensors_with_several_shards_here_and_none_there(ranks, tmp_path):
    assert ranks.values(uneven_sharded_tensor, tmp_path) == [True] * WORLD_SIZE


def coordinated_by(path, members, coordinator_rank):
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        return None
    planned, mesh = [], DeviceMesh.from_group(group, "cpu")

    class Saver(DefaultSavePlanner):
        def create_global_plan(self, all_plans):
            planned.append(self.is_coordinator)
            return super().create_global_plan(all_plans)

    class Loader(DefaultLoadPlanner):
        def create_global_plan(self, all_plans):
            planned.append(self.is_coordinator)
            return super().create_global_plan(all_plans)

    state = {"w": distribute_tensor(noise((5,), torch.int32, 3), mesh, [Shard(0)])}
    loaded = {"w": blank_like(state["w"])}
    reference.save_state_dict(state, FileSystemWriter(path), group, coordinator_rank, planner=Saver())
    reference.load_state_dict(loaded, FileSystemReader(path), group, coordinator_rank, planner=Loader())
    assert raw_bytes(loaded["w"]) == raw_bytes(state["w"])
    try:
        reference.save_state_dict(state, FileSystemWriter(path), group, len(members))
    except ValueError as error:
        return planned, "coordinator_rank=" in str(error)
    return None


@pytest.mark.parametrize(("members", "coordinator_rank"), [([0, 1, 2], 0), ([0, 1, 2], 2), ([2, 1], 1)])
def test_any_rank_may_coordinate(ranks, tmp_path, members, coordinator_rank):
    found = ranks.values(coordinated_by, tmp_path, members, coordinator_rank)
    coordinator = sorted(members)[coordinator_rank]
    assert found == [
        None if rank not in members else ([True, True] if rank == coordinator else [], True)
        for rank in range(WORLD_SIZE)
    ]


def fail_with_any_coordinator(path, failing_rank):
    class Planner(DefaultSavePlanner):
        def create_local_plan(self):
            if dist.get_rank() == failing_rank:
                raise KeyError("boom")
            return super().create_local_plan()

        def create_global_plan(self, all_plans):
            plans, metadata = super().create_global_plan(all_plans)
            return [dataclasses.replace(plan, planner_data=lambda: None) for plan in plans], metadata

    try:
        reference.save_state_dict({"x": 1}, FileSystemWriter(path), coordinator_rank=1, planner=Planner())
    except CheckpointException as error:
        return list(error.failures)
    return None


@pytest.mark.parametrize(("failing_rank", "expected"), [(0, [0]), (2, [2]), (None, [1])])
def test_any_coordinator_tells_all_of_a_failure(ranks, tmp_path, failing_rank, expected):
    assert ranks.values(fail_with_any_coordinator, tmp_path, failing_rank) == [expected] * WORLD_SIZE


def fail_apart(path, failing_rank, where):
    class Planner(DefaultSavePlanner):
        def create_local_plan(self):
            return fail() if where == "plan" and dist.get_rank() == failing_rank else super().create_local_plan()

        def resolve_data(self, write_item):
            return fail() if where == "write" and dist.get_rank() == failing_rank else super().resolve_data(write_item)

    class Reader(FileSystemReader):
        def read_data(self, plan, planner):
            return fail() if where == "read" and dist.get_rank() == failing_rank else super().read_data(plan, planner)

    def fail():
        raise OSError(28, "boom")

    state = {"x": torch.full((3,), float(dist.get_rank()))}
    try:
        reference.save(state, checkpoint_id=path, planner=Planner(), use_collectives=False)
        reference.load({"x": torch.zeros(3)}, storage_reader=Reader(path))
    except CheckpointException as error:
        return list(error.failures), "boom" in str(error)
    return None


@pytest.mark.parametrize("where", ["plan", "write", "read"])
@pytest.mark.parametrize("failing_rank", [0, 2])
def test_ranks_that_save_alone_do_not_wait_for_one_that_fails(ranks, tmp_path, where, failing_rank):
    assert ranks.values(fail_apart, tmp_path, failing_rank, where) == [([failing_rank], True)] * WORLD_SIZE


def between_torch_and_us(path):
    rank, found = dist.get_rank(), []
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    whole = noise((7, 2), torch.float32, 1)
    for n, (save, load) in enumerate([(reference.save, dcp.load), (dcp.save, reference.load)]):
        state = {"w": distribute_tensor(whole, mesh, [Shard(0)]), "r": torch.full((2,), float(rank)), "o": rank}
        save(state, checkpoint_id=path / str(n), use_collectives=False)
        loaded = {"w": distribute_tensor(torch.zeros(7, 2), mesh, [Shard(0)]), "r": torch.zeros(2), "o": None}
        load(loaded, checkpoint_id=path / str(n))
        found.append((raw_bytes(loaded["w"]) == raw_bytes(state["w"]), loaded["r"].tolist(), loaded["o"]))
    return found


def test_what_ranks_save_alone_is_what_torch_writes_and_reads(ranks, tmp_path):
    assert ranks.values(between_torch_and_us, tmp_path) == [
        [(True, [float(rank)] * 2, rank)] * 2 for rank in range(WORLD_SIZE)
    ]
    for n in range(2):
        names = {path.name for path in (tmp_path / str(n)).iterdir()}
        assert {name for name in names if name.endswith("data")} == {f"__{r}.metadata" for r in range(WORLD_SIZE)}
        assert len(names) == 2 * WORLD_SIZE
