"""State dicts of models under FSDP1 on real gloo ranks: as torch has them, and fit for any other parallelism."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as theirs
from rank_pool import Ranks
from state_dict_models import snapshot, train
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from virtual_ranks import raw_bytes

import reference
import reference.state_dict as ours
from reference.state_dict import StateDictOptions

WORLD_SIZE = 4
FULL = StateDictOptions(full_state_dict=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
}
KINDS = ["flat", "orig", "nested", "hybrid", "mesh"]


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(WORLD_SIZE)
    yield started
    started.close()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(6)
        self.down = nn.Linear(5, 6)
        self.register_buffer("kept", torch.randn(2))

    def forward(self, x):
        return self.down(torch.relu(self.up(self.norm(x))))


@functools.cache
def mesh():
    return init_device_mesh("cpu", (WORLD_SIZE,))


def build(kind, name, seed):
    torch.manual_seed(seed)
    model = Net()
    wrap = functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
    if kind == "nested":
        model.up = wrap(checkpoint_wrapper(model.up), use_orig_params=True)
        model = wrap(model, use_orig_params=True)
    elif kind == "hybrid":
        model = wrap(
            model,
            use_orig_params=True,
            sharding_strategy=ShardingStrategy.HYBRID_SHARD,
            device_mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
        )
    elif kind == "mesh":
        model = wrap(model, use_orig_params=True, device_mesh=mesh())
    elif kind == "fsdp2":
        fully_shard(model, mesh=mesh())
    elif kind != "plain":
        model = wrap(model, use_orig_params=kind == "orig")
    return model, OPTIMIZERS[name](list(model.parameters()))


def contents(tree):
    if isinstance(tree, ShardedTensor):
        return [(shard.metadata.shard_offsets, raw_bytes(shard.tensor)) for shard in tree.local_shards()]
    if isinstance(tree, dict):
        return {key: contents(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [contents(value) for value in tree]
    if isinstance(tree, torch.Tensor):
        return tuple(tree.placements) if isinstance(tree, DTensor) else None, tuple(tree.shape), raw_bytes(tree)
    return tree


def against_torch(kind, name, fields):
    model, optimizer = build(kind, name, 0)
    train(model, [optimizer], 2, seed=1)
    mine = ours.get_state_dict(model, optimizer, options=StateDictOptions(**fields))
    yours = theirs.get_state_dict(model, optimizer, options=theirs.StateDictOptions(**fields))
    same = contents(dict(mine[0])) == contents(dict(yours[0])) and contents(mine[1]) == contents(yours[1])
    return same and list(mine[0]) == list(yours[0])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"full_state_dict": True},
        {"cpu_offload": True},
        {"flatten_optimizer_state_dict": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_torch_gives(ranks, kind, fields):
    assert ranks.values(against_torch, kind, "adam", fields) == [True] * WORLD_SIZE


def on_rank_0(kind):
    model, optimizer = build(kind, "adam", 0)
    train(model, [optimizer], 1, seed=1)
    full = ours.get_state_dict(model, optimizer, options=FULL)
    got = ours.get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return (
        got == ({}, {}) if dist.get_rank() else contents((dict(got[0]), got[1])) == contents((dict(full[0]), full[1]))
    )


@pytest.mark.parametrize("kind", ["flat", "nested"])
def test_offloaded_whole_tensors_are_on_rank_0_alone(ranks, kind):
    # torch asks FSDP for that, which fails for models on the CPU.
    assert ranks.values(on_rank_0, kind) == [True] * WORLD_SIZE


def go_on(kind, name, num_steps, fields, path):
    options = StateDictOptions(**fields)
    model, optimizer = build(kind, name, 0)
    train(model, [optimizer], num_steps, seed=1)
    got = snapshot_of(ours.get_state_dict(model, optimizer, options=options))
    fresh, fresh_optimizer = build(kind, name, 9)
    if path is not None:
        reference.save({"model": got[0], "optim": got[1]}, checkpoint_id=path)
        got = ours.get_state_dict(fresh, fresh_optimizer, options=options)
        reference.load({"model": got[0], "optim": got[1]}, checkpoint_id=path)
    result = ours.set_state_dict(
        fresh, fresh_optimizer, model_state_dict=got[0], optim_state_dict=got[1], options=options
    )
    if result != ([], []):
        return str(result)
    losses = [train(*pair, 2, seed=2) for pair in ((model, [optimizer]), (fresh, [fresh_optimizer]))]
    final = [ours.get_state_dict(*pair, options=FULL) for pair in ((model, optimizer), (fresh, fresh_optimizer))]
    return losses[0] == losses[1] and contents(dict(final[0][0])) == contents(dict(final[1][0]))


def snapshot_of(tree):
    """A copy; of a ShardedTensor, which only `deepcopy` of its shards would copy, not even that."""
    if isinstance(tree, ShardedTensor):
        for shard in tree.local_shards():
            shard.tensor = shard.tensor.clone()
        return tree
    if isinstance(tree, dict):
        return {key: snapshot_of(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(snapshot_of(value) for value in tree)
    return snapshot(tree)


@pytest.mark.parametrize("num_steps", [0, 1])
@pytest.mark.parametrize(
    ("kind", "name"), [("flat", "adam"), ("nested", "momentum"), ("hybrid", "sgd"), ("mesh", "adam")]
)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"full_state_dict": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
        {"flatten_optimizer_state_dict": True},
    ],
    ids=str,
)
def test_training_goes_on_as_if_nothing_had_happened(ranks, kind, name, num_steps, fields):
    assert ranks.values(go_on, kind, name, num_steps, fields, None) == [True] * WORLD_SIZE


@pytest.mark.parametrize(("kind", "name"), [("flat", "adam"), ("orig", "momentum"), ("mesh", "adam")])
def test_through_files(ranks, tmp_path, kind, name):
    assert ranks.values(go_on, kind, name, 1, {}, tmp_path) == [True] * WORLD_SIZE


def move(one, other, path):
    model, optimizer = build(one, "adam", 0)
    train(model, [optimizer], 1, seed=1)
    got = ours.get_state_dict(model, optimizer)
    reference.save({"model": got[0], "optim": got[1]}, checkpoint_id=path)
    expected = ours.get_state_dict(model, optimizer, options=FULL)
    fresh, fresh_optimizer = build(other, "adam", 9)
    into = ours.get_state_dict(fresh, fresh_optimizer)
    reference.load({"model": into[0], "optim": into[1]}, checkpoint_id=path)
    ours.set_state_dict(fresh, fresh_optimizer, model_state_dict=into[0], optim_state_dict=into[1])
    found = ours.get_state_dict(fresh, fresh_optimizer, options=FULL)
    return [
        contents(dict(a)) == contents(dict(b))
        for a, b in ((expected[0], found[0]), (expected[1]["state"], found[1]["state"]))
    ]


@pytest.mark.parametrize(
    ("one", "other"), [("flat", "plain"), ("plain", "orig"), ("nested", "fsdp2"), ("fsdp2", "flat")]
)
def test_a_checkpoint_fits_any_parallelism(ranks, tmp_path, one, other):
    assert ranks.values(move, one, other, tmp_path) == [[True, True]] * WORLD_SIZE


def refuse(kind, what, failing_rank):
    model, optimizer = build(kind, "adam", 0)
    train(model, [optimizer], 1, seed=1)
    state, optimizer_state = ours.get_state_dict(model, optimizer, options=FULL)
    if dist.get_rank() == failing_rank or failing_rank is None:
        if what == "entry":
            del optimizer_state["state"]["up.weight"]
        elif what == "group":
            optimizer_state["param_groups"][0]["params"].remove("up.weight")
        else:
            del state["up.weight"]
    try:
        ours.set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state, options=FULL)
    except BaseException as error:
        return type(error).__name__, "up.weight" in str(error)
    return None


@pytest.mark.parametrize("kind", ["flat", "orig"])
@pytest.mark.parametrize("what", ["entry", "group", "key"])
def test_what_is_missing_is_named(ranks, kind, what):
    assert ranks.values(refuse, kind, what, None) == [("RuntimeError", True)] * WORLD_SIZE


def test_what_one_rank_misses_all_hear_of(ranks):
    found = ranks.values(refuse, "orig", "entry", 2)
    assert found == [("RuntimeError" if rank == 2 else "CheckpointException", True) for rank in range(WORLD_SIZE)]
