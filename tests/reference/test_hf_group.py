"""Safetensors on real ranks over gloo: saved, loaded, consolidated, and a failure that reaches all of them."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_pool import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from virtual_ranks import noise, raw_bytes

import reference
from reference import CheckpointException
from reference._consolidate_hf_safetensors import consolidate_safetensors_files_on_every_rank

PARTS = {"reference": reference, "torch": dcp}
MAPPING = {"w": 1, "v": 2}
WORLD_SIZE = 3


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(WORLD_SIZE)
    yield started
    started.close()


def make_state(placement, seed):
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    tensors = {"w": noise((7, 4), torch.bfloat16, seed), "v": noise((4, 6), torch.int64, seed)}
    return {fqn: distribute_tensor(tensor, mesh, [placement]) for fqn, tensor in tensors.items()}


def is_same(loaded, expected):
    return all(raw_bytes(loaded[fqn]) == raw_bytes(expected[fqn]) for fqn in expected)


def save_then_load(path, engine="reference", writer="reference", reader="reference"):
    writer, reader = PARTS[writer].HuggingFaceStorageWriter, PARTS[reader].HuggingFaceStorageReader
    state = make_state(Shard(0), 1)
    PARTS[engine].save(state, storage_writer=writer(str(path), save_distributed=True, thread_count=2))
    loaded = make_state(Shard(1), 2)
    PARTS[engine].load(loaded, storage_reader=reader(str(path), thread_count=2))
    return is_same(loaded, make_state(Shard(1), 1))


@pytest.mark.parametrize("engine", PARTS)
@pytest.mark.parametrize("writer", PARTS)
@pytest.mark.parametrize("reader", PARTS)
def test_resharding_between_real_ranks(ranks, tmp_path, engine, writer, reader):
    """Rows of `v` are too few for all ranks, so that torch's planner writes an empty chunk."""
    assert ranks.values(save_then_load, tmp_path, engine, writer, reader) == [True] * WORLD_SIZE


def save_with_consolidation(path):
    writer = reference.HuggingFaceStorageWriter(path, MAPPING, save_distributed=True, enable_consolidation=True)
    reference.async_save(make_state(Shard(0), 1), storage_writer=writer).result()
    loaded = make_state(Shard(1), 2)
    reference.load(loaded, storage_reader=reference.HuggingFaceStorageReader(path))
    return is_same(loaded, make_state(Shard(1), 1))


def test_async_save_with_consolidation(ranks, tmp_path):
    assert ranks.values(save_with_consolidation, tmp_path) == [True] * WORLD_SIZE


def consolidate(source, target, mapping):
    try:
        consolidate_safetensors_files_on_every_rank(str(source), str(target), mapping)
    except CheckpointException as error:
        return sorted(error.failures), str(error)
    loaded = make_state(Shard(1), 2)
    reference.load(loaded, storage_reader=reference.HuggingFaceStorageReader(target))
    return is_same(loaded, make_state(Shard(1), 1))


def test_consolidation_on_every_rank(ranks, tmp_path):
    ranks.values(save_then_load, tmp_path / "in")
    assert ranks.values(consolidate, tmp_path / "in", tmp_path / "out", MAPPING) == [True] * WORLD_SIZE
    outcomes = ranks.values(consolidate, tmp_path / "in", tmp_path / "out2", {"w": 1})
    assert all(failing == [0] and "'v' in the files" in text for failing, text in outcomes)
    assert not (tmp_path / "out2").exists()


def consolidate_in_subgroup(source, target):
    group = dist.new_group([2, 1])
    try:
        consolidate_safetensors_files_on_every_rank(str(source), str(target), MAPPING, process_group=group)
    except ValueError as error:
        return dist.get_rank() == 0 and "belongs to" in str(error)
    return dist.get_rank() != 0


def test_a_group_of_some_ranks(ranks, tmp_path):
    ranks.values(save_then_load, tmp_path / "in")
    assert ranks.values(consolidate_in_subgroup, tmp_path / "in", tmp_path / "out") == [True] * WORLD_SIZE
    loaded = {"w": torch.zeros(7, 4, dtype=torch.bfloat16)}
    reference.load(loaded, storage_reader=reference.HuggingFaceStorageReader(tmp_path / "out"))
    assert raw_bytes(loaded["w"]) == raw_bytes(noise((7, 4), torch.bfloat16, 1))


def fail_on(path, failing_rank):
    class Planner(reference.DefaultSavePlanner):
        def resolve_data(self, write_item):
            if dist.get_rank() == failing_rank:
                raise OSError(28, "boom")
            return super().resolve_data(write_item)

    writer = reference.HuggingFaceStorageWriter(path, save_distributed=True)
    try:
        reference.save(make_state(Shard(0), 2), storage_writer=writer, planner=Planner())
    except CheckpointException as error:
        loaded = make_state(Shard(1), 3)
        for part in PARTS.values():
            reference.load(loaded, storage_reader=part.HuggingFaceStorageReader(str(path)))
            if not is_same(loaded, make_state(Shard(1), 1)):
                return "the previous checkpoint is damaged"
        return sorted(error.failures)
    return None


def test_a_failure_reaches_every_rank_and_the_previous_checkpoint_stays_for_every_reader(ranks, tmp_path):
    ranks.values(save_then_load, tmp_path)
    assert ranks.values(fail_on, tmp_path, 1) == [[1]] * WORLD_SIZE
