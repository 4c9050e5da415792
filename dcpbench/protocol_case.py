"""`ProtocolCase`: one generated run of virtual ranks against a storage or a pair of planners, as plain frozen data.

Where a `Case` says what users do, this says what an engine does with the parts that plug into it: which rank plans
which item, in which order the ranks go on, which call fails. It goes to JSON and back, holds no tensor and names no
backend.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from dcpbench import codec
from dcpbench.content import DTYPES, shard_bytes
from dcpbench.geometry import Box, Region
from dcpbench.layout import Layout

__all__ = ["CALLS", "Halt", "ProtocolCase", "ProtocolLeaf", "ProtocolPart", "ProtocolStep"]

CALLS: Final = {
    ("storage", "save"): (
        "set_up_storage_writer",
        "prepare_local_plan",
        "prepare_global_plan",
        "write_data",
        "resolve_data",
        "finish",
    ),
    ("storage", "load"): (
        "read_metadata",
        "set_up_storage_reader",
        "prepare_local_plan",
        "prepare_global_plan",
        "read_data",
        "resolve_tensor",
        "commit_tensor",
        "load_bytes",
    ),
    ("planner", "save"): ("set_up_planner", "create_local_plan", "create_global_plan", "finish_plan"),
    ("planner", "load"): ("set_up_planner", "create_local_plan", "create_global_plan", "finish_plan"),
}
"""The calls at which a rank may be stopped, by what is under test and the action; those of the engine in its order.
A storage itself makes the calls of the planner: `resolve_data`, `resolve_tensor`, `commit_tensor`, `load_bytes`."""

BY_STORAGE: Final = ("resolve_data", "resolve_tensor", "commit_tensor", "load_bytes")
ON_COORDINATOR: Final = ("prepare_global_plan", "create_global_plan", "finish")


@dataclass(frozen=True)
class ProtocolLeaf:
    """A leaf of the flat state dict: a tensor, or an object where ``dtype`` is empty."""

    fqn: str
    shape: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype and self.dtype not in DTYPES:
            raise ValueError(f"expected a dtype such as float32, or none, but got {self.dtype!r}.")


@dataclass(frozen=True)
class ProtocolPart:
    """What one rank writes or wants of a leaf: one item of its plan. A box of an object is None."""

    leaf: int
    rank: int
    box: Box | None = None


@dataclass(frozen=True)
class Halt:
    """Where a rank stops.

    Attributes:
        rank: which.
        call: a name in :data:`CALLS`.
        kind: the call raises an error, or the rank is gone, as if it had been killed.
        when: before the call has done anything, or after it has done all.
    """

    rank: int
    call: str
    kind: Literal["raises", "dies"] = "raises"
    when: Literal["before", "after"] = "before"


@dataclass(frozen=True)
class ProtocolStep:
    """One save or load by virtual ranks.

    Attributes:
        checkpoint: name of the checkpoint; a version of the content is saved, the number of its step.
        parts: of storage cases, the items in the order of the plans, all ranks together.
        layout: of planner cases, how the leaves lie on the ranks.
        has_hints: indices in the plans say which chunk of the tensor they mean.
        schedule: which of the ranks that can go on does so, at each turn, modulo their number; then the first.
        is_fine: ranks take turns at each call, not only where they wait for each other.
        halt: where one of them stops; None where none does.
    """

    action: Literal["save", "load"]
    checkpoint: str = "a"
    world_size: int = 1
    parts: tuple[ProtocolPart, ...] = ()
    layout: Layout | None = None
    has_hints: bool = True
    schedule: tuple[int, ...] = ()
    is_fine: bool = False
    halt: Halt | None = None

    misuse: ClassVar[str] = "none"

    @property
    def saves(self) -> bool:
        return self.action == "save"


@dataclass(frozen=True)
class ProtocolCase:
    """One generated run.

    Attributes:
        part: what is under test: a storage pair, or a pair of planners.
        reuse: writers, readers and planners are kept from one step to the next, by each rank.
    """

    part: Literal["storage", "planner"]
    seed: int
    leaves: tuple[ProtocolLeaf, ...]
    steps: tuple[ProtocolStep, ...]
    reuse: bool = False

    max_world_size: ClassVar[int] = 1
    """Real ranks that a run takes: all virtual ones live in one."""

    def __post_init__(self) -> None:
        for step in self.steps:
            if (step.layout is None) != (self.part == "storage"):
                raise ValueError("expected a layout in each step of planners, and in none of a storage.")
            if step.layout is not None and step.layout.world_size != step.world_size:
                raise ValueError(f"expected a layout of {step.world_size} ranks.")
            if any(not 0 <= one.rank < step.world_size or not 0 <= one.leaf < len(self.leaves) for one in step.parts):
                raise ValueError(f"expected parts of {len(self.leaves)} leaves on {step.world_size} ranks.")
            if step.halt is not None and step.halt.call not in CALLS[self.part, step.action]:
                raise ValueError(f"expected a call of a {step.action} but got {step.halt.call!r}.")

    @property
    def id(self) -> str:
        """A readable id: what is under test and eight hex digits of the content."""
        return f"{self.part}-{hashlib.sha256(self.dumps().encode()).hexdigest()[:8]}"

    def content(self, leaf: int, version: int, box: Box | None) -> bytes:
        """Returns the bytes of a box of a leaf, row-major, as step ``version`` saves it; of an object, all of it."""
        one = self.leaves[leaf]
        seed = self.seed * 1_000_003 + version
        if box is None:
            return shard_bytes(seed, one.fqn, (5,), Region((((0, 5),),)), "uint8").tobytes()
        runs = tuple(((offset, size),) if size else () for offset, size in zip(box.offsets, box.sizes, strict=True))
        return shard_bytes(seed, one.fqn, one.shape, Region(runs), one.dtype).tobytes()

    def dumps(self) -> str:
        return json.dumps(codec.to_json(self), indent=1)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """Hypothesis prints a failing case by its id; all of it stands in the file that the failure writes."""
        printer.text(f"<ProtocolCase {self.id}>")
