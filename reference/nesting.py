"""The nesting of a whole state dict: kept beside a converted checkpoint, and rebuilt without a model at hand.

DCP names leaves by text, so its own record of the nesting (`planner_data`) turns the key `1` into `"1"` and every
mapping into a dict. `describe` keeps what that loses; `nest` makes do without.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from .metadata import MetadataError

__all__ = ["LeafNote", "describe", "is_dense", "nest", "rebuild"]


@dataclass(frozen=True)
class LeafNote:
    """What a leaf is beyond its content.

    Args:
        fqn: its name in the checkpoint.
        stride: of a dense tensor that is not contiguous; else None.
        is_parameter: a `torch.nn.Parameter` rather than a plain tensor.
        same_as: FQN of an earlier leaf that is the same memory; else None.
    """

    fqn: str
    stride: tuple[int, ...] | None = None
    is_parameter: bool = False
    same_as: str | None = None


def describe(state_dict: Mapping[Any, Any], leaves: Mapping[str, Any]) -> bytes:
    """Return the containers of `state_dict`, pickled: their classes, keys and attributes, with a note for each leaf.

    Args:
        state_dict: nested mappings and lists.
        leaves: FQN -> value, as `flatten` gives it.
    """
    first_at: dict[Any, str] = {}

    def outline(value: Any, path: tuple[Any, ...]) -> Any:
        fqn = ".".join(map(str, path))
        if path and fqn in leaves and leaves[fqn] is value:
            note = _note(fqn, value, first_at)
            return (note.fqn, note.stride, note.is_parameter, note.same_as)
        # A copy, not a new dict: it keeps the class, and attributes such as a module's `_metadata`.
        shell: Any = copy.copy(value) if isinstance(value, MutableMapping | list) else dict(value)
        for key, entry in _entries(value):
            shell[key] = outline(entry, (*path, key))
        return shell

    return pickle.dumps(outline(state_dict, ()))


def rebuild(raw: bytes, make_leaf: Callable[[LeafNote], Any]) -> Any:
    """Return the state dict that `describe` saw, with what `make_leaf` gives for each leaf.

    Unpickles `raw`: as dangerous as the objects in the checkpoint themselves.

    Raises:
        MetadataError: `raw` is damaged, or names a leaf that `make_leaf` does not know.
    """

    def fill(container: Any) -> Any:
        for key, entry in _entries(container):
            container[key] = make_leaf(LeafNote(*entry)) if isinstance(entry, tuple) else fill(entry)
        return container

    try:
        return fill(pickle.loads(raw))
    except Exception as error:
        raise MetadataError(f"Expected the nesting of a state dict but got unreadable bytes: {error!r}.") from error


def nest(paths: Iterable[tuple[tuple[str | int, ...], Any]]) -> dict[str, Any]:
    """Return nested dicts and lists from `(path, value)` pairs: an `int` in a path is a position in a list.

    Positions that no path names hold None.

    Raises:
        MetadataError: one path passes through another's value.
    """
    # Dicts first, since positions may come in any order: a container is a list if its keys are integers.
    root: dict[Any, Any] = {}
    containers = {id(root): root}
    for path, value in paths:
        place = root
        for key in path[:-1]:
            if key not in place:
                place[key] = {}
                containers[id(place[key])] = place[key]
            place = place[key]
            if id(place) not in containers:
                raise MetadataError(f"Expected a container at {path[:-1]!r} but got a leaf, from the path {path!r}.")
        is_empty = isinstance(value, dict) and not value
        if path[-1] in place and not is_empty:
            raise MetadataError(f"Expected one value per path but got several at {path!r}.")
        place.setdefault(path[-1], value)

    def settled(value: Any) -> Any:
        if id(value) not in containers:
            return value
        done = {key: settled(entry) for key, entry in value.items()}
        if not done or not all(type(key) is int for key in done):
            return done
        return [done.get(position) for position in range(max(done) + 1)]

    return {key: settled(value) for key, value in root.items()}


def _entries(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, Mapping) else enumerate(container))


def _note(fqn: str, value: Any, first_at: dict[Any, str]) -> LeafNote:
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        return LeafNote(fqn)
    stride = tuple(value.stride())
    place = (value.data_ptr(), tuple(value.size()), stride, value.dtype, value.is_conj(), value.is_neg(), type(value))
    earlier = first_at.setdefault(place, fqn) if value.numel() else fqn
    return LeafNote(
        fqn,
        stride if not value.is_contiguous() and is_dense(value.size(), stride) else None,
        type(value) is torch.nn.Parameter,
        None if earlier == fqn else earlier,
    )


def is_dense(size: Iterable[int], stride: Iterable[int]) -> bool:
    """Whether a tensor of this size and stride fills its memory without gaps or overlaps."""
    expected = 1
    for step, length in sorted((step, length) for step, length in zip(stride, size, strict=True) if length != 1):
        if step != expected:
            return False
        expected *= length
    return True
