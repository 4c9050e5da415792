"""The state of a training loop as plain data, read from modules and optimizers themselves. Runs on ranks.

Nothing here calls a function that is under test, nor anything collective: each rank tells what it holds, and of which
part of the whole tensor that is, by the arithmetic of :mod:`dcpbench.geometry`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardedAlong
from torch.distributed.tensor.placement_types import _StridedShard

from dcpbench import objects
from dcpbench.geometry import Region, full_region, runs_of, split, split_strided
from dcpbench.models.observed import Shard, State
from dcpbench.ranks.materialize import tensor_bytes

__all__ = ["Place", "digests_of", "leaves_of_loop", "leaves_of_state_dict", "places_of", "state_of"]

Place = tuple[str, nn.Module, str]
"""A name in the model, the module that has it, and the attribute there."""

Leaves = Iterator[tuple[str, Any]]


def places_of(model: nn.Module) -> tuple[list[Place], list[Place], list[Place]]:
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
    places: tuple[list[Place], list[Place], list[Place]],
    optimizers: Iterable[torch.optim.Optimizer],
    schedulers: Iterable[Any],
) -> Leaves:
    """Yields key and value of everything that a training loop keeps, as :class:`State` names it."""
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
    """Yields key and value of what a state dict says of model and optimizers, as :class:`State` names it.

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
    """Returns what :class:`State` calls a key of a flat state dict; a key of no known parameter stays as it is."""
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


def state_of(leaves: Leaves) -> State:
    """Returns ``leaves`` as plain data."""
    state = State()
    for key, value in leaves:
        if isinstance(value, torch.Tensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            dtype = str(value.dtype).removeprefix("torch.")
            state.tensors[key] = Shard(dtype, tuple(value.shape), _region(value), tensor_bytes(local))
        else:
            state.objects[key] = objects.encode(value)
    return state


def digests_of(leaves: Leaves) -> dict[str, str]:
    """Returns a digest of what this rank holds under each key, by key."""
    found = {}
    for key, value in leaves:
        if isinstance(value, torch.Tensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            data = f"{value.dtype}{tuple(value.shape)}".encode() + tensor_bytes(local)
        else:
            data = repr(objects.encode(value)).encode()
        found[key] = hashlib.blake2b(data, digest_size=8).hexdigest()
    return found


def _region(tensor: torch.Tensor) -> Region:
    """Returns which part of the whole tensor this rank holds.

    Source: documentation of the placements in ``torch.distributed.tensor``.
    """
    if not isinstance(tensor, DTensor):
        return full_region(tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "each rank of a training case is in its mesh"
    indices: list[Any] = [range(size) for size in tensor.shape]
    for place, size, placement in zip(coordinate, tensor.device_mesh.shape, tensor.placements, strict=True):
        if isinstance(placement, _StridedShard):
            indices[placement.dim] = split_strided(indices[placement.dim], int(placement.split_factor), size, place)
        elif isinstance(placement, ShardedAlong):
            indices[placement.dim] = split(indices[placement.dim], size, place)
        else:
            assert placement.is_replicate(), f"a state holds no {placement}"
    region = Region(tuple(runs_of(along) for along in indices))
    assert region.shape == tuple(tensor.to_local().shape), f"{tensor.placements}: {region.shape}"
    return region
