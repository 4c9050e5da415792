"""What was seen of a `ProtocolCase`: plain frozen data, from the process of the virtual ranks to the judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dcpbench.geometry import Box
from dcpbench.messages import ChunkTable

__all__ = ["Filled", "Planned", "ProtocolSeen", "RankEnd", "StepSeen"]


@dataclass(frozen=True)
class RankEnd:
    """How a virtual rank ended a step.

    Attributes:
        outcome: it returned, raised, was stopped for good, or waits for ever.
        error: type and text of what it raised.
        kind: the type's name alone.
        blames: the ranks that the error names.
    """

    outcome: Literal["ok", "raised", "died", "stuck"]
    error: str = ""
    kind: str = ""
    blames: tuple[int, ...] = ()


@dataclass(frozen=True)
class Planned:
    """An item of a rank's final plan to save, and what the planner gave for it, each time that it was asked."""

    fqn: str
    rank: int
    box: Box | None
    data: tuple[bytes, ...] = ()
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Filled:
    """A box that a rank wanted in a load, after it.

    Attributes:
        part: of storage cases, the number of the step's part; of planner cases, the number of the leaf.
        data: its bytes, row-major; None where it is gone, or no tensor any more.
        num_read: elements that the read items of the rank have for it.
        is_committed: each tensor that was filled was handed to ``commit_tensor``, whole, and was not changed after.
    """

    part: int
    rank: int
    data: bytes | None
    num_read: int = 0
    is_committed: bool = True


@dataclass(frozen=True)
class StepSeen:
    """A step.

    Attributes:
        ends: by rank.
        is_halted: the call at which a rank was to stop was made.
        is_finishing: the coordinator had begun to commit.
        planned: items of all final plans, as the storage got them.
        results: FQN, offsets and rank of each result that the storage reported; None where it gave none of that kind.
        strays: requests to the planner for what is not in the plan.
        tables: what the metadata says of tensors.
        order: the ranks in the order of their turns.
        problem: why ranks wait for ever, or ask for different collectives.
    """

    ends: tuple[RankEnd, ...]
    is_halted: bool = False
    is_finishing: bool = False
    planned: tuple[Planned, ...] = ()
    results: tuple[tuple[str, tuple[int, ...] | None, int], ...] | None = None
    strays: tuple[str, ...] = ()
    tables: tuple[ChunkTable, ...] = ()
    filled: tuple[Filled, ...] = ()
    order: tuple[int, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class ProtocolSeen:
    """A run: its steps, up to the first that did not end as it was to end.

    Attributes:
        unsupported: why the backend cannot be run so; "" where it can.
        in_order: the same with ranks that go on one after the other, where the run shows a broken rule.
        anew: the same with new objects in each step, where the run shows a broken rule and reuses them.
    """

    steps: tuple[StepSeen, ...] = ()
    unsupported: str = ""
    in_order: tuple[StepSeen, ...] | None = None
    anew: tuple[StepSeen, ...] | None = None
