"""State dicts on real gloo ranks: DDP, FSDP2, HSDP, TP and FSDP2 x TP; ranks are started once for this module."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import Ranks
from state_dict_models import difference, snapshot, train, whole_state
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import reference
import reference.state_dict as ours
from reference.state_dict import StateDictOptions

WORLD_SIZE = 4
KINDS = ["ddp", "fsdp", "hsdp", "tp", "fsdp_tp", "fsdp_on_two"]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw-one-by-one": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), amsgrad=True, foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}
FULL = StateDictOptions(full_state_dict=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
MESHES = {}


def set_up():
    MESHES["flat"] = init_device_mesh("cpu", (WORLD_SIZE,), mesh_dim_names=("dp",))
    MESHES["two"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(WORLD_SIZE, set_up, timeout_s=30)
    yield started
    started.close()


def check(results):
    """Every rank must have returned None: no difference."""
    assert results == [("ok", None)] * WORLD_SIZE, results


class Net(nn.Module):
    def __init__(self, hidden=5, unused=False):
        super().__init__()
        self.up = nn.Linear(6, hidden)
        self.norm = nn.LayerNorm(6)
        self.down = nn.Linear(hidden, 6)
        self.odd = nn.Linear(6, 3, bias=False)
        self.odd.weight.requires_grad_(False)
        if unused:
            self.extra = nn.Parameter(torch.randn(5, 2))
        self.register_buffer("kept", torch.randn(2))

    def forward(self, x):
        return self.odd(self.down(torch.relu(self.up(self.norm(x)))))


def build(kind, name, seed, hidden=8, unused=False, device="cpu"):
    torch.manual_seed(seed)
    with torch.device(device):
        model = Net(hidden, unused)
    flat, two = MESHES["flat"], MESHES["two"]
    if kind == "ddp":
        model.up = checkpoint_wrapper(model.up)
        model = DistributedDataParallel(model, find_unused_parameters=unused)
    elif kind == "fsdp":
        fully_shard(model.down, mesh=flat)
        fully_shard(model, mesh=flat)
    elif kind == "fsdp_on_two":
        fully_shard(model, mesh=two["dp"])
    elif kind == "hsdp":
        fully_shard(model, mesh=two)
    elif kind in ("tp", "fsdp_tp"):
        mesh = flat if kind == "tp" else two["tp"]
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if kind == "fsdp_tp":
            fully_shard(model, mesh=two["dp"])
    return model, OPTIMIZERS[name](list(model.parameters()))


def full_of(tree):
    """The same by torch's DTensor alone, for comparing."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return {key: full_of(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [full_of(value) for value in tree]
    return tree


EVEN = {"tp": [4, 8], "fsdp_tp": [2, 4, 6]}  # TP itself cannot run with uneven shards
setups = st.sampled_from(KINDS).flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.sampled_from(sorted(OPTIMIZERS)),
        st.sampled_from(EVEN.get(kind, [3, 4, 5, 8])),
        st.booleans(),
    )
)


def go_on(setup, num_steps, options):
    kind, name, hidden, unused = setup
    model, optimizer = build(kind, name, 0, hidden, unused)
    train(model, [optimizer], num_steps, seed=1)
    before = whole_state(model, [optimizer])
    got = snapshot(ours.get_state_dict(model, optimizer, options=options))
    changed = difference(before, whole_state(model, [optimizer]))
    fresh, fresh_optimizer = build(kind, name, 9, hidden, unused)
    result = ours.set_state_dict(
        fresh, fresh_optimizer, model_state_dict=got[0], optim_state_dict=got[1], options=options
    )
    if result != ([], []):
        return str(result)
    mine, original = train(fresh, [fresh_optimizer], 2, seed=2), train(model, [optimizer], 2, seed=2)
    final = [ours.get_state_dict(model, optimizer), ours.get_state_dict(fresh, fresh_optimizer)]
    return changed or difference(original, mine) or difference(*final)


@settings(deadline=None, max_examples=16)
@given(setup=setups, num_steps=st.integers(0, 2), options=st.sampled_from([None, FLAT, FULL, BROADCAST]))
def test_training_goes_on_as_if_nothing_had_happened(ranks, setup, num_steps, options):
    check(ranks(go_on, setup, num_steps, options))


def against_torch(setup, fields):
    kind, name, hidden, _ = setup
    model, optimizer = build(kind, name, 0, hidden)
    train(model, [optimizer], 2, seed=1)
    mine = ours.get_state_dict(model, optimizer, options=StateDictOptions(**fields))
    yours = theirs.get_state_dict(model, optimizer, options=theirs.StateDictOptions(**fields))
    if fields.get("cpu_offload") and fields.get("full_state_dict") and dist.get_rank():
        assert mine == ({}, {})
    found = difference(tuple(map(dict, mine)), tuple(map(dict, yours)))
    if found or (fields.get("cpu_offload") and fields.get("full_state_dict")):
        return found
    mine, yours = snapshot((mine, yours))
    loaded = []
    # torch cannot load a full state dict that is flat too, of an optimizer without state, or into some strided shards.
    is_beyond_torch = fields.get("full_state_dict") and (
        fields.get("flatten_optimizer_state_dict") or name == "sgd" or kind == "fsdp_tp"
    )
    for functions, state in ((ours if is_beyond_torch else theirs, mine), (ours, yours)):
        fresh, fresh_optimizer = build(kind, name, 9, hidden)
        functions.set_state_dict(
            fresh,
            fresh_optimizer,
            model_state_dict=state[0],
            optim_state_dict=state[1],
            options=functions.StateDictOptions(**fields, strict=not fields.get("ignore_frozen_params")),
        )
        loaded.append(ours.get_state_dict(fresh, fresh_optimizer))
        # torch drops the state of frozen parameters, which Adagrad has from the beginning, makes empty entries, and
        # makes lists of the tuples in parameter groups.
        loaded[-1][1]["state"].pop("odd.weight", None)
        loaded[-1][1]["state"] = {key: value for key, value in loaded[-1][1]["state"].items() if value}
        for group in loaded[-1][1]["param_groups"]:
            group.update({key: list(value) for key, value in group.items() if isinstance(value, tuple)})
    return difference(*loaded)


@settings(deadline=None, max_examples=15)
@given(
    setup=setups,
    fields=st.fixed_dictionaries(
        {},
        optional={
            key: st.just(True)
            for key in ("full_state_dict", "cpu_offload", "flatten_optimizer_state_dict", "ignore_frozen_params")
        },
    ),
)
def test_ours_is_torchs_and_either_loads_the_others(ranks, setup, fields):
    check(ranks(against_torch, setup, fields))


def between(one, other, name, options, path):
    model, optimizer = build(one, name, 0)
    train(model, [optimizer], 1, seed=1)
    expected = full_of(tuple(map(dict, ours.get_state_dict(model, optimizer))))
    got = snapshot(ours.get_state_dict(model, optimizer, options=options))
    fresh, fresh_optimizer = build(other, name, 9)
    if path is not None:
        reference.save({"model": got[0], "optim": got[1]}, checkpoint_id=path)
        got = ours.get_state_dict(fresh, fresh_optimizer)
        reference.load({"model": got[0], "optim": got[1]}, checkpoint_id=path)
        options = None
    elif options.cpu_offload:
        options = BROADCAST
    ours.set_state_dict(fresh, fresh_optimizer, model_state_dict=got[0], optim_state_dict=got[1], options=options)
    found = full_of(tuple(map(dict, ours.get_state_dict(fresh, fresh_optimizer))))
    return difference(expected, found)


@settings(deadline=None, max_examples=12)
@given(
    one=st.sampled_from(KINDS),
    other=st.sampled_from(KINDS),
    name=st.sampled_from(sorted(OPTIMIZERS)),
    options=st.sampled_from([FULL, BROADCAST, StateDictOptions(full_state_dict=True, cpu_offload=True)]),
)
def test_a_full_state_fits_any_parallelism(ranks, one, other, name, options):
    check(ranks(between, one, other, name, options, None))


@pytest.mark.parametrize(("one", "other"), [("fsdp", "fsdp_tp"), ("fsdp_tp", "ddp"), ("tp", "hsdp")])
def test_a_checkpoint_fits_any_parallelism(ranks, tmp_path, one, other):
    check(ranks(between, one, other, "adam", None, tmp_path))


class Breaking(nn.Module):
    """Fails where ranks must act together."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def get_extra_state(self):
        if self.step == "get":
            raise KeyError("boom: last.weight")
        return (lambda: None) if self.step == "pickle" else None

    def set_extra_state(self, state):
        pass


def fail(failing_rank, step, kind):
    model, optimizer = build(kind, "adam", 0)
    model.register_module("breaking", Breaking(step if dist.get_rank() == failing_rank else ""))
    got = ({}, {})
    try:
        got = ours.get_state_dict(model, optimizer, options=FULL)
        if step == "key" and dist.get_rank() == failing_rank:
            got[0].pop("down.weight")
        if step == "shape" and dist.get_rank() == failing_rank:
            model.register_buffer("kept", torch.ones(3))
        if step == "sharded" and dist.get_rank() == failing_rank:
            got[0]["up.weight"] = distribute_tensor(torch.ones(8, 6), init_device_mesh("cpu", (1,)), [Shard(0)])
        before = whole_state(model, [optimizer])
        ours.set_state_dict(model, optimizer, model_state_dict=got[0], optim_state_dict=got[1], options=BROADCAST)
    except BaseException as error:
        unchanged = step == "get" or difference(before, whole_state(model, [optimizer])) is None
        return type(error).__name__, "".join(str(error).split("\n")), unchanged
    return None


@pytest.mark.parametrize(
    ("step", "failing_rank", "kind", "words"),
    [
        ("get", 2, "fsdp", "boom: last.weight"),
        ("get", 1, "fsdp_tp", "boom: last.weight"),
        ("pickle", 0, "fsdp", "pickle"),
        ("shape", 3, "fsdp_tp", "'kept'"),
    ],
)
def test_a_failure_reaches_every_rank_and_nobody_waits(ranks, step, failing_rank, kind, words):
    results = ranks(fail, failing_rank, step, kind)
    assert [outcome for outcome, _ in results] == ["ok"] * WORLD_SIZE, results
    for rank, (_, (error, text, unchanged)) in enumerate(results):
        assert unchanged
        assert words in text, (rank, text)
        assert (error == "CheckpointException") == (rank != failing_rank), results


def test_a_key_that_rank_0_lacks_is_missed_by_all(ranks):
    results = ranks(fail, 0, "key", "fsdp")
    assert all("'down.weight'" in value[1] and value[2] for _, value in results), results
    check(ranks(fail, 1, "key", "fsdp"))


def all_dtypes():
    mesh = MESHES["flat"]
    for dtype in (torch.uint16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.bfloat16):
        whole = (torch.arange(10) % 7).to(torch.float32).to(dtype).reshape(5, 2)
        model = nn.Module()
        model.register_buffer("b", distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
        got = ours.get_model_state_dict(model, options=FULL)
        blank = nn.Module()
        blank.register_buffer("b", distribute_tensor(torch.zeros_like(whole), mesh, [Shard(1)], src_data_rank=None))
        ours.set_model_state_dict(blank, got if dist.get_rank() == 0 else {}, options=BROADCAST)
        again = ours.get_model_state_dict(blank, options=FULL)
        found = difference(dict(got), {"b": whole}) or difference(dict(again), {"b": whole})
        if found:
            return f"{dtype} {found}"
    return None


def test_every_dtype_travels(ranks):
    check(ranks(all_dtypes))


def on_meta(kind, options):
    model, _ = build(kind, "adam", 0)
    got = ours.get_model_state_dict(model, options=FULL)
    blank, _ = build(kind, "adam", 9, device="meta")
    ours.set_model_state_dict(blank, got, options=options)
    return difference(dict(ours.get_model_state_dict(blank)), dict(ours.get_model_state_dict(model)))


@pytest.mark.parametrize("options", [FULL, BROADCAST])
@pytest.mark.parametrize("kind", ["fsdp", "fsdp_tp"])
def test_sharded_parameters_on_the_meta_device_get_memory(ranks, kind, options):
    check(ranks(on_meta, kind, options))
