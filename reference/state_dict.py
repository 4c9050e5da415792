"""State dicts of models and optimizers under FQNs, whatever wraps or shards them: what checkpoints hold.

    get   model.state_dict(), optimizer.state_dict()  -->  `fqns`, `optimizer_state`  -->  `gather` if asked for
    set   the other way; all is checked and cut to shape first, and loaded last

Reading changes nothing: an optimizer that has no state yet is asked on a throw-away copy (`initial_state`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer

from .collectives import Ok, attempt
from .flat_parameters import (
    flat_context,
    has_flat_parameters,
    load_flat_model,
    load_flat_optimizers,
    read_flat_optimizer,
)
from .fqns import ModelNames
from .gather import (
    Announced,
    Pending,
    agree,
    announce,
    current_rank,
    gather_tree,
    map_tree,
    meshes_of,
    realize,
    travel_device,
)
from .model_state import apply_model, by_fqn, prepare_model, read_model
from .optimizer_state import SavedOptimizer, apply_optimizer, flatten_optimizer, prepare_optimizer, read_optimizer

__all__ = [  # noqa: RUF022  # in plain alphabetical order, as everywhere here
    "DictValueType",
    "FQNS_T",
    "ListDictValueType",
    "OptimizerStateType",
    "PrimitiveType",
    "StateDictOptions",
    "ValueType",
    "get_model_state_dict",
    "get_optimizer_state_dict",
    "get_state_dict",
    "set_model_state_dict",
    "set_optimizer_state_dict",
    "set_state_dict",
]

SETTING = "set_state_dict"
Reader = Callable[[Optimizer, ModelNames], dict[str, Any]]

FQNS_T = set[str]
PrimitiveType = DTensor | ShardedTensor | torch.Tensor | int | float | str
ValueType = PrimitiveType | list[PrimitiveType] | tuple[PrimitiveType] | dict[str, "ValueType"]
DictValueType = dict[str, ValueType]
ListDictValueType = list[DictValueType]
OptimizerStateType = dict[str, DictValueType | ListDictValueType]


@dataclass
class StateDictOptions:
    """How state dicts are made and loaded; fields and defaults are torch's.

    Args:
        full_state_dict: whole tensors in place of DTensors; all ranks that share a mesh must call together to get them.
            To set them, no rank needs another.
        cpu_offload: tensors go to the CPU; with `full_state_dict`, only rank 0 gets them and others get empty dicts.
        ignore_frozen_params: leave out parameters that do not require gradients; pass `strict=False` to set the result.
        keep_submodule_prefixes: with `submodules`, False cuts their names off the keys.
        strict: setting raises if something is missing or, in the model, unexpected.
        broadcast_from_rank0: to set, only rank 0 has the state; `full_state_dict` must be True as well, and all ranks
            of the default group must call. Only one whole tensor at a time is held.
        flatten_optimizer_state_dict: one key per value of the optimizer state, for ranks with different parameters.
            Setting takes either form.
        dsd_fqn_modifiers: the method by which a module says which child its state dict hides: `{name: hidden child}`.

    Source: torch.distributed.checkpoint.state_dict.StateDictOptions.
    """

    full_state_dict: bool = False
    cpu_offload: bool = False
    ignore_frozen_params: bool = False
    keep_submodule_prefixes: bool = True
    strict: bool = True
    broadcast_from_rank0: bool = False
    flatten_optimizer_state_dict: bool = False
    dsd_fqn_modifiers: str = "_fqn_modifiers"


def get_model_state_dict(
    model: nn.Module,
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> dict[str, ValueType]:
    """Return the model's state by FQN; the tensors are the model's own unless gathered or offloaded.

    See `get_state_dict`.
    """
    return _get(model, (), submodules, options)[0]


def get_optimizer_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> OptimizerStateType:
    """Return the optimizers' state by FQN, merged into one.

    See `get_state_dict`.
    """
    return _get(model, _some(optimizers), submodules, options, with_model=False)[1]


def get_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> tuple[dict[str, ValueType], OptimizerStateType]:
    """Return the state of model and optimizers by FQN, ready to be saved or loaded into.

    Nothing in model, optimizers or random number generators changes. Each parameter that requires gradients is in the
    optimizer state: one that has no state yet, since no step was taken or it had no gradient, comes with the state that
    it would begin with. With `full_state_dict`, all ranks that share a mesh must call this; a rank that fails never
    leaves another waiting.

    Args:
        model: plain, or under DDP, fully_shard, parallelize_module, torch.compile, activation checkpointing; or under
            FullyShardedDataParallel (FSDP1), see `flat_parameters`.
        optimizers: of parameters of `model`; may be none.
        submodules: deprecated: leave out what is not in these.
        options: see `StateDictOptions`.

    Returns:
        The model's state; and `{"state": {fqn: entries}, "param_groups": [{"params": [fqn], ...}]}`, or its flat form;
        `{}` without optimizers.

    Raises:
        ValueError: an optimizer has a parameter that is not in the model.
        RuntimeError: an optimizer has no state and cannot tell what it would begin with.
        CheckpointException: with `full_state_dict`: another rank failed; it derives from `BaseException`, as in torch.

    Source: torch.distributed.checkpoint.state_dict.get_state_dict.
    """
    return _get(model, _as_tuple(optimizers), submodules, options)


def set_model_state_dict(
    model: nn.Module,
    model_state_dict: dict[str, ValueType],
    *,
    options: StateDictOptions | None = None,
) -> _IncompatibleKeys:
    """Load the model's state and return missing and unexpected keys.

    See `set_state_dict`.
    """
    return _set(model, (), model_state_dict, {}, options)


def set_optimizer_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    optim_state_dict: OptimizerStateType,
    *,
    options: StateDictOptions | None = None,
) -> None:
    """Load the optimizers' state.

    See `set_state_dict`.
    """
    _set(model, _some(optimizers), None, optim_state_dict, options)


def set_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    model_state_dict: dict[str, ValueType],
    optim_state_dict: OptimizerStateType,
    options: StateDictOptions | None = None,
) -> _IncompatibleKeys:
    """Load the state of model and optimizers, and return missing and unexpected keys of the model.

    What does not fit is refused before anything changes, except where a module has load hooks of its own. The state
    dicts stay as they are and share no memory with model or optimizers afterwards.

    Args:
        model: may be wrapped and sharded otherwise than the model that was saved; parameters on the meta device get
            real memory.
        optimizers: may group parameters otherwise, as long as those in one group were saved with the same settings.
        model_state_dict: by FQN; DTensors where the model has DTensors, or whole tensors with `full_state_dict`; empty
            for the optimizers alone.
        optim_state_dict: nested or flat.
        options: see `StateDictOptions`.

    Raises:
        RuntimeError: something is missing, unexpected or of another shape; the message names the key.
        ValueError: options or state dicts that make no sense.
        CheckpointException: with `broadcast_from_rank0`: another rank failed.

    Source: torch.distributed.checkpoint.state_dict.set_state_dict.
    """
    found = _as_tuple(optimizers)
    may_be_empty = options is not None and (options.broadcast_from_rank0 or not options.strict)
    if not model_state_dict and not may_be_empty and model.state_dict():
        found = _some(found)
    return _set(model, found, model_state_dict or None, optim_state_dict, options)


def _get(
    model: nn.Module,
    optimizers: tuple[Optimizer, ...],
    submodules: set[nn.Module] | None,
    options: StateDictOptions | None,
    *,
    with_model: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    options = _checked(options)
    if submodules:
        _warn("submodules", "Filter the keys of the returned state dict instead.")

    def make(read: Reader = read_optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        names = ModelNames(model, options.dsd_fqn_modifiers)
        state: dict[str, Any] = {}
        if with_model:
            prefixes = names.prefixes_of(submodules) if submodules else None
            state = read_model(
                model,
                names,
                prefixes=prefixes,
                keep_prefixes=options.keep_submodule_prefixes,
                ignore_frozen=options.ignore_frozen_params,
            )
        return state, _read_optimizers(optimizers, names, options, read)

    if has_flat_parameters(model):
        with torch.no_grad(), flat_context(model, is_full=options.full_state_dict, cpu_offload=options.cpu_offload):
            state, optimizer_state = make(lambda optimizer, names: read_flat_optimizer(model, optimizer, names))
        if options.cpu_offload and options.full_state_dict and current_rank():
            return {}, {}
        return (_on_cpu(state), _on_cpu(optimizer_state)) if options.cpu_offload else (state, optimizer_state)
    with torch.no_grad():
        if options.full_state_dict:
            tensors = chain(model.parameters(), model.buffers())
            full: tuple[dict[str, Any], dict[str, Any]] = gather_tree(
                "get_state_dict", make, meshes_of(tensors), cpu_offload=options.cpu_offload
            )
            return full
        state, optimizer_state = make()
        if options.cpu_offload:
            return _on_cpu(state), _on_cpu(optimizer_state)
        return state, optimizer_state


def _read_optimizers(
    optimizers: tuple[Optimizer, ...], names: ModelNames, options: StateDictOptions, read: Reader
) -> dict[str, Any]:
    if not optimizers:
        return {}
    merged: dict[str, Any] = {"state": {}, "param_groups": []}
    for optimizer in optimizers:
        one = read(optimizer, names)
        merged["state"].update(one["state"])
        merged["param_groups"] += one["param_groups"]
    return flatten_optimizer(merged) if options.flatten_optimizer_state_dict else merged


def _set(
    model: nn.Module,
    optimizers: tuple[Optimizer, ...],
    state: dict[str, Any] | None,
    optimizer_state: dict[str, Any],
    options: StateDictOptions | None,
) -> _IncompatibleKeys:
    """Load; `state` None leaves the model alone."""
    options = _checked(options)
    names = ModelNames(model, options.dsd_fqn_modifiers)
    device = travel_device(model)
    given: Any = (state, optimizer_state)
    sent: list[Any] = []
    if options.broadcast_from_rank0:
        given, sent = announce(SETTING, given)
    if has_flat_parameters(model):
        return _set_flat(model, optimizers, names, realize(map_tree(_taken_whole, given), given, sent, device), options)

    def prepare() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        entries: dict[str, Any] = {}
        if given[0] is not None:
            if not given[0] and options.strict and model.state_dict():
                raise RuntimeError(
                    "Expected the state of the model but got an empty state dict. Pass StateDictOptions(strict=False)."
                )
            entries = prepare_model(model, names, _by_fqn(given[0], names), device, strict=options.strict)
        return entries, _prepare_optimizers(optimizers, names, given[1], strict=options.strict)

    with torch.no_grad():
        if options.broadcast_from_rank0 and dist.is_initialized():
            attempted = attempt(current_rank(), SETTING, prepare)
            agree(SETTING, Ok() if isinstance(attempted, Ok) else attempted, [None])
            assert isinstance(attempted, Ok)
            prepared = attempted.value
        else:
            prepared = prepare()
        entries, by_optimizer = realize(prepared, given, sent, device)
        for optimizer, one in zip(optimizers, by_optimizer, strict=True):
            apply_optimizer(optimizer, one)
        if not given[0]:
            return _IncompatibleKeys([], [])
        versions = None if options.broadcast_from_rank0 else getattr(state, "_metadata", None)
        return apply_model(model, names, entries, versions, strict=options.strict)


def _set_flat(
    model: nn.Module, optimizers: tuple[Optimizer, ...], names: ModelNames, given: Any, options: StateDictOptions
) -> _IncompatibleKeys:
    state, saved = given[0], SavedOptimizer.parse(given[1], names) if optimizers else None
    with torch.no_grad(), flat_context(model, is_full=options.full_state_dict, cpu_offload=False):
        if saved is not None:
            load_flat_optimizers(model, optimizers, names, saved, strict=options.strict)
        keyed = _by_fqn(state, names) if state else None
        return load_flat_model(model, names, keyed, strict=options.strict) if keyed else _IncompatibleKeys([], [])


def _taken_whole(leaf: Any) -> Any:
    return Pending("", leaf, None) if isinstance(leaf, Announced) else leaf


def _by_fqn(state: dict[Any, Any], names: ModelNames) -> dict[str, Any]:
    keyed = by_fqn(state, names)
    if keyed is not state:
        _warn("state dicts by submodule", "Put the submodules' names before the keys.")
    return keyed


def _prepare_optimizers(
    optimizers: tuple[Optimizer, ...], names: ModelNames, state: dict[str, Any], *, strict: bool
) -> list[dict[str, Any]]:
    if not optimizers:
        return []
    if not state:
        raise RuntimeError("Expected the state of the optimizers but got an empty state dict.")
    saved = SavedOptimizer.parse(state, names)
    wanted = sum(not group["params"] for optimizer in optimizers for group in optimizer.param_groups)
    if strict and not saved.is_flat and wanted != len(saved.empty_groups):
        raise RuntimeError(
            f"Expected {wanted} parameter groups without parameters but {len(saved.empty_groups)} were saved. "
            "Pass StateDictOptions(strict=False) to keep the optimizer's own settings."
        )
    empty = iter(saved.empty_groups if wanted == len(saved.empty_groups) else ())
    return [prepare_optimizer(optimizer, names, saved, empty, strict=strict) for optimizer in optimizers]


def _checked(options: StateDictOptions | None) -> StateDictOptions:
    options = options or StateDictOptions()
    if options.broadcast_from_rank0 and not options.full_state_dict:
        raise ValueError("Expected full_state_dict=True with broadcast_from_rank0=True but got full_state_dict=False.")
    return options


def _as_tuple(optimizers: Optimizer | Iterable[Optimizer]) -> tuple[Optimizer, ...]:
    return (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)


def _some(optimizers: Optimizer | Iterable[Optimizer]) -> tuple[Optimizer, ...]:
    found = _as_tuple(optimizers)
    if not found:
        raise RuntimeError("Expected at least one optimizer but got none.")
    return found


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    on_cpu: dict[str, Any] = map_tree(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, state)
    return on_cpu


def _warn(what: str, remedy: str) -> None:
    warnings.warn(f"torch has deprecated {what}. {remedy}", FutureWarning, stacklevel=4)
