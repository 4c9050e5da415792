"""Nested state dict <-> leaves named by FQN.

First step of every save and load: the planner sees a flat `{fqn: leaf}`, and each leaf remembers the container and
the real key it came from, so that a loaded value goes back exactly there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["FlatStateDict", "FlattenError", "Slot", "flatten"]

Path = tuple[str | int, ...]


class FlattenError(ValueError):
    """A state dict that cannot be given one name per leaf."""


@dataclass(frozen=True)
class Slot:
    """Where a leaf lives: `container[key]`, with the key as the caller wrote it (not its `str`)."""

    container: Any
    key: Any

    @property
    def is_writable(self) -> bool:
        """Whether the container takes item assignment."""
        return isinstance(self.container, MutableMapping | list)

    def put(self, value: Any) -> None:
        """Replace the leaf in its own container."""
        self.container[self.key] = value


@dataclass
class FlatStateDict:
    """The leaves of a nested state dict.

    Args:
        leaves: FQN -> value, in the order of the traversal.
        paths: FQN -> path, with mapping keys as `str` and list positions as `int`. This is what DCP stores as
            `planner_data`. Empty mappings have a path here and no leaf: they hold nothing to store, yet a reader
            that rebuilds the nesting needs to know of them.
        slots: FQN -> where the leaf lives.
    """

    leaves: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)
    _origins: dict[str, tuple[Any, ...]] = field(default_factory=dict, repr=False)

    def _claim(self, path: Path, origin: tuple[Any, ...]) -> str:
        fqn = ".".join(map(str, path))
        if fqn in self._origins:
            raise FlattenError(
                f"Expected one leaf per FQN but got {fqn!r} from {_spell(self._origins[fqn])} and from "
                f"{_spell(origin)}. Rename one of them."
            )
        self._origins[fqn] = origin
        self.paths[fqn] = path
        return fqn


def flatten(state_dict: Mapping[Any, Any], *, is_whole: Callable[[str], bool] | None = None) -> FlatStateDict:
    """Return the leaves of `state_dict`.

    Mappings are always entered. A list is entered only if it holds a tensor or a mapping, at any depth of nested
    lists; otherwise it is one leaf. Tuples, and everything else, are leaves.

    Args:
        state_dict: nested mappings and lists; may be empty.
        is_whole: given an FQN, says whether the checkpoint stores that subtree as one object, as PyTorch before 2.4
            did with mappings that hold no tensor. Such a subtree is then one leaf.

    Raises:
        FlattenError: two leaves have the same FQN (keys `1` and `"1"`, or `"a.b"` and `a` -> `b`).

    Source: torch.distributed.checkpoint._traverse (2.4 and later).
    """
    flat = FlatStateDict()
    _walk(flat, (), (), state_dict, is_whole)
    return flat


def _walk(
    flat: FlatStateDict,
    path: Path,
    origin: tuple[Any, ...],
    container: Any,
    is_whole: Callable[[str], bool] | None,
) -> None:
    for key, value in _entries(container):
        child_path = (*path, key if isinstance(container, list) else str(key))
        child_origin = (*origin, key)
        if (isinstance(value, Mapping) or _is_entered(value)) and not (
            is_whole is not None and is_whole(".".join(map(str, child_path))) and not _holds_tensor(value)
        ):
            if not value:
                flat._claim(child_path, child_origin)
            _walk(flat, child_path, child_origin, value, is_whole)
        else:
            fqn = flat._claim(child_path, child_origin)
            flat.leaves[fqn] = value
            flat.slots[fqn] = Slot(container, key)


def _entries(container: Any) -> Iterator[tuple[Any, Any]]:
    return iter(container.items()) if isinstance(container, Mapping) else enumerate(container)


def _is_entered(value: Any) -> bool:
    return isinstance(value, list) and any(
        isinstance(entry, torch.Tensor | Mapping) or _is_entered(entry) for entry in value
    )


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensor(entry) for entry in value.values())
    if isinstance(value, list):
        return any(_holds_tensor(entry) for entry in value)
    return isinstance(value, torch.Tensor)


def _spell(origin: tuple[Any, ...]) -> str:
    return "state_dict" + "".join(f"[{key!r}]" for key in origin)
