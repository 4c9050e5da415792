"""Runs on a rank: objects that a state dict may hold beside tensors and values, and that do something when asked."""

from __future__ import annotations

from typing import Any

__all__ = ["Keeper", "Unsavable"]


class Unsavable:
    """A value that raises when it is pickled, or copied."""

    def __reduce_ex__(self, protocol: object) -> str:
        raise RuntimeError("dcpbench: this value cannot be pickled")


class Keeper:
    """A ``Stateful``: gives out a dict that it made anew, and takes what is loaded.

    Attributes:
        held: its state, as a plain dict.
        fails: it raises when it is asked for its state.
    """

    def __init__(self, held: dict[Any, Any], *, fails: bool = False) -> None:
        self.held = held
        self.fails = fails

    def state_dict(self) -> dict[Any, Any]:
        if self.fails:
            raise RuntimeError("dcpbench: this Stateful has no state to give")
        return dict(self.held)

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        self.held = dict(state_dict)
