"""State dicts of models under FullyShardedDataParallel (FSDP1), which flattens parameters: FSDP itself translates.

While a state dict type is set, its hooks give and take `model.state_dict()` by FQN, and `FSDP.optim_state_dict` does
so for an optimizer. Both communicate: all ranks of the model must call, with the same options. What can go wrong
beforehand is told to all ranks; a rank that fails inside FSDP leaves the others to their timeout.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer

from .collectives import Ok, attempt
from .fqns import ModelNames
from .gather import agree, current_rank
from .initial_state import initial_state
from .optimizer_state import GROUPS, PARAMS, STATE, SavedOptimizer

__all__ = ["flat_context", "has_flat_parameters", "load_flat_model", "load_flat_optimizers", "read_flat_optimizer"]


def has_flat_parameters(model: nn.Module) -> bool:
    """Whether some part of `model` is wrapped in FSDP1."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


@contextmanager
def flat_context(model: nn.Module, *, is_full: bool, cpu_offload: bool) -> Iterator[None]:
    """Let FSDP give and take whole tensors, or its ShardedTensors or DTensors.

    Args:
        model: with FSDP1 somewhere in it.
        is_full: whole tensors.
        cpu_offload: on the CPU; whole tensors on rank 0 only. FSDP cannot do that for a model that is on the CPU: then
            it gives whole tensors to all ranks.
    """
    cpu_offload = cpu_offload and any(p.device.type not in ("cpu", "meta") for p in model.parameters())
    model_config: Any = ShardedStateDictConfig(offload_to_cpu=cpu_offload)
    optimizer_config: Any = ShardedOptimStateDictConfig(offload_to_cpu=cpu_offload)
    if is_full:
        model_config = FullStateDictConfig(offload_to_cpu=cpu_offload, rank0_only=cpu_offload)
        optimizer_config = FullOptimStateDictConfig(offload_to_cpu=cpu_offload, rank0_only=cpu_offload)
    kind = StateDictType.FULL_STATE_DICT if is_full else StateDictType.SHARDED_STATE_DICT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # FSDP1 is deprecated, which whoever uses it knows
        with FullyShardedDataParallel.state_dict_type(model, kind, model_config, optimizer_config):
            yield


def read_flat_optimizer(model: nn.Module, optimizer: Optimizer, names: ModelNames) -> dict[str, Any]:
    """Return the state of `optimizer` by FQN, within a `flat_context`; parameters without state get their first."""
    own = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group[PARAMS]]
    # A parameter of which this rank holds nothing has no state here, and FSDP counts on that.
    held = {n: p for n, p in enumerate(parameters) if p.requires_grad and p.numel()}
    without = [number for number, parameter in held.items() if not optimizer.state.get(parameter)]
    initial = initial_state(optimizer) if without else {}
    own[STATE].update((number, initial[held[number]]) for number in without if held[number] in initial)
    found = FullyShardedDataParallel.optim_state_dict(model, optimizer, own, group=_group(model)) or {}
    state = {_plain(fqn, names): entries for fqn, entries in found.get(STATE, {}).items()}
    groups = [{**group, PARAMS: [_plain(fqn, names) for fqn in group[PARAMS]]} for group in found.get(GROUPS, ())]
    return {STATE: state, GROUPS: groups}


def load_flat_model(model: nn.Module, names: ModelNames, state: dict[str, Any], *, strict: bool) -> _IncompatibleKeys:
    """Load `state`, by FQN, within a `flat_context`.

    Raises:
        RuntimeError: a key is missing or unexpected, or a value does not fit; part may have been loaded by then.
    """
    # The innermost module that answers to a name is the one whose keys are in the state dict.
    key_prefixes = {place.fqn_prefix: place.key_prefix for place in names.modules}

    def key_of(fqn: str) -> str:
        prefix = fqn
        while prefix == fqn or prefix not in key_prefixes:
            prefix = prefix[: prefix.rstrip(".").rfind(".") + 1]
        return key_prefixes[prefix] + fqn[len(prefix) :]

    incompatible: _IncompatibleKeys = model.load_state_dict(
        {key_of(fqn): value for fqn, value in state.items()}, strict=strict
    )
    return incompatible


def load_flat_optimizers(
    model: nn.Module, optimizers: tuple[Optimizer, ...], names: ModelNames, saved: SavedOptimizer, *, strict: bool
) -> None:
    """Load what `read_flat_optimizer` returned, within a `flat_context`; nothing changes if an entry is missing.

    Raises:
        RuntimeError: something is missing, on this rank.
        CheckpointException: on another rank.
    """
    prepared = attempt(
        current_rank(), "set_state_dict", lambda: [_own_part(one, names, saved, strict) for one in optimizers]
    )
    agree("set_state_dict", Ok() if isinstance(prepared, Ok) else prepared, [_group(model)])
    assert isinstance(prepared, Ok)
    for optimizer, part in zip(optimizers, prepared.value, strict=True):
        converted = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, part, group=_group(model))
        optimizer.load_state_dict(converted)


def _own_part(optimizer: Optimizer, names: ModelNames, saved: SavedOptimizer, strict: bool) -> dict[str, Any]:
    """Return what `saved` has for the parameters of `optimizer`, in its groups."""
    state: dict[str, Any] = {}
    groups = []
    initial: Callable[[], dict[Any, Any]] = cache(lambda: initial_state(optimizer))
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != PARAMS}
        fqns = []
        for parameter in group[PARAMS]:
            for fqn in _fqns_of(parameter, names):
                fqns.append(fqn)
                if fqn in saved.settings:
                    settings.update(saved.settings[fqn])
                elif strict:
                    raise RuntimeError(f"Expected {fqn!r} in the saved param_groups but it is missing.")
                if fqn in saved.state:
                    state[fqn] = saved.state[fqn]
                elif strict and parameter.requires_grad and initial().get(parameter):
                    raise RuntimeError(
                        f"Expected {STATE}.{fqn} in the optimizer state but it is missing. "
                        "Pass StateDictOptions(strict=False) to load what is there."
                    )
        groups.append({**settings, PARAMS: fqns})
    return {STATE: state, GROUPS: groups}


def _fqns_of(parameter: torch.Tensor, names: ModelNames) -> list[str]:
    """Return the FQNs of a parameter, or of all that have been flattened into it."""
    known = names.of(parameter)
    if not known:
        raise ValueError(
            f"Expected parameters of the model but one of shape {tuple(parameter.shape)} is not. Make the optimizer "
            "from the model's parameters, after wrapping it."
        )
    return known if isinstance(parameter, FlatParameter) else known[:1]


def _plain(fqn: str, names: ModelNames) -> str:
    # FSDP knows of itself and of activation checkpointing, not of torch.compile.
    return names.fqn(fqn)


def _group(model: nn.Module) -> dist.ProcessGroup | None:
    """Return the group in which FSDP gathers; None, the default one, if it is several."""
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            group = module.process_group
            is_hybrid = "HYBRID" in module.sharding_strategy.name
            return None if is_hybrid or isinstance(group, tuple) else group
    return None
