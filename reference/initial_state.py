"""The state that an optimizer would begin with, found out on a throw-away copy.

Optimizers make their state in their first step, but a checkpoint needs it before: as what to load into. Here that step
is taken by a copy of the optimizer on copies of the parameters, with zero gradients; what counts is the first value
that each entry is given. Model, optimizer, gradients, hooks and random number generators stay as they are.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from .gather import map_tree

__all__ = ["copied", "initial_state"]

Group = dict[str, Any]


def copied(tree: Any) -> Any:
    """Return `tree` with its tensors copied, so that neither side sees what the other does to them."""
    return map_tree(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def initial_state(optimizer: Optimizer, settings: list[Group] | None = None) -> dict[Any, Any]:
    """Return the state that `optimizer` would begin with: for each parameter, what its entries are first set to.

    A parameter without state is left out; state of the whole optimizer has its own key. If the optimizer communicates
    in its step (Muon on DTensors does), all ranks must call this.

    Args:
        optimizer: any; its class's `step` runs, without hooks, on copies of all its parameters.
        settings: hyperparameters to use instead of its own, one dict per parameter group.

    Raises:
        RuntimeError: the optimizer cannot take a step on copies of its parameters with zero gradients.
    """
    try:
        with torch.no_grad(), ExitStack() as stack:
            _keep_random_state(optimizer, stack)
            throw_away, originals = _throw_away_copy(optimizer, settings)
            _step(throw_away)
    except Exception as error:
        raise RuntimeError(
            f"Expected a first step on a copy of {type(optimizer).__name__} but got {type(error).__name__}: {error}. "
            "Call its step() before getting its state."
        ) from error
    first: dict[Any, Any] = throw_away.state.first_values()
    return {originals.get(key, key): state for key, state in first.items() if state != {}}


class _FirstValues(dict[Any, Any]):
    """One parameter's state; remembers what each entry was first set to, since steps then change it in place."""

    def __init__(self, values: Any = ()) -> None:
        super().__init__()
        self._first: dict[Any, Any] = {}
        self.update(values)

    def __setitem__(self, key: Any, value: Any) -> None:
        if key not in self._first:
            self._first[key] = copied(value)
        super().__setitem__(key, value)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def first_values(self) -> dict[Any, Any]:
        # A dict inside the state may have been filled after it was put there.
        return {key: value if isinstance(value, dict) else self._first[key] for key, value in self.items()}


class _States(defaultdict[Any, Any]):
    """The state of all parameters; may also have entries that are nobody's in particular."""

    def __init__(self) -> None:
        super().__init__(_FirstValues)
        self._first = _FirstValues()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(value) is dict:
            value = _FirstValues(value)
        self._first[key] = value
        super().__setitem__(key, value)

    def first_values(self) -> dict[Any, Any]:
        first = self._first.first_values()
        return {
            key: value.first_values() if isinstance(value, _FirstValues) else first[key] for key, value in self.items()
        }


def _throw_away_copy(
    optimizer: Optimizer, settings: list[Group] | None
) -> tuple[Any, dict[torch.Tensor, torch.Tensor]]:
    """Return a copy of `optimizer` without state or hooks, and the original of each of its parameters."""
    result: Any = object.__new__(type(optimizer))
    # What `deepcopy` meets goes where this says: parameters to their stand-ins, the optimizer itself to its copy.
    memo: dict[int, Any] = {id(optimizer): result}
    originals: dict[torch.Tensor, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            stand_in = torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            if parameter.requires_grad:
                stand_in.grad = _zero_gradient(optimizer, stand_in)
            memo[id(parameter)] = stand_in
            originals[stand_in] = parameter
    memo[id(optimizer.state)] = _States()
    for name, value in vars(optimizer).items():
        if isinstance(value, dist.ProcessGroup | DeviceMesh):
            memo[id(value)] = value
        if name.endswith("_hooks"):
            setattr(result, name, OrderedDict())
        elif not (callable(value) and hasattr(type(optimizer), name)):  # such as a `step` that a scheduler counts
            setattr(result, name, copy.deepcopy(value, memo))
    for position, group in enumerate(result.param_groups):
        if settings is not None:
            group.update(copied({key: value for key, value in settings[position].items() if key != "params"}))
        if "weight_decay" in group:
            group["weight_decay"] = 0  # SGD's momentum begins with the gradient, in which it puts the decay.
    return result, originals


def _zero_gradient(optimizer: Optimizer, parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(optimizer, torch.optim.SparseAdam):
        return torch.zeros_like(parameter).to_sparse()
    return torch.zeros_like(parameter)


def _step(optimizer: Optimizer) -> None:
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):  # the wrapper in which torch calls the hooks of all optimizers
        step = step.__wrapped__
    arguments = list(inspect.signature(step).parameters.values())[1:]
    needs_closure = any(
        argument.default is argument.empty and argument.kind is argument.POSITIONAL_OR_KEYWORD for argument in arguments
    )
    if needs_closure:
        step(optimizer, lambda: torch.zeros(()))
    else:
        step(optimizer)


def _keep_random_state(optimizer: Optimizer, stack: ExitStack) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    devices = {parameter.device for parameter in parameters} - {torch.device("cpu"), torch.device("meta")}
    stack.enter_context(torch.random.fork_rng(devices=[]))
    for device in devices:
        stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
