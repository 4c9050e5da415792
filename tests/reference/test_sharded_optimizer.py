"""Optimizer state of FSDP1, loaded by the function that DCP has for it: side by side with torch's."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_pool import Ranks
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard as LegacyShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardedTensorMetadata, init_from_local_shards
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from virtual_ranks import noise, raw_bytes

import reference

WORLD_SIZE = 3


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(WORLD_SIZE)
    yield started
    started.close()


def trained(seed):
    torch.manual_seed(seed)
    model = FullyShardedDataParallel(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), device_id=torch.device("cpu"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def contents(value):
    if isinstance(value, ShardedTensor):
        return [(shard.metadata.shard_offsets, raw_bytes(shard.tensor)) for shard in value.local_shards()]
    if isinstance(value, dict):
        return {key: contents(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [contents(entry) for entry in value]
    return raw_bytes(value) if isinstance(value, torch.Tensor) else value


def load_beside_torch(path):
    warnings.simplefilter("ignore")
    model, optimizer = trained(0)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        saved = {
            "model": model.state_dict(),
            "optim": FullyShardedDataParallel.optim_state_dict(model, optimizer),
        }
        reference.save(saved, checkpoint_id=path)
        fresh, fresh_optimizer = trained(1)
        with FullyShardedDataParallel.state_dict_type(fresh, StateDictType.SHARDED_STATE_DICT):
            state = fresh.state_dict()
            mine = reference.load_sharded_optimizer_state_dict(state, "optim", reference.FileSystemReader(path))
            theirs = dcp.load_sharded_optimizer_state_dict(state, "optim", dcp.FileSystemReader(path))
            same = contents(mine) == contents(theirs)
            flat = FullyShardedDataParallel.optim_state_dict_to_load(fresh, fresh_optimizer, mine["optim"])
            fresh_optimizer.load_state_dict(flat)
            again = FullyShardedDataParallel.optim_state_dict(fresh, fresh_optimizer)
    return same, contents(again["state"]) == contents(saved["optim"]["state"]), sorted(mine)


def test_it_is_what_torch_loads_and_what_fsdp_takes(ranks, tmp_path):
    assert ranks.values(load_beside_torch, tmp_path) == [(True, True, ["optim"])] * WORLD_SIZE


def slices_of_tensor_parallelism(path):
    """Each rank is a column slice of its own, cut along dim 0 over a group of one."""
    rank = dist.get_rank()
    groups = [dist.new_group([r]) for r in range(WORLD_SIZE)]
    whole = noise((4, 2 * WORLD_SIZE), torch.float32, 1)
    reference.save(
        {"optim": {"state": {"w": {"m": whole, "step": torch.tensor(3.0)}, "o": {"x": 1}}}}, checkpoint_id=path
    )
    inner = init_from_local_shards(
        [LegacyShard(torch.zeros(4, 2), ShardMetadata([0, 0], [4, 2], placement=f"rank:{rank}/cpu"))],
        4,
        2,
        process_group=groups[rank],
    )
    outer = [ShardMetadata([0, 2 * r], [4, 2], placement=f"rank:{r}/cpu") for r in range(WORLD_SIZE)]
    model_state = {
        "w": ShardedTensor._init_from_local_shards_and_global_metadata(
            [LegacyShard(inner, outer[rank])], ShardedTensorMetadata(outer, torch.Size(whole.size()))
        )
    }
    loaded = reference.load_sharded_optimizer_state_dict(model_state, "optim", reference.FileSystemReader(path))
    (shard,) = loaded["optim"]["state"]["w"]["m"].local_shards()
    step, other = loaded["optim"]["state"]["w"]["step"], loaded["optim"]["state"]["o"]
    return raw_bytes(shard.tensor) == raw_bytes(whole[:, 2 * rank : 2 * rank + 2]), step.item(), other


def test_slices_of_tensor_parallelism(ranks, tmp_path):
    assert ranks.values(slices_of_tensor_parallelism, tmp_path) == [(True, 3.0, {"x": 1})] * WORLD_SIZE
