"""Optimizer state under FQNs, and back: what `get_optimizer_state_dict` returns and `set_optimizer_state_dict` takes.

optimizer.state_dict(): parameters by number  <-->  nested: parameters by FQN  <-->  flat: one key per value
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .fqns import ModelNames
from .gather import Announced, Pending, map_tree
from .initial_state import copied, initial_state

__all__ = ["SavedOptimizer", "apply_optimizer", "flatten_optimizer", "prepare_optimizer", "read_optimizer"]

GROUPS = "param_groups"
PARAMS = "params"
STATE = "state"
EXACT = "exact"
OWN_ENTRIES = (PARAMS, "param_names")
"""What a parameter group holds beside its hyperparameters: it stays the optimizer's own on loading."""


def read_optimizer(optimizer: Optimizer, names: ModelNames) -> dict[str, Any]:
    """Return the state of `optimizer` by FQN; a parameter that has none yet gets what it would begin with.

    Tensors are the optimizer's own, dicts are new.

    Raises:
        ValueError: a parameter of the optimizer is not in the model.
    """
    own = optimizer.state_dict()
    parameters = _parameters(optimizer)
    fqns = [_first_fqn(optimizer, number, parameter, names) for number, parameter in enumerate(parameters)]
    without = [parameter for parameter in parameters if parameter.requires_grad and not optimizer.state.get(parameter)]
    initial = initial_state(optimizer) if without else {}
    for number, parameter in enumerate(parameters):
        if not own[STATE].get(number) and parameter.requires_grad and parameter in initial:
            own[STATE][number] = initial[parameter]
    for key, value in initial.items():
        if not isinstance(key, torch.Tensor):
            own[STATE].setdefault(key, value)
    state = {
        fqns[key] if isinstance(key, int) and key < len(fqns) else key: dict(value)
        if isinstance(value, dict)
        else value
        for key, value in own[STATE].items()
    }
    groups = [{**group, PARAMS: [fqns[number] for number in group[PARAMS]]} for group in own[GROUPS]]
    return {STATE: state, GROUPS: groups}


def flatten_optimizer(nested: dict[str, Any]) -> dict[str, Any]:
    """Return `state.<fqn>.<entry>` and `param_groups.<fqn>.<hyperparameter>` keys; a group without parameters has none.

    Source: `StateDictOptions.flatten_optimizer_state_dict`: for ranks that hold different parts of a model.
    """
    flat: dict[str, Any] = {}

    def put(key: str, value: Any) -> None:
        if key in flat:
            raise ValueError(f"Expected one value per flattened key but got two for {key!r}. Rename one entry.")
        flat[key] = value

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        else:
            put(prefix, value)

    walk(STATE, nested[STATE])
    for group in nested[GROUPS]:
        for fqn in group[PARAMS]:
            for key, value in group.items():
                if key != PARAMS:
                    put(f"{GROUPS}.{fqn}.{key}", value)
    return flat


@dataclass
class SavedOptimizer:
    """A saved optimizer state, looked at by FQN.

    Args:
        state: FQN -> entries.
        settings: FQN -> hyperparameters of the group that it was in.
        empty_groups: hyperparameters of groups without parameters.
        is_flat: nested keys inside `state` have become strings.
    """

    state: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    empty_groups: list[dict[str, Any]]
    is_flat: bool

    @classmethod
    def parse(cls, saved: dict[str, Any], names: ModelNames) -> SavedOptimizer:
        """Read either form that `get_optimizer_state_dict` returns.

        Raises:
            ValueError: neither form, or parameters by number.
        """
        if STATE not in saved:
            return _parse_flat(saved, set(chain.from_iterable(names.parameters.values())))
        if GROUPS not in saved:
            raise ValueError(f"Expected the keys 'state' and 'param_groups' but got {sorted(map(str, saved))}.")
        settings, empty_groups = {}, []
        for group in saved[GROUPS]:
            hyperparameters = {key: value for key, value in group.items() if key not in OWN_ENTRIES}
            if not group[PARAMS]:
                empty_groups.append(hyperparameters)
            for fqn in group[PARAMS]:
                if not isinstance(fqn, str):
                    raise ValueError(
                        f"Expected parameters by FQN but got {fqn!r} in param_groups. "
                        "What optimizer.state_dict() returned goes to optimizer.load_state_dict()."
                    )
                settings[fqn] = hyperparameters
        return cls(saved[STATE], settings, empty_groups, is_flat=False)


def _parse_flat(saved: dict[str, Any], fqns: set[str]) -> SavedOptimizer:
    state: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in saved.items():
        section, _, rest = str(key).partition(".")
        if section not in (STATE, GROUPS):
            raise ValueError(f"Expected keys that begin with 'state.' or 'param_groups.' but got {key!r}.")
        fqn = _longest_prefix(rest, fqns)
        if fqn is None:
            if section == STATE:  # of no parameter of this model; may be of an optimizer as a whole
                _put_nested(state, rest.split("."), value, str(key))
        elif section == GROUPS:
            if rest[len(fqn) + 1 :] not in OWN_ENTRIES:
                settings.setdefault(fqn, {})[rest[len(fqn) + 1 :]] = value
        else:
            _put_nested(state.setdefault(fqn, {}), rest[len(fqn) + 1 :].split("."), value, str(key))
    return SavedOptimizer(state, settings, [], is_flat=True)


def _longest_prefix(key: str, fqns: set[str]) -> str | None:
    end = key.rfind(".")
    while end > 0:
        if key[:end] in fqns:
            return key[:end]
        end = key.rfind(".", 0, end)
    return None


def _put_nested(tree: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ValueError(f"Expected {key!r} or its beginning as a key but got both.")
    tree[path[-1]] = value


def prepare_optimizer(
    optimizer: Optimizer, names: ModelNames, saved: SavedOptimizer, empty: Iterable[dict[str, Any]], *, strict: bool
) -> dict[str, Any]:
    """Return what `apply_optimizer` takes: `saved` with parameters by number; nothing has changed yet.

    Whole tensors for entries that this rank holds in part become `Pending`.

    Args:
        optimizer: says which parameters, in which groups; these may differ from the groups that were saved.
        names: of the model.
        saved: may have more than `optimizer` needs.
        empty: hyperparameters for the groups without parameters, in order.
        strict: refuse if something is missing; otherwise it stays as it is.

    Raises:
        RuntimeError: a parameter or an entry is missing, or a group's parameters were saved with different settings.
    """
    empty, numbers = iter(empty), iter(range(len(_parameters(optimizer))))
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != PARAMS}
        settings.update(_settings(group, names, saved, strict) if group[PARAMS] else next(empty, {}))
        groups.append({**copied(settings), PARAMS: [next(numbers) for _ in group[PARAMS]]})

    initial = cache(lambda: initial_state(optimizer, groups))
    state: dict[Any, Any] = {}
    exact: dict[int, list[Any]] = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        fqns = _known(optimizer, number, parameter, names)
        fqn = next((fqn for fqn in fqns if fqn in saved.state), fqns[0])
        own = optimizer.state.get(parameter) or {}
        entries = _entries(fqn, parameter, own, saved, initial, strict=strict)
        if entries:
            state[number] = entries
        exact[number] = [key for key in entries if _has_dtype_of_its_own(key, entries[key], parameter, own, initial)]
    shared: dict[Any, Any] = {key: value for key, value in optimizer.state.items() if not isinstance(key, torch.Tensor)}
    if saved.state.keys() - set(chain.from_iterable(names.parameters.values())):
        shared = {key: value for key, value in initial().items() if not isinstance(key, torch.Tensor)} | shared
    for key, value in shared.items():
        state[key] = _placed(str(key), saved.state.get(key, value), value)
    return {STATE: state, GROUPS: groups, EXACT: exact}


def apply_optimizer(optimizer: Optimizer, prepared: dict[str, Any]) -> None:
    """Load what `prepare_optimizer` made; dtypes and devices become what the optimizer wants them to be."""
    optimizer.load_state_dict({STATE: prepared[STATE], GROUPS: prepared[GROUPS]})
    for number, parameter in enumerate(_parameters(optimizer)):
        for key, value in prepared[STATE].get(number, {}).items():
            if isinstance(value, str | bytes):  # `Optimizer.load_state_dict` takes these apart, as it does lists
                optimizer.state[parameter][key] = value
        for key in prepared[EXACT][number]:  # which it has made those of the parameter
            loaded = optimizer.state[parameter]
            loaded[key] = prepared[STATE][number][key].to(loaded[key].device)


def _has_dtype_of_its_own(
    key: Any, value: Any, parameter: torch.Tensor, own: dict[Any, Any], initial: Callable[[], dict[Any, Any]]
) -> bool:
    """Whether `value` keeps its dtype, such as float32 for a running product beside parameters in bfloat16."""
    source = value.source if isinstance(value, Pending) else value
    if not isinstance(source, torch.Tensor | Announced):
        return False
    if not source.dtype.is_floating_point or source.dtype == parameter.dtype:
        return False
    like = own[key] if key in own else initial().get(parameter, {}).get(key)
    return key != "step" and isinstance(like, torch.Tensor) and like.dtype == source.dtype


def _settings(group: dict[str, Any], names: ModelNames, saved: SavedOptimizer, strict: bool) -> dict[str, Any]:
    """Return the hyperparameters with which the parameters of `group` were saved."""
    found: dict[str, dict[str, Any]] = {}
    for parameter in group[PARAMS]:
        fqns = names.of(parameter)
        fqn = next((fqn for fqn in fqns if fqn in saved.settings), None)
        if fqn is not None:
            found[fqn] = saved.settings[fqn]
        elif strict and fqns:
            raise RuntimeError(
                f"Expected {fqns[0]!r} in the saved param_groups but it is missing. "
                "Pass StateDictOptions(strict=False) to keep the optimizer's own settings."
            )
    first: tuple[str, dict[str, Any]] | None = next(iter(found.items()), None)
    if first is None:
        return {}
    for fqn, settings in found.items():
        for key in settings.keys() | first[1].keys():
            if not _is_same(settings.get(key), first[1].get(key)):
                raise RuntimeError(
                    f"Expected one value of {key!r} for all parameters of a group but got {first[1].get(key)!r} for "
                    f"{first[0]!r} and {settings.get(key)!r} for {fqn!r}. Group the parameters as they were saved."
                )
    return first[1]


def _entries(
    fqn: str,
    parameter: torch.Tensor,
    own: dict[Any, Any],
    saved: SavedOptimizer,
    initial: Callable[[], dict[Any, dict[Any, Any]]],
    *,
    strict: bool,
) -> dict[Any, Any]:
    """Return the state entries of one parameter: those that were saved, and its own for what is missing."""
    given = saved.state.get(fqn)
    if given is None or own.keys() - given.keys():
        expected = initial().get(parameter, {}) if strict and parameter.requires_grad else {}
        missing = [key for key in expected if given is None or key not in given]
        if missing:
            raise RuntimeError(
                f"Expected {'.'.join([STATE, fqn, str(missing[0])])!r} in the optimizer state but it is missing. "
                "Pass StateDictOptions(strict=False) to load what is there."
            )
        given = {**({} if strict and given is not None else own), **(given or {})}

    entries = {}
    for key, value in given.items():
        like = None
        if _needs_pattern(value, parameter, saved):
            like = own[key] if key in own else initial().get(parameter, {}).get(key)
        entries[key] = _placed(f"{fqn}.{key}", value, like)
    return entries


def _needs_pattern(value: Any, parameter: torch.Tensor, saved: SavedOptimizer) -> bool:
    """Whether `value` may be whole where this rank holds a part, or may have lost the types of its keys."""
    if isinstance(value, dict):
        return saved.is_flat or isinstance(parameter, DTensor)
    whole = isinstance(value, Announced) or (
        isinstance(value, torch.Tensor) and value.dim() > 0 and not isinstance(value, DTensor)
    )
    return whole and isinstance(parameter, DTensor)


def _placed(name: str, value: Any, like: Any) -> Any:
    """Return a copy of `value` in the layout of `like`, which may be None; dicts get the key types of `like` too."""
    if isinstance(value, dict):
        known = like if isinstance(like, dict) else {}
        originals = {str(key): key for key in known}
        keys = {key: key if key in known else originals.get(key, key) for key in value}
        return {keys[key]: _placed(f"{name}.{key}", inner, known.get(keys[key])) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return map_tree(lambda leaf: _placed(name, leaf, None), value)
    target = like if isinstance(like, DTensor) else None
    if isinstance(value, Announced) or (
        target is not None and isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
    ):
        return Pending(name, value, target)
    return copied(value)


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    """Return the parameters in the order in which `Optimizer.state_dict` numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group[PARAMS]]


def _first_fqn(optimizer: Optimizer, number: int, parameter: torch.Tensor, names: ModelNames) -> str:
    return _known(optimizer, number, parameter, names)[0]


def _known(optimizer: Optimizer, number: int, parameter: torch.Tensor, names: ModelNames) -> list[str]:
    fqns = names.of(parameter)
    if not fqns:
        raise ValueError(
            f"Expected parameters of the model but parameter {number} of {type(optimizer).__name__}, of shape "
            f"{tuple(parameter.shape)}, is not one. Make the optimizer from the model's parameters, after sharding it."
        )
    return fqns


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        return both and (one is other or torch.equal(one, other))
    return bool(one is other or one == other)
