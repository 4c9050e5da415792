"""Walking through a nested state dict by paths: what `flatten` does, as functions for planners of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from .flatten import Path, flatten
from .leaves import PlanningError

__all__ = [
    "flatten_sharded_tensors",
    "flatten_state_dict",
    "get_element",
    "print_tensor",
    "set_element",
    "traverse_state_dict",
    "unflatten_state_dict",
]


def flatten_state_dict(state_dict: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return the leaves by FQN, and each leaf's path: mapping keys as text, list positions as numbers.

    Raises:
        FlattenError: two leaves have the same FQN.

    Source: torch.distributed.checkpoint._nested_dict.
    """
    flat = flatten(state_dict)
    return dict(flat.leaves), {fqn: path for fqn, path in flat.paths.items() if fqn in flat.leaves}


def unflatten_state_dict(state_dict: Mapping[str, Any], mapping: Mapping[str, Path]) -> dict[str, Any]:
    """Return the nested form of the leaves `state_dict`, with plain dicts and lists for containers."""
    nested: dict[str, Any] = {}
    for fqn, value in state_dict.items():
        set_element(nested, mapping[fqn], value)
    return nested


def traverse_state_dict(
    state_dict: Mapping[Any, Any],
    visitor: Callable[[Path, Any], None],
    keep_traversing: Callable[[Any], bool] | None = lambda value: isinstance(value, torch.Tensor),
) -> None:
    """Call `visitor` with the path and the value of each leaf.

    Mappings are entered; so are lists that hold, at any depth of lists, a mapping or a value worth it.

    Args:
        state_dict: nested mappings and lists.
        visitor: gets `(path, value)`.
        keep_traversing: whether a value in a list is worth entering the list; default: tensors are; None: no value is.
    """

    def is_entered(value: Any) -> bool:
        return isinstance(value, list) and any(
            isinstance(entry, Mapping) or is_entered(entry) or (keep_traversing is not None and keep_traversing(entry))
            for entry in value
        )

    def visit(path: Path, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, entry in value.items():
                visit((*path, str(key)), entry)
        elif is_entered(value):
            for position, entry in enumerate(value):
                visit((*path, position), entry)
        else:
            visitor(path, value)

    visit((), state_dict)


def set_element(root_dict: dict[str, Any], path: Path, value: Any) -> None:
    """Put `value` into `root_dict` at `path`; dicts and lists on the way are made, lists filled up with None.

    Raises:
        PlanningError: something that is no container is in the way.
    """
    place: Any = root_dict
    for step, (key, following) in enumerate(zip(path, [*path[1:], None], strict=True)):
        if isinstance(place, list) and isinstance(key, int):
            place.extend([None] * (key + 1 - len(place)))
        elif not isinstance(place, Mapping):
            raise PlanningError(f"Expected a container at {path[:step]!r} but got a {type(place).__qualname__}.")
        if following is None:
            place[key] = value
            return
        held = place.get(key) if isinstance(place, Mapping) else place[key]
        if held is None:
            held = place[key] = [] if isinstance(following, int) else {}
        place = held


def get_element(root_dict: Mapping[str, Any], path: Path, default_value: Any = None) -> Any:
    """Return what is at `path`, or `default_value` if nothing is."""
    place: Any = root_dict
    for key in path:
        if isinstance(key, int):
            if not isinstance(place, list) or key >= len(place):
                return default_value
        elif not isinstance(place, Mapping) or key not in place:
            return default_value
        place = place[key]
    return place


def print_tensor(path: Path, value: Any, print_fun: Callable[[str], None] = print) -> None:
    """Print what kind of leaf is at `path`, and its shape: a visitor for `traverse_state_dict`."""
    _print(str(path), value, print_fun)


def flatten_sharded_tensors(state_dict: Mapping[Any, Any]) -> dict[str, Any]:
    """Return `state_dict` with its containers copied; in torch, `_flatten_sharded_tensors`.

    Nothing needs flattening: a ShardedTensor inside another is described by its own boxes (see `layout`).
    """
    copied: dict[str, Any] = {}
    traverse_state_dict(state_dict, lambda path, value: set_element(copied, path, value))
    return copied


def _print(prefix: str, value: Any, print_fun: Callable[[str], None]) -> None:
    if isinstance(value, ShardedTensor):
        print_fun(f"{prefix} ShardedTensor size: {value.size()}")
        for shard in value.local_shards():
            _print(f"{shard.metadata.shard_offsets} ", shard.tensor, print_fun)
    elif isinstance(value, DTensor):
        print_fun(f"{prefix} DistributedTensor size: {value.size()}")
        _print("", value.to_local(), print_fun)
    elif isinstance(value, torch.Tensor):
        print_fun(f"{prefix} Tensor size: {value.size()}")
    else:
        print_fun(f"{prefix} Type: {type(value)}")
