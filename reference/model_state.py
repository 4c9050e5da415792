"""Model state under FQNs, and back: what `get_model_state_dict` returns and `set_model_state_dict` takes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parameter import is_lazy

from .fqns import ModelNames, NamedModule
from .gather import Announced, Pending

__all__ = ["apply_model", "by_fqn", "prepare_model", "read_model"]


def read_model(
    model: nn.Module,
    names: ModelNames,
    *,
    prefixes: Iterable[str] | None = None,
    keep_prefixes: bool = True,
    ignore_frozen: bool = False,
) -> OrderedDict[str, Any]:
    """Return `model.state_dict()` by FQN; the tensors are the model's own.

    Args:
        model: its own `state_dict` is called, with all hooks.
        names: of `model`.
        prefixes: only FQNs that begin with one of these; None for all.
        keep_prefixes: False cuts the prefix off.
        ignore_frozen: leave out parameters that do not require gradients, under all of their names.
    """
    raw = model.state_dict()
    frozen = {fqn for parameter, fqns in names.parameters.items() if not parameter.requires_grad for fqn in fqns}
    state: OrderedDict[str, Any] = OrderedDict()
    for key, value in raw.items():
        fqn = names.fqn(key)
        prefix = "" if prefixes is None else next((prefix for prefix in prefixes if fqn.startswith(prefix)), None)
        if prefix is None or (ignore_frozen and fqn in frozen):
            continue
        name = fqn if keep_prefixes else fqn[len(prefix) :]
        if name in state:
            raise ValueError(f"Expected one value per FQN but got two for {name!r}. Get one submodule at a time.")
        state[name] = value
    versions = getattr(raw, "_metadata", None)
    if versions is not None and prefixes is None:
        _set_versions(state, {place.fqn_prefix: versions.get(place.path[:-1], {}) for place in names.modules})
    return state


def by_fqn(state: dict[Any, Any], names: ModelNames) -> dict[str, Any]:
    """Return `state` keyed by FQN, where it may be keyed by submodule (deprecated)."""
    if not any(isinstance(key, nn.Module) for key in state):
        return state
    return {
        prefix + name: value
        for module, inner in state.items()
        for prefix in names.prefixes_of([module])
        for name, value in inner.items()
    }


def prepare_model(
    model: nn.Module, names: ModelNames, state: dict[str, Any], device: torch.device, *, strict: bool
) -> dict[str, Any]:
    """Return what `apply_model` takes: `state` by the keys of `model.state_dict()`; nothing has changed yet.

    Whole tensors where the model holds a part become `Pending`. A module that loads in its own way (its class overrides
    `_load_from_state_dict`, or it has hooks before loading) answers for the keys below it.

    Args:
        model: may have parameters on the meta device.
        names: of `model`.
        state: by FQN.
        device: where parameters come to live that are on the meta device.
        strict: refuse missing and unexpected keys.

    Raises:
        RuntimeError: a key is missing or unexpected, or a value does not fit.
    """
    targets = model.state_dict(keep_vars=True)
    keys = {names.fqn(key): key for key in targets}
    own_way = [place for place in names.modules if _loads_in_its_own_way(place.module)]
    if strict:
        missing = [fqn for fqn in keys if fqn not in state and _owner(fqn, own_way) is None]
        unexpected = [fqn for fqn in state if fqn not in keys and _owner(fqn, own_way) is None]
        _refuse("Expected the key {} in the model state dict but it is missing", missing)
        _refuse("Expected keys of the model but got {}", unexpected)
    prepared = {}
    for fqn, value in state.items():
        owner = _owner(fqn, own_way)
        unknown = fqn if owner is None else owner.key_prefix + fqn[len(owner.fqn_prefix) :]
        key = keys.get(fqn, unknown)
        prepared[key] = _fitted(fqn, value, targets.get(key), device, is_checked=owner is None)
    return prepared


def apply_model(
    model: nn.Module, names: ModelNames, prepared: dict[str, Any], versions: dict[str, Any] | None, *, strict: bool
) -> _IncompatibleKeys:
    """Load what `prepare_model` made, and return missing and unexpected keys as `model.load_state_dict` does.

    Args:
        model: parameters on the meta device are replaced, all others keep their identity and memory.
        names: of `model`.
        prepared: by the keys of `model.state_dict()`.
        versions: what `read_model` put on its result as `_metadata`, if it is still there.
        strict: for those modules that load in their own way.
    """
    targets = model.state_dict(keep_vars=True)
    is_meta = {key for key, target in targets.items() if isinstance(target, torch.Tensor) and target.is_meta}
    state: OrderedDict[str, Any] = OrderedDict(prepared)
    if is_meta:
        for key in prepared.keys() & targets.keys() - is_meta:
            if isinstance(targets[key], torch.Tensor):
                targets[key].copy_(prepared[key])
                state[key] = targets[key]
    if versions is not None:
        _set_versions(state, {place.path: versions.get(place.fqn_prefix[:-1], {}) for place in names.modules})
    incompatible: _IncompatibleKeys = model.load_state_dict(state_dict=state, strict=strict, assign=bool(is_meta))
    return incompatible


def _fitted(fqn: str, value: Any, target: Any, device: torch.device, *, is_checked: bool) -> Any:
    """Return `value` ready to be copied into `target`, or pending."""
    if not isinstance(target, torch.Tensor) or is_lazy(target) or not isinstance(value, torch.Tensor | Announced):
        return Pending(fqn, value, None) if isinstance(value, Announced) else value
    is_legacy_scalar = target.dim() == 0 and value.shape == (1,)
    if is_checked and value.shape != target.shape and not is_legacy_scalar:
        raise RuntimeError(f"Expected shape {tuple(target.shape)} for {fqn!r} but got {tuple(value.shape)}.")
    if isinstance(value, DTensor) and not isinstance(target, DTensor):
        raise RuntimeError(f"Expected a whole tensor for {fqn!r} but got a DTensor. Get the full state dict.")
    if isinstance(value, Announced) or (isinstance(target, DTensor) and not isinstance(value, DTensor)):
        return Pending(fqn, value, target if isinstance(target, DTensor) else None)
    if target.is_meta:
        return value.detach().clone() if isinstance(value, DTensor) else value.detach().to(device, copy=True)
    return value


def _loads_in_its_own_way(module: nn.Module) -> bool:
    if type(module)._load_from_state_dict is not nn.Module._load_from_state_dict:
        return True
    hooks = [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]
    # Those that wrappers and sharding put there do not change what a key means.
    return any(not getattr(hook, "__module__", "").startswith("torch.distributed.") for hook in hooks)


def _owner(fqn: str, places: list[NamedModule]) -> NamedModule | None:
    """Return the innermost of `places` that `fqn` lies below."""
    matching = [place for place in places if fqn.startswith(place.fqn_prefix)]
    return max(matching, key=lambda place: len(place.key_prefix), default=None)


def _refuse(sentence: str, fqns: list[str]) -> None:
    if fqns:
        others = f" (and {len(fqns) - 1} more: {fqns[1:4]})" if len(fqns) > 1 else ""
        raise RuntimeError(
            sentence.format(repr(fqns[0])) + others + ". Pass StateDictOptions(strict=False) to load what fits."
        )


def _set_versions(state: OrderedDict[str, Any], by_prefix: dict[str, Any]) -> None:
    # Where `nn.Module.load_state_dict` looks for them.
    state._metadata = OrderedDict((prefix[:-1], dict(value)) for prefix, value in by_prefix.items())  # type: ignore[attr-defined]
