"""Setting state dicts in one process: what is taken, what is refused, and what then has changed."""

import copy
import dataclasses
import inspect
import re

import pytest
import torch
import torch.distributed.checkpoint.state_dict as theirs
from state_dict_models import Net, difference, make_optimizers, train, whole_state
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import reference.state_dict as ours
from reference.state_dict import StateDictOptions

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_regrouped_parameters_and_several_optimizers_without_state():
    model = Net()
    state = ours.get_optimizer_state_dict(model, make_optimizers(model, "sgd", num_optimizers=2))
    one = make_optimizers(model, "sgd-momentum")[0]
    ours.set_optimizer_state_dict(model, one, state)
    assert one.param_groups[0]["momentum"] == 0
    state["param_groups"][1]["lr"] = 7.0
    with pytest.raises(RuntimeError, match=r"one value of 'lr'.*0\.05 for 'inner\.0\.weight' and 7\.0"):
        ours.set_optimizer_state_dict(model, one, state)


def test_groups_without_parameters_keep_their_settings():
    model = nn.Linear(2, 2)

    def make(lr):
        return torch.optim.SGD([{"params": [], "lr": lr}, {"params": list(model.parameters()), "lr": 2 * lr}])

    optimizer = make(0.1)
    ours.set_optimizer_state_dict(model, optimizer, ours.get_optimizer_state_dict(model, make(0.3)))
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.6]
    flat = ours.get_optimizer_state_dict(model, make(0.4), options=FLAT)
    ours.set_optimizer_state_dict(model, optimizer, flat)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.8]


def without(key):
    def change(state, optimizer_state):
        del state[key]

    return change


def unexpected(state, optimizer_state):
    state["foo.bar"] = torch.ones(1)


def reshaped(state, optimizer_state):
    state["last.weight"] = torch.ones(2, 2)


def no_state(state, optimizer_state):
    del optimizer_state["state"]["last.weight"]


def no_entry(state, optimizer_state):
    del optimizer_state["state"]["last.weight"]["exp_avg"]


def no_group(state, optimizer_state):
    optimizer_state["param_groups"][0]["params"].remove("last.weight")


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("last.weight"), "'last.weight' in the model state dict but it is missing"),
        (unexpected, "'foo.bar'"),
        (reshaped, "(6, 6) for 'last.weight' but got (2, 2)"),
        (no_state, "'state.last.weight."),
        (no_entry, "'state.last.weight.exp_avg'"),
        (no_group, "'last.weight' in the saved param_groups"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_before_anything_changes(change, message, is_full):
    torch.manual_seed(0)
    model, fresh = Net(), Net()
    optimizers, fresh_optimizers = (make_optimizers(one, "adam") for one in (model, fresh))
    for one in ((model, optimizers), (fresh, fresh_optimizers)):
        train(*one, 1, seed=1)
    state, optimizer_state = copy.deepcopy(ours.get_state_dict(model, optimizers))
    change(state, optimizer_state)
    before = whole_state(fresh, fresh_optimizers)
    with pytest.raises(RuntimeError, match=re.escape(message)) as raised:
        ours.set_state_dict(
            fresh,
            fresh_optimizers,
            model_state_dict=state,
            optim_state_dict=optimizer_state,
            options=StateDictOptions(full_state_dict=is_full),
        )
    assert "\n" not in str(raised.value)
    assert difference(before, whole_state(fresh, fresh_optimizers)) is None
    if change is not reshaped:
        ours.set_state_dict(
            fresh,
            fresh_optimizers,
            model_state_dict=state,
            optim_state_dict=optimizer_state,
            options=StateDictOptions(full_state_dict=is_full, strict=False),
        )
        assert fresh.inner[0].weight.equal(model.inner[0].weight)


def test_missing_and_unexpected_keys_are_as_torch_returns_them():
    for make in (Net, lambda: checkpoint_wrapper(Net())):
        results = []
        for functions in (ours, theirs):
            state = dict(functions.get_model_state_dict(make()))
            del state["last.bias"]
            state["foo"] = torch.ones(1)
            results.append(
                functions.set_model_state_dict(make(), state, options=functions.StateDictOptions(strict=False))
            )
        assert results[0] == results[1]
        assert [len(keys) for keys in results[0]] == [1, 1]


def test_usage_errors():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="full_state_dict=True"):
        ours.get_model_state_dict(model, options=StateDictOptions(broadcast_from_rank0=True))
    with pytest.raises(RuntimeError, match="at least one optimizer"):
        ours.get_optimizer_state_dict(model, ())
    with pytest.raises(ValueError, match=r"parameter 0 of SGD, of shape \(2, 2\)"):
        ours.get_optimizer_state_dict(model, torch.optim.SGD(nn.Linear(2, 2).parameters()))
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match=r"by FQN but got 0.*load_state_dict"):
        ours.set_optimizer_state_dict(model, optimizer, optimizer.state_dict())
    with pytest.raises(RuntimeError, match="empty state dict"):
        ours.set_model_state_dict(model, {})
    assert ours.set_model_state_dict(model, {}, options=StateDictOptions(strict=False)) == ([], [])


def test_names_and_signatures_are_torchs():
    assert set(ours.__all__) == set(theirs.__all__)
    assert [(f.name, f.default) for f in dataclasses.fields(StateDictOptions)] == [
        (f.name, f.default) for f in dataclasses.fields(theirs.StateDictOptions)
    ]
    for name in ours.__all__:
        if name[0].islower():
            mine, yours = (inspect.signature(getattr(module, name)) for module in (ours, theirs))
            assert [(p.name, p.kind, p.default) for p in mine.parameters.values()] == [
                (p.name, p.kind, p.default) for p in yours.parameters.values()
            ]


def test_what_is_shared_by_two_places_has_two_names():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, layer)
    optimizer = torch.optim.Adam(model.parameters())
    state, optimizer_state = copy.deepcopy(ours.get_state_dict(model, optimizer))
    assert set(state) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert set(optimizer_state["state"]) == {"0.weight", "0.bias"}
    optimizer_state["state"] = {key.replace("0", "1"): value for key, value in optimizer_state["state"].items()}
    optimizer_state["param_groups"][0]["params"] = ["1.weight", "1.bias"]
    wrapped = nn.Sequential(checkpoint_wrapper(layer), checkpoint_wrapper(layer))
    ours.set_state_dict(wrapped, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    assert len(optimizer.state) == 2
