"""`TrainingCase`: one generated training run as plain frozen data, with JSON both ways.

It says what is trained (a tree of blocks), how it lies on ranks, by which optimizers, and at which point of the loop
its state is read, saved and restored, with which options. Like `Case` it holds no tensor and names no backend.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

from dcpbench import codec
from dcpbench.models.tree import ModelSpec

__all__ = [
    "AXES",
    "Form",
    "Group",
    "OptimizerSpec",
    "Parallelism",
    "ParallelismKind",
    "StateOptions",
    "TrainingCase",
    "TrainingStep",
]

ParallelismKind = Literal["alone", "plain", "ddp", "fsdp", "hsdp", "tp", "fsdp_tp", "dp_cp_tp", "hsdp_tp"]

AXES: Final[dict[str, tuple[str, ...]]] = {
    "alone": ("dp",),
    "plain": ("dp",),
    "ddp": ("dp",),
    "fsdp": ("dp",),
    "hsdp": ("dp", "cp"),
    "tp": ("tp",),
    "fsdp_tp": ("dp", "tp"),
    "dp_cp_tp": ("dp", "cp", "tp"),
    "hsdp_tp": ("dp", "cp", "tp"),
}
"""The mesh axes of each kind. ``alone`` is one process without a process group, ``plain`` the same whole model on each
rank; ``dp_cp_tp`` shards over dp and cp as over one axis; ``hsdp`` and ``hsdp_tp`` replicate over dp and shard over cp.
"""

Form = Literal["both", "apart", "stateful", "model", "optimizer"]
"""Which functions are called, and what is saved: get_state_dict; the two functions for model and optimizer;
get_state_dict within a Stateful; model or optimizer alone."""


@dataclass(frozen=True)
class Parallelism:
    """How a model lies on ranks.

    Attributes:
        sizes: of the mesh axes.
        units: what FSDP2 shards as a unit: each block and the model, only the model, or every other block, whose
            parameters alone become shards.
        style: which way a lone linear layer or an embedding is cut by tensor parallelism.
        is_checkpointed: each block at the top recomputes its activations; a wrapper is around it.
    """

    kind: ParallelismKind = "plain"
    sizes: tuple[int, ...] = (1,)
    units: Literal["blocks", "model", "some"] = "blocks"
    style: Literal["column", "row"] = "column"
    is_checkpointed: bool = False

    def __post_init__(self) -> None:
        if len(self.sizes) != len(AXES[self.kind]) or any(size < 1 for size in self.sizes):
            raise ValueError(f"expected sizes of {AXES[self.kind]} but got {self.sizes}.")
        if self.kind == "alone" and self.sizes != (1,):
            raise ValueError(f"expected one process without a process group but got {self.sizes}.")

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    @property
    def distributed(self) -> bool:
        return self.kind != "alone"

    @property
    def shards(self) -> bool:
        """Reads as: FSDP2 is at work."""
        return self.kind in ("fsdp", "hsdp", "fsdp_tp", "dp_cp_tp", "hsdp_tp")

    @property
    def needs_mesh(self) -> bool:
        return self.kind not in ("alone", "plain", "ddp")

    @property
    def tp(self) -> int:
        """The size of the tensor-parallel axis; 1 without one."""
        return self.sizes[-1] if AXES[self.kind][-1] == "tp" else 1

    def __str__(self) -> str:
        if self.kind == "alone":
            return "one process without a process group"
        mesh = " ".join(f"{axis}={size}" for axis, size in zip(AXES[self.kind], self.sizes, strict=True))
        wrapper = ", activation checkpointing" if self.is_checkpointed else ""
        return f"{self.world_size} ranks, {self.kind} {mesh}{wrapper}"


@dataclass(frozen=True)
class Group:
    """A parameter group of an optimizer.

    Attributes:
        parameters: positions in :meth:`ModelSpec.parameters`, of first names.
        settings: keyword arguments, as JSON values: a list stands for a tuple.
    """

    parameters: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer of ``torch.optim``, by its class name, with its scheduler.

    Attributes:
        scheduler: short name of a learning-rate scheduler; "" for none.
        has_tensor_lr: the learning rate is a 0-d tensor.
    """

    kind: str = "SGD"
    groups: tuple[Group, ...] = ()
    scheduler: str = ""
    has_tensor_lr: bool = False

    def __str__(self) -> str:
        switches = sorted({key for group in self.groups for key, value in group.settings.items() if value is True})
        more = "".join(f" {switch}" for switch in switches) + (f" with {self.scheduler}" if self.scheduler else "")
        groups = f" in {len(self.groups)} groups" if len(self.groups) > 1 else ""
        return f"{self.kind}{more}{groups}"


@dataclass(frozen=True)
class StateOptions:
    """Fields of ``StateDictOptions``, and the child of the model to which reading is confined, "" for none.

    ``strict`` and ``broadcast_from_rank0`` are for setting; ``cpu_offload``, ``ignore_frozen_params``, the flat form
    and ``submodule`` are for reading; ``full_state_dict`` is for both.
    """

    full_state_dict: bool = False
    cpu_offload: bool = False
    ignore_frozen_params: bool = False
    keep_submodule_prefixes: bool = True
    strict: bool = True
    broadcast_from_rank0: bool = False
    flatten_optimizer_state_dict: bool = False
    submodule: str = ""

    def __post_init__(self) -> None:
        if self.broadcast_from_rank0 and not self.full_state_dict:
            raise ValueError("expected full_state_dict with broadcast_from_rank0.")

    @property
    def is_on_rank_0(self) -> bool:
        """Reads as: only rank 0 gets what is read."""
        return self.full_state_dict and self.cpu_offload

    def __str__(self) -> str:
        on = [name for name in self.__dataclass_fields__ if getattr(self, name) is True]
        on = [name for name in on if name not in ("strict", "keep_submodule_prefixes")]
        on += [f"{name}=False" for name in ("strict", "keep_submodule_prefixes") if not getattr(self, name)]
        return ", ".join(on + ([f"submodule {self.submodule!r}"] if self.submodule else []))


@dataclass(frozen=True)
class TrainingStep:
    """One action of a training case, in ranks of its own.

    Attributes:
        action: ``read`` trains, also without reading the state, then reads it and trains on; with ``restores`` it then
            sets what it has read, and trains on from there; ``save`` trains, reads, saves and trains on; ``load``
            builds another instance, loads, and trains on.
        layout: which of the case's layouts.
        num_warm: steps that the instance of a load has taken before.
    """

    action: Literal["read", "save", "load"]
    layout: int = 0
    restores: bool = False
    num_warm: int = 0

    # what `Step` says of a step in which nothing is wrong on purpose
    misuse: ClassVar[str] = "none"
    may_refuse: ClassVar[bool] = False


@dataclass(frozen=True)
class TrainingCase:
    """One generated training run.

    Attributes:
        form: which functions are called, and what of the state is saved.
        num_before, num_after: training steps before and after the state is read.
        keeps_gradients: gradients are there when the state is read, since they are cleared before each step, not after.
        is_mid_step: the state is read between a backward pass and the step of the optimizers; only by a ``read``.
    """

    family: str
    model: ModelSpec
    seed: int = 0
    optimizers: tuple[OptimizerSpec, ...] = ()
    layouts: tuple[Parallelism, ...] = (Parallelism(),)
    steps: tuple[TrainingStep, ...] = (TrainingStep("read"),)
    options: StateOptions = field(default_factory=StateOptions)
    form: Form = "both"
    num_before: int = 1
    num_after: int = 2
    keeps_gradients: bool = False
    is_mid_step: bool = False

    def __post_init__(self) -> None:
        parameters, seen = self.model.parameters(), set()
        for number in (n for optimizer in self.optimizers for group in optimizer.groups for n in group.parameters):
            if not 0 <= number < len(parameters) or parameters[number].same_as != number or number in seen:
                raise ValueError(f"expected each parameter in one group, by its first name, but got {number}.")
            seen.add(number)
        if any(not 0 <= step.layout < len(self.layouts) for step in self.steps):
            raise ValueError(f"expected steps that name one of {len(self.layouts)} layouts.")
        if self.is_mid_step and any(step.action != "read" or step.restores for step in self.steps):
            raise ValueError("expected a state that is only read in the middle of a step.")
        if self.form == "optimizer" and not self.optimizers:
            raise ValueError("expected an optimizer where its state alone is saved.")
        if self.options.is_on_rank_0 and not self.options.broadcast_from_rank0 and self.restores:
            raise ValueError("expected broadcast_from_rank0 where only rank 0 has what is set.")

    @property
    def restores(self) -> bool:
        """Reads as: some step sets a state."""
        return any(step.action == "load" or step.restores for step in self.steps)

    @property
    def max_world_size(self) -> int:
        return max(layout.world_size for layout in self.layouts)

    @property
    def id(self) -> str:
        """A readable id: the family and eight hex digits of the content."""
        return f"{self.family}-{hashlib.sha256(self.dumps().encode()).hexdigest()[:8]}"

    @property
    def is_resumed_whole(self) -> bool:
        """Reads as: all of the state is set, so that training after it may be compared."""
        return self.form not in ("model", "optimizer")

    @property
    def has_model(self) -> bool:
        return self.form != "optimizer"

    @property
    def has_optimizers(self) -> bool:
        return self.form != "model" and bool(self.optimizers)

    def setting(self, number: int) -> tuple[tuple[str, str], ...]:
        """Returns the lines of a finding at step ``number`` that say what was trained, and how it lay on ranks."""
        step = self.steps[number]
        here = str(self.layouts[step.layout])
        saves = [other for other in self.steps[:number] if other.action == "save"]
        if step.action == "load" and saves:
            where = [("saved on", str(self.layouts[saves[-1].layout])), ("loaded on", here)]
        else:
            where = [("saved on" if step.action == "save" else "read on", here)]
        optimizers = " and ".join(map(str, self.optimizers)) or "no optimizer"
        point = "in the middle of step" if self.is_mid_step else "after steps"
        options = f"; {self.options}" if str(self.options) else ""
        how = f"{optimizers}, {point} {self.num_before}; {self.form}{options}"
        return (*where, ("training", how), ("model", str(self.model)))

    def dumps(self) -> str:
        return json.dumps(codec.to_json(self), indent=1)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """Hypothesis prints a failing case by its id; all of it stands in the file that the failure writes."""
        printer.text(f"<TrainingCase {self.id}>")
