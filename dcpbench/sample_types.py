"""Types such as training programs define for themselves, for values of cases: enumerations, a record, settings.

They stand in a module that every rank can import, since pickled values name their classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntFlag
from typing import Any, NamedTuple

__all__ = ["Betas", "Parts", "Phase", "Progress"]


class Phase(Enum):
    """Where a run stands."""

    WARMUP = "warmup"
    DECAY = 2


class Parts(IntFlag):
    """What is trained; a value may be any combination."""

    BODY = 1
    HEAD = 2


class Betas(NamedTuple):
    """Two settings of an optimizer."""

    first: Any
    second: Any


@dataclass
class Progress:
    """How far a run has come."""

    step: Any
    history: list[Any] = field(default_factory=list)
