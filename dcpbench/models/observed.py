"""What ranks report of a training case: states as plain data. Travels from ranks to the controller."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dcpbench.geometry import Region

__all__ = ["Shard", "State", "TrainingView"]


@dataclass(frozen=True)
class Shard:
    """What one rank holds of one tensor.

    Attributes:
        shape: of the whole tensor.
        region: which part of it this is.
        data: its bytes, row-major.
    """

    dtype: str
    shape: tuple[int, ...]
    region: Region
    data: bytes


@dataclass(frozen=True)
class State:
    """The state of a training loop, or what a state dict says of it, on one rank.

    Keys read ``model/<fqn>``, ``optim/state/<fqn>/<entry>``, ``optim/group/<fqn>/<setting>``, ``sched/…`` and ``rng``;
    a parameter with several names goes by the first in the optimizers' part.

    Attributes:
        objects: values that are no tensors, encoded by :mod:`dcpbench.objects`.
    """

    tensors: dict[str, Shard] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingView:
    """What one rank saw of one step of a training case.

    Attributes:
        held: the loop's own state: when it was read, or after a load has set it.
        read: what the state dict says; None for a load.
        changed: keys of the loop's state that reading has changed.
        losses: of the steps after that, as hexadecimal floats.
        ends: a digest of what this rank then holds under each key.
        losses_alone, ends_alone: the same of a run in which no state was read; empty for a save and a load.
        restored: the loop's state after what was read has been set again; None if it was not.
        losses_restored, ends_restored: of the steps after that.
        tied: keys of the loop's state that changed when the tensors that had been set were written over.
        spoiled: paths in the state dict where setting it has changed it.
    """

    held: State
    read: State | None = None
    changed: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    ends: dict[str, str] = field(default_factory=dict)
    losses_alone: tuple[str, ...] = ()
    ends_alone: dict[str, str] = field(default_factory=dict)
    restored: State | None = None
    losses_restored: tuple[str, ...] = ()
    ends_restored: dict[str, str] = field(default_factory=dict)
    tied: tuple[str, ...] = ()
    spoiled: tuple[str, ...] = ()
