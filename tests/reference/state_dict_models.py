"""Small modules and optimizers for the tests of state dicts, and how to compare and train them."""

import itertools

import torch
from torch import nn
from torch.distributed.tensor import DTensor

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam-tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), amsgrad=True, foreach=False),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, maximize=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adadelta": torch.optim.Adadelta,
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}
ONE_GROUP_ONLY = {"lbfgs", "muon"}


class Net(nn.Module):
    """Two layers; optionally tied weights, a frozen parameter, one that never has a gradient, buffers of both kinds."""

    def __init__(self, tied=False, frozen=False, unused=False):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 6))
        self.last = nn.Linear(6, 6)
        self.also = nn.Linear(6, 6, bias=False)
        if tied:
            self.also.weight = self.last.weight
        if frozen:
            self.inner[0].weight.requires_grad_(False)
        if unused:
            self.extra = nn.Parameter(torch.randn(3, 2))
        self.register_buffer("kept", torch.randn(2))
        self.register_buffer("scratch", torch.randn(2), persistent=False)

    def forward(self, x):
        self.kept.add_(1)
        return self.also(self.last(torch.relu(self.inner(x))))


def make_optimizers(model, name, num_groups=1, num_optimizers=1):
    parameters = list(dict.fromkeys(model.parameters()))
    make = OPTIMIZERS[name]
    if num_optimizers == 2:
        return [make(parameters[:3]), make(parameters[3:])]
    if num_groups == 2 and name not in ONE_GROUP_ONLY:
        return [make([{"params": parameters[:3], "lr": 0.02}, {"params": parameters[3:], "weight_decay": 0.01}])]
    return [make(parameters)]


def train(model, optimizers, num_steps, seed, num_features=6):
    generator = torch.Generator().manual_seed(seed)
    losses = []  # in hexadecimal: a NaN is then equal to itself
    for _ in range(num_steps):
        x = torch.randn(4, num_features, generator=generator)

        def closure(x=x):
            model.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).item().hex() for optimizer in optimizers])
    return losses


def snapshot(tree):
    """A copy; `copy.deepcopy` cannot copy a DTensor of which this rank holds nothing."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: snapshot(value) for key, value in tree.items()}
    return type(tree)(map(snapshot, tree)) if isinstance(tree, list | tuple) else tree


def whole_state(model, optimizers):
    """A copy of everything that reading a state dict must leave alone."""
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    return snapshot(
        {
            "tensors": {name: tensor.detach() for name, tensor in tensors.items()},
            "grads": {name: parameter.grad for name, parameter in model.named_parameters()},
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "random": torch.get_rng_state(),
        }
    )


def difference(one, other, path=""):
    """Where two trees differ in type, layout or any byte; None if they do not."""
    if isinstance(one, torch.Tensor):
        if type(one) is not type(other) and not (type(one) in PLAIN and type(other) in PLAIN):
            return f"{path}: {type(one)} {type(other)}"
        if isinstance(one, DTensor):
            if one.placements != other.placements or one.device_mesh != other.device_mesh or one.shape != other.shape:
                return f"{path}: {one.placements} {other.placements}"
            return difference(one.to_local(), other.to_local(), path)
        same = one.dtype == other.dtype and one.shape == other.shape and one.device == other.device
        one, other = one.detach().reshape(-1), other.detach().reshape(-1)
        same = same and one.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8))
        return None if same else path
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return (
                f"{path}: {sorted(map(str, one))} {other if not isinstance(other, dict) else sorted(map(str, other))}"
            )
        return next(filter(None, (difference(one[key], other[key], f"{path}.{key}") for key in one)), None)
    if isinstance(one, list | tuple):
        if type(one) is not type(other) or len(one) != len(other):
            return f"{path}: {one} {other}"
        pairs = enumerate(zip(one, other, strict=True))
        return next(filter(None, (difference(a, b, f"{path}.{i}") for i, (a, b) in pairs)), None)
    same = type(one) is type(other) and (one == other or repr(one) == repr(other))  # a NaN is not equal to itself
    return None if same else f"{path}: {one!r} {other!r}"


PLAIN = (torch.Tensor, nn.Parameter)
