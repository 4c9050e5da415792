"""State dicts in one process: reading changes nothing, training goes on bit for bit, torch reads ours."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from state_dict_models import OPTIMIZERS, Net, difference, make_optimizers, train, whole_state
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.optimizer import register_optimizer_step_pre_hook

import reference
import reference.state_dict as ours
from reference.state_dict import StateDictOptions

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
BROADCAST = {"full_state_dict": True, "broadcast_from_rank0": True}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def setups(draw):
    name = draw(st.sampled_from(sorted(OPTIMIZERS)), label="optimizer")
    tied, frozen, unused = (draw(st.booleans(), label=label) for label in ("tied", "frozen", "unused"))
    layout = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]), label="groups, optimizers")

    def build(seed):
        torch.manual_seed(seed)
        model = Net(tied, frozen, unused and name != "lbfgs")
        return model, make_optimizers(model, name, *layout)

    return name, build, unused and name != "lbfgs"


@settings(deadline=None, max_examples=60)
@given(setup=setups(), num_steps=st.integers(0, 2), is_flat=st.booleans())
def test_training_goes_on_as_if_nothing_had_happened(setup, num_steps, is_flat):
    _, build, _ = setup
    options = FLAT if is_flat else None
    model, optimizers = build(0)
    train(model, optimizers, num_steps, seed=1)
    before = whole_state(model, optimizers)
    state, optimizer_state = copy.deepcopy(ours.get_state_dict(model, optimizers, options=options))
    assert difference(before, whole_state(model, optimizers)) is None
    fresh, fresh_optimizers = build(9)
    result = ours.set_state_dict(
        fresh, fresh_optimizers, model_state_dict=state, optim_state_dict=optimizer_state, options=options
    )
    assert result == ([], [])
    assert train(fresh, fresh_optimizers, 3, seed=2) == train(model, optimizers, 3, seed=2)
    final = [ours.get_state_dict(*pair, options=options) for pair in ((model, optimizers), (fresh, fresh_optimizers))]
    assert difference(*final) is None


@settings(deadline=None, max_examples=60)
@given(setup=setups(), is_flat=st.booleans())
def test_ours_is_torchs_after_a_step(setup, is_flat):
    name, build, has_unused = setup
    if is_flat and name == "lbfgs":
        return  # torch refuses lists in flat states
    model, optimizers = build(0)
    train(model, optimizers, 2, seed=1)
    options = {"flatten_optimizer_state_dict": is_flat}
    mine = ours.get_state_dict(model, optimizers, options=StateDictOptions(**options))
    yours = theirs.get_state_dict(model, optimizers, options=theirs.StateDictOptions(**options))
    if has_unused:
        drop_unused(mine[1], yours[1])
    assert difference(mine, tuple(yours)) is None


def drop_unused(mine, yours):
    # torch leaves out what has had no gradient yet, and then cannot load its own result.
    for tree, reference_tree in ((mine.get("state", mine), yours.get("state", yours)),):
        for key in [key for key in tree if key not in reference_tree]:
            assert "extra" in key
            del tree[key]


@settings(deadline=None, max_examples=40)
@given(setup=setups(), is_flat=st.booleans(), num_steps=st.integers(0, 1))
def test_torch_loads_ours_and_we_load_torchs(setup, is_flat, num_steps):
    name, build, has_unused = setup
    model, optimizers = build(0)
    train(model, optimizers, num_steps, seed=1)
    options = {"flatten_optimizer_state_dict": is_flat}
    if len(optimizers) == 1 and name != "lbfgs":
        fresh, fresh_optimizers = build(9)
        mine = copy.deepcopy(ours.get_state_dict(model, optimizers, options=StateDictOptions(**options)))
        theirs.set_state_dict(
            fresh,
            fresh_optimizers,
            model_state_dict=mine[0],
            optim_state_dict=mine[1],
            options=theirs.StateDictOptions(**options),
        )
        a, b = (ours.get_state_dict(*pair) for pair in ((model, optimizers), (fresh, fresh_optimizers)))
        for _, tree in (a, b):
            # torch makes empty entries, and drops the state of frozen parameters, which Adagrad has from the beginning.
            has_frozen = name == "adagrad" and not model.inner[0].weight.requires_grad
            odd = {"inner.0.weight"} if has_frozen else set()
            tree["state"] = {key: value for key, value in tree["state"].items() if value and key not in odd}
        assert difference(a, b) is None
    if num_steps and not has_unused and not (name == "lbfgs" and is_flat):
        fresh, fresh_optimizers = build(9)
        yours = copy.deepcopy(theirs.get_state_dict(model, optimizers, options=theirs.StateDictOptions(**options)))
        ours.set_state_dict(fresh, fresh_optimizers, model_state_dict=yours[0], optim_state_dict=yours[1])
        assert train(fresh, fresh_optimizers, 2, seed=2) == train(model, optimizers, 2, seed=2)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"lbfgs"}))
def test_the_recipe_saves_and_loads_through_files(tmp_path, name):
    torch.manual_seed(0)
    model = Net(unused=True)
    optimizers = make_optimizers(model, name)
    train(model, optimizers, 2, seed=1)
    saved = dict(zip(("model", "optim"), ours.get_state_dict(model, optimizers), strict=True))
    reference.save(saved, checkpoint_id=tmp_path)
    fresh = Net(unused=True)
    fresh_optimizers = make_optimizers(fresh, name)
    loaded = dict(zip(("model", "optim"), ours.get_state_dict(fresh, fresh_optimizers), strict=True))
    reference.load(loaded, checkpoint_id=tmp_path)
    ours.set_state_dict(fresh, fresh_optimizers, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    assert train(fresh, fresh_optimizers, 2, seed=2) == train(model, optimizers, 2, seed=2)


def test_sparse_gradients():
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    state = ours.get_optimizer_state_dict(model, optimizer)
    assert state["state"]["weight"]["step"] == 0
    assert not optimizer.state
    for number in range(2):
        model(torch.tensor([number])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    yours = theirs.get_optimizer_state_dict(model, optimizer)
    assert difference(ours.get_optimizer_state_dict(model, optimizer), yours) is None


def test_before_the_first_step_the_state_is_what_training_begins_with():
    model = Net()
    for name, entry, value in (
        ("adam", "step", 0.0),
        ("rprop", "step_size", 0.01),
        ("sgd-momentum", "momentum_buffer", 0),
    ):
        optimizer = make_optimizers(model, name)[0]
        state = ours.get_optimizer_state_dict(model, optimizer)["state"]
        assert state.keys() == {fqn for fqn, _ in model.named_parameters()}
        assert all(bool((entries[entry] == value).all()) for entries in state.values())


def test_reading_runs_no_hook_and_counts_no_step():
    model = Net()
    optimizer = make_optimizers(model, "adam-tensor-lr")[0]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    handle = register_optimizer_step_pre_hook(lambda *args: calls.append("any"))
    rate = optimizer.param_groups[0]["lr"]
    try:
        ours.get_state_dict(model, optimizer)
    finally:
        handle.remove()
    assert calls == []
    assert optimizer.param_groups[0]["lr"] is rate
    assert not getattr(optimizer, "_opt_called", False)
    assert scheduler.last_epoch == 0


def test_gradients_that_are_there_do_not_matter():
    model = Net()
    optimizers = make_optimizers(model, "adam")
    model(torch.randn(4, 6)).sum().backward()
    before = whole_state(model, optimizers)
    state = ours.get_optimizer_state_dict(model, optimizers)
    assert difference(before, whole_state(model, optimizers)) is None
    assert float(state["state"]["last.weight"]["step"]) == 0


class Odd(torch.optim.Optimizer):
    """State that is text, None, nested under numbers, or of the whole; an optimizer inside; random numbers."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.inside = torch.optim.SGD(self.param_groups[0]["params"], lr=0.1, momentum=0.9)

    def step(self):
        self.inside.step()
        self.state["total"] = self.state.get("total", 0) + 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    torch.rand(1)
                    state = self.state[p]
                    state.setdefault("name", "abc")
                    state.setdefault("nothing", None)
                    state.setdefault("blocks", {0: torch.zeros(2), 1: {"deep": torch.ones(1)}})
                    state["blocks"][0] += 1
                    p.sub_(p.grad, alpha=group["lr"])

    step = torch.no_grad()(step)


@pytest.mark.parametrize("options", [None, FLAT])
def test_state_of_any_kind(options):
    model = nn.Linear(2, 2)
    optimizer = Odd(model.parameters())
    before = whole_state(model, [optimizer])
    ours.get_optimizer_state_dict(model, optimizer, options=options)
    assert difference(before, whole_state(model, [optimizer])) is None
    assert not optimizer.inside.state
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(ours.get_optimizer_state_dict(model, optimizer, options=options))
    fresh = nn.Linear(2, 2)
    fresh_optimizer = Odd(fresh.parameters())
    ours.set_optimizer_state_dict(fresh, fresh_optimizer, state, options=options)
    assert difference(ours.get_optimizer_state_dict(fresh, fresh_optimizer, options=options), state) is None
    assert fresh_optimizer.state[fresh.weight]["name"] == "abc"
    assert fresh_optimizer.state["total"] == 1
    assert list(fresh_optimizer.state[fresh.weight]["blocks"]) == [0, 1]


class RunningSums(torch.optim.Optimizer):
    """Keeps its state in float32, whatever the parameters are in."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state.setdefault("sum", torch.zeros_like(parameter, dtype=torch.float32))
                    state["sum"] += parameter.grad.float() + 2**-20
                    parameter.sub_(group["lr"] * state["sum"].to(parameter.dtype))


@pytest.fixture
def alone_in_a_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"full_state_dict": True}, BROADCAST], ids=str)
def test_state_of_another_dtype_than_its_parameter_stays_as_it_is(alone_in_a_group, options):
    def build():
        model = nn.Linear(4, 4).bfloat16()
        optimizer = RunningSums(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return model, optimizer

    model, optimizer = build()
    saved, saved_optimizer = ours.get_state_dict(model, optimizer)
    other, others_optimizer = build()
    ours.set_state_dict(
        other,
        others_optimizer,
        model_state_dict=saved,
        optim_state_dict=saved_optimizer,
        options=StateDictOptions(**options),
    )
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(others_optimizer.state[two]["sum"], optimizer.state[one]["sum"])
        assert others_optimizer.state[two]["sum"].dtype == torch.float32


def test_names_do_not_tell_of_wrappers():
    plain = Net(tied=True)
    wrapped = copy.deepcopy(plain)
    wrapped.inner[0] = checkpoint_wrapper(wrapped.inner[0])
    wrapped.last = torch.compile(wrapped.last)
    wrapped = torch.compile(checkpoint_wrapper(wrapped))
    expected = plain.state_dict()
    for functions in (ours, theirs):
        assert difference(dict(functions.get_model_state_dict(wrapped)), dict(expected)) is None
    optimizer = make_optimizers(wrapped, "adam")
    state = ours.get_optimizer_state_dict(wrapped, optimizer)["state"]
    assert state.keys() == {fqn for fqn, _ in plain.named_parameters()}
    changed = {key: torch.ones_like(value) for key, value in expected.items()}
    assert ours.set_model_state_dict(wrapped, changed) == ([], [])
    assert difference(dict(ours.get_model_state_dict(wrapped)), changed) is None


class Hiding(nn.Module):
    """Shows the parameters of a child as its own."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(2, 2)
        self._register_state_dict_hook(
            lambda module, state, prefix, _: (
                [state.update({key.replace("hidden.", ""): state.pop(key)}) for key in list(state) if "hidden." in key]
                and None
            )
        )
        self._register_load_state_dict_pre_hook(
            lambda state, prefix, *_: [
                state.update({f"{prefix}hidden.{name}": state.pop(prefix + name)})
                for name in ("weight", "bias")
                if prefix + name in state
            ]
        )

    def names(self):
        return {"weight": "hidden", "bias": "hidden"}


def test_children_that_hide_themselves():
    model = nn.Sequential(Hiding())
    optimizer = torch.optim.Adam(model.parameters())
    options = StateDictOptions(dsd_fqn_modifiers="names")
    state, optimizer_state = ours.get_state_dict(model, optimizer, options=options)
    assert set(state) == set(optimizer_state["state"]) == {"0.weight", "0.bias"}
    fresh = nn.Sequential(Hiding())
    fresh_optimizer = torch.optim.Adam(fresh.parameters())
    ours.set_state_dict(
        fresh, fresh_optimizer, model_state_dict=state, optim_state_dict=optimizer_state, options=options
    )
    assert difference(dict(ours.get_model_state_dict(fresh)), dict(state)) is None


@pytest.mark.parametrize("functions", [ours, theirs])
def test_submodules_and_frozen_parameters(functions):
    model = Net(frozen=True)
    keep = functions.StateDictOptions(ignore_frozen_params=True)
    cut = functions.StateDictOptions(keep_submodule_prefixes=False)
    with pytest.warns(FutureWarning):
        kept = functions.get_model_state_dict(model, submodules={model.inner}, options=keep)
    with pytest.warns(FutureWarning):
        cut_off = functions.get_model_state_dict(model, submodules={model.last}, options=cut)
    assert "inner.0.weight" not in kept
    assert all(key.startswith("inner.") for key in kept)
    assert set(cut_off) == {"weight", "bias"}
    fresh = Net()
    with pytest.warns(FutureWarning):
        functions.set_model_state_dict(fresh, {fresh.last: cut_off}, options=functions.StateDictOptions(strict=False))
    assert fresh.last.weight.equal(model.last.weight)


def test_nothing_is_shared_after_setting_and_nothing_given_is_changed():
    model = Net()
    optimizers = make_optimizers(model, "adam")
    train(model, optimizers, 1, seed=1)
    state, optimizer_state = ours.get_state_dict(model, optimizers)
    before = copy.deepcopy((dict(state), optimizer_state))
    fresh = checkpoint_wrapper(Net())
    fresh_optimizers = make_optimizers(fresh, "adam")
    ours.set_state_dict(fresh, fresh_optimizers, model_state_dict=state, optim_state_dict=optimizer_state)
    train(fresh, fresh_optimizers, 2, seed=3)
    assert difference(before, (dict(state), optimizer_state)) is None


def test_parameters_on_the_meta_device_get_memory():
    model = Net()
    with torch.device("meta"):
        blank = Net()
    blank.inner[0] = nn.Linear(6, 5)
    kept = blank.inner[0].weight
    assert ours.set_model_state_dict(blank, ours.get_model_state_dict(model)) == ([], [])
    assert difference(dict(ours.get_model_state_dict(blank)), dict(ours.get_model_state_dict(model))) is None
    assert blank.inner[0].weight is kept
    assert blank.last.weight.data_ptr() != model.last.weight.data_ptr()
