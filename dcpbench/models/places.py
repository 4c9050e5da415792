"""Where a model keeps its state, and everything that a training loop keeps, under keys of one form. Runs on ranks.

Keys read ``model/<fqn>``, ``optim/state/<fqn>/<entry>``, ``optim/group/<fqn>/<setting>``, ``sched/…`` and ``rng``; a
parameter with several names goes by the first in the optimizers' part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["Leaves", "Places", "leaves_of_loop", "leaves_of_state_dict", "places_of"]

Place = tuple[str, nn.Module, str]
"""A name in the model, the module that has it, and the attribute there."""

Places = tuple[list[Place], list[Place], list[Place]]
"""Of the parameters, of the persistent buffers and of the extra states of a model."""

Leaves = Iterator[tuple[str, Any]]


def places_of(model: nn.Module) -> Places:
    """Returns where a model that nothing wraps yet has its parameters, its persistent buffers and its extra states.

    The places stay when the model becomes parallel, although what is found there does not.
    """
    parameters: list[Place] = []
    buffers: list[Place] = []
    extras: list[Place] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        dotted = f"{prefix}." if prefix else ""
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        parameters += [(f"{dotted}{name}", module, name) for name in own]
        kept = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        buffers += [(f"{dotted}{name}", module, name) for name in kept]
        if hasattr(module, "set_extra_state") and type(module).get_extra_state is not nn.Module.get_extra_state:
            extras.append((f"{dotted}_extra_state", module, "get_extra_state"))
    return parameters, buffers, extras


def leaves_of_loop(
    places: Places,
    optimizers: Iterable[torch.optim.Optimizer],
    schedulers: Iterable[Any],
) -> Leaves:
    """Yields key and value of everything that a training loop keeps, by key."""
    parameters, buffers, extras = places
    names: dict[int, str] = {}
    for fqn, module, name in parameters:
        parameter = module._parameters[name]
        names.setdefault(id(parameter), fqn)
        yield f"model/{fqn}", parameter
    for fqn, module, name in buffers:
        yield f"model/{fqn}", module._buffers[name]
    for fqn, module, _ in extras:
        yield f"model/{fqn}", module.get_extra_state()
    for optimizer in optimizers:
        for trained, state in optimizer.state.items():
            yield from _flat(f"optim/state/{names[id(trained)]}", state)
        for group in optimizer.param_groups:
            for trained in group["params"]:
                yield from _settings(names[id(trained)], group)
    for number, scheduler in enumerate(schedulers):
        yield from _flat(f"sched/{number}", scheduler.state_dict())
    yield "rng", torch.get_rng_state()


def leaves_of_state_dict(state_dict: Mapping[str, Any], names: Mapping[str, str]) -> Leaves:
    """Yields key and value of what a state dict says of model and optimizers, by key.

    Args:
        state_dict: ``model`` and ``optim``, as the functions return them; the optimizers' may be flat.
        names: from each name of a parameter to its first.
    """
    for fqn, value in state_dict.get("model", {}).items():
        yield f"model/{fqn}", value
    optim = state_dict.get("optim", {})
    if "state" not in optim:
        for key, value in optim.items():
            yield from _flat(_unflattened(key, names), value)
        return
    for fqn, state in optim["state"].items():
        yield from _flat(f"optim/state/{names.get(fqn, fqn)}", state)
    for group in optim["param_groups"]:
        for fqn in group["params"]:
            yield from _settings(names.get(fqn, fqn), group)


def _unflattened(key: str, names: Mapping[str, str]) -> str:
    """Returns what a key of a flat state dict is called here; a key of no known parameter stays as it is."""
    section, _, rest = key.partition(".")
    fitting = [fqn for fqn in names if rest.startswith(f"{fqn}.")]
    if section not in _SECTIONS or not fitting:
        return key
    fqn = max(fitting, key=len)
    return f"{_SECTIONS[section]}/{names[fqn]}/{rest[len(fqn) + 1 :].replace('.', '/')}"


_SECTIONS = {"state": "optim/state", "param_groups": "optim/group"}


def _settings(fqn: str, group: Mapping[str, Any]) -> Leaves:
    for key, value in group.items():
        if key not in ("params", "param_names"):
            yield f"optim/group/{fqn}/{key}", value


def _flat(prefix: str, value: Any) -> Leaves:
    """Yields the leaves of nested dicts, and of lists and tuples that hold tensors."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}/{key}", inner)
    elif isinstance(value, list | tuple) and any(isinstance(inner, torch.Tensor) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(f"{prefix}/{number}", inner)
    else:
        yield prefix, value
