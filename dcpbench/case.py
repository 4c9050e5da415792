"""`Case`: one generated run as plain frozen data, with JSON both ways.

A case says what a state dict holds (leaves), how it lies on the ranks (layouts) and what is done with it (steps).
It holds no tensor and names no backend, so that the same case runs on any backend, any day.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dcpbench import codec
from dcpbench.content import DTYPES, Bytes, overwritten, shard_bytes
from dcpbench.errors import MalformedFile, UsageError
from dcpbench.geometry import Region
from dcpbench.layout import Holders, Layout, LeafLayout, MemoryForm, Mesh, Placement
from dcpbench.leaves import ObjectLeaf, Part, TensorLeaf, fqn_of
from dcpbench.steps import Action, Disturbance, IdForm, Misuse, Options, Step

__all__ = [
    "MUTATED",
    "Action",
    "Case",
    "Disturbance",
    "Holders",
    "IdForm",
    "Layout",
    "LeafLayout",
    "MemoryForm",
    "Mesh",
    "Misuse",
    "ObjectLeaf",
    "Options",
    "Part",
    "Placement",
    "Step",
    "TensorLeaf",
    "fqn_of",
]
MUTATED = 1_000_000
"""Added to the version of the content that was saved: the content that training makes of it after ``async_save``."""


@dataclass(frozen=True)
class Case:
    """One generated run."""

    family: str
    seed: int
    tensors: tuple[TensorLeaf, ...]
    objects: tuple[ObjectLeaf, ...]
    layouts: tuple[Layout, ...]
    steps: tuple[Step, ...]
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        for layout in self.layouts:
            if len(layout.leaves) != len(self.tensors):
                raise ValueError(f"expected {len(self.tensors)} leaf layouts but got {len(layout.leaves)}.")
            for leaf, tensor in zip(layout.leaves, self.tensors, strict=True):
                if any(p.dim is not None and p.dim >= len(tensor.shape) for p in leaf.placements or ()):
                    raise ValueError(f"expected placements within {len(tensor.shape)} dims but got {leaf}.")
        if any(not 0 <= step.layout < len(self.layouts) for step in self.steps):
            raise ValueError(f"expected steps that name one of {len(self.layouts)} layouts.")
        self._check_leaf_numbers()
        self._check_order()

    def _check_order(self) -> None:
        for number, step in enumerate(self.steps):
            if step.action in ("copy", "rename", "convert") and (not step.target or self.source_of(number) is None):
                raise ValueError(f"expected step {number} to name a checkpoint that is there, and a target.")
            if step.resaves:
                before = self.steps[number - 1] if number else step
                is_fit = before.action == "load" and (before.layout, before.without) == (step.layout, step.without)
                if not is_fit or before.lenient or self.version_at(number - 1) != step.version:
                    raise ValueError(f"expected step {number} to save what the step before has loaded.")

    def _check_leaf_numbers(self) -> None:
        num_tensors, num_leaves = len(self.tensors), len(self.leaves)
        for step in self.steps:
            room = {
                "none": 1,
                "no-checkpoint": 1,
                "failing-stateful": 1,
                "unknown-key": num_leaves,
                "unsavable": num_leaves,
                "other-kind": num_leaves,
            }.get(step.misuse, num_tensors)
            if not 0 <= step.misused < max(1, room) or room == 0:
                raise ValueError(f"expected misuse of one of {room} leaves but got misused={step.misused}.")
            if any(not 0 <= number < num_leaves for number in step.without):
                raise ValueError(f"expected a step without some of {num_leaves} leaves but got {step.without}.")
        for number, tensor in enumerate(self.tensors):
            if tensor.tied_to is not None and not self._may_tie(number, tensor.tied_to):
                raise ValueError(f"expected tensor {number} to be like an earlier one, and to lie as it does.")

    def _may_tie(self, number: int, earlier: int) -> bool:
        one = self.tensors[number]
        if not 0 <= earlier < number or self.tensors[earlier].tied_to is not None:
            return False
        other = self.tensors[earlier]
        same = all(
            getattr(one, name) == getattr(other, name)
            for name in ("shape", "dtype", "expanded", "requires_grad", "later_shape", "later_dtype")
        )
        return same and all(layout.leaves[number] == layout.leaves[earlier] for layout in self.layouts)

    @property
    def leaves(self) -> tuple[TensorLeaf | ObjectLeaf, ...]:
        """All leaves of the state dict: tensors, then values."""
        return (*self.tensors, *self.objects)

    @property
    def max_world_size(self) -> int:
        return max((layout.world_size for layout in self.layouts), default=1)

    @property
    def id(self) -> str:
        """A readable id: the family and eight hex digits of the content."""
        return f"{self.family}-{hashlib.sha256(self.dumps().encode()).hexdigest()[:8]}"

    def source_of(self, number: int) -> int | None:
        """Returns the save whose state the checkpoint of step ``number`` holds when the step begins; None if none is.

        Copies, renamings and conversions are followed back; a save that all ranks must refuse leaves nothing.
        """
        return self._sources[number]

    @functools.cached_property
    def _sources(self) -> tuple[int | None, ...]:
        held: dict[str, int] = {}
        sources: list[int | None] = []
        for number, step in enumerate(self.steps):
            sources.append(held.get(step.checkpoint))
            if step.saves and step.misuse == "none":
                held[step.checkpoint] = number
            elif step.saves or step.action == "delete":
                held.pop(step.checkpoint, None)
            elif step.action in ("copy", "convert", "rename") and sources[number] is not None:
                held[step.target] = held[step.checkpoint]
                if step.action == "rename":
                    del held[step.checkpoint]
        return tuple(sources)

    def version_at(self, step: int) -> int | None:
        """Returns the content version that a load at ``step`` must bring back, or None if nothing was saved there."""
        source = self.source_of(step)
        return None if source is None else self.steps[source].version

    def version_held(self, step: int) -> int:
        """Returns the content version that a state dict must hold after ``step``: the saved or the loaded one."""
        held = self.steps[step].version if self.steps[step].saves else self.version_at(step)
        return held or 0

    def asked_for(self, step: int, rank: int | None = None) -> list[int]:
        """Returns the numbers of the leaves (:attr:`leaves`) that the state dict of ``step`` holds.

        Args:
            step: its number.
            rank: whose state dict; None for those of all ranks together.
        """
        layout, without = self.layouts[self.steps[step].layout], self.steps[step].without
        return [
            number
            for number in range(len(self.leaves))
            if number not in without and (rank is None or layout.holds(number, rank))
        ]

    def is_missing(self, step: int, leaf: int) -> bool:
        """Reads as: the load at ``step`` asks for a leaf that the checkpoint was saved without."""
        source = self.source_of(step)
        return source is not None and leaf in self.steps[source].without

    def tensor(self, number: int, version: int) -> TensorLeaf:
        """Returns a tensor leaf with the shape and dtype that it has in a content version."""
        return self.tensors[number].at(version % MUTATED)

    def content_seed(self, version: int) -> int:
        """Returns the seed of :mod:`dcpbench.content` for one content version of this case."""
        return self.seed * 1_000_003 + version

    def expected_bytes(self, leaf: int, version: int, region: Region) -> Bytes:
        """Returns the bytes ``[numel, element size]`` that ``region`` of tensor ``leaf`` has in a content version."""
        tied_to = self.tensors[leaf].tied_to
        tensor = self.tensor(leaf if tied_to is None else tied_to, version)
        if tensor.expanded:
            region = Region((((0, 1),) * region.shape[0], *region.runs[1:]))
        return shard_bytes(self.content_seed(version), tensor.fqn, tensor.shape, region, tensor.dtype)

    def misuse_of(self, step: int, leaf: int, rank: int) -> Misuse:
        """Returns what is wrong on purpose with a leaf on one rank."""
        one = self.steps[step]
        return one.misuse if leaf == one.misused and one.misused_on in (None, rank) else "none"

    def shape_asked(self, leaf: int, step: int, rank: int) -> tuple[int, ...]:
        """Returns the global shape that tensor ``leaf`` has in the state dict of a step, wrong on purpose or not."""
        shape, tied_to = self.tensor(leaf, self.version_held(step)).shape, self.tensors[leaf].tied_to
        misuse = self.misuse_of(step, leaf, rank)
        if misuse == "none" and tied_to is not None:  # it is the very tensor
            misuse = self.misuse_of(step, tied_to, rank)
        match misuse:
            case "larger":
                return (shape[0] + 1, *shape[1:])
            case "smaller":
                return (shape[0] - 1, *shape[1:])
            case "extra-dim":
                return (*shape, 1)
        return shape

    def destination_bytes(self, leaf: int, step: int, rank: int) -> Bytes:
        """Returns what a rank's part of tensor ``leaf`` holds before a load: nothing that belongs there."""
        version, shape = self.version_held(step), self.shape_asked(leaf, step, rank)
        tensor = self.tensor(leaf, version)
        region = self.layouts[self.steps[step].layout].region(leaf, shape, rank)
        assert region is not None, "a rank outside the mesh has no part of it"
        if shape != tensor.shape:
            return np.zeros((region.numel, DTYPES[tensor.dtype]), dtype=np.uint8)
        return overwritten(self.expected_bytes(leaf, version, region), tensor.dtype)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """Hypothesis prints a failing case by its id; all of it stands in the file that the failure writes."""
        printer.text(f"<Case {self.id}>")

    def dumps(self) -> str:
        return json.dumps(codec.to_json(self), indent=1)

    @classmethod
    def loads(cls, text: str, where: str = "case") -> Case:
        """Returns the case that ``text`` describes.

        Raises:
            MalformedFile: it is not JSON, or a field is missing, unknown or out of range.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise MalformedFile(where, f"expected JSON but {error}.") from error
        return codec.from_json(cls, data.get("case", data) if isinstance(data, dict) else data, where)

    @classmethod
    def load(cls, path: Path) -> Case:
        """Returns the case in a file that a failing run wrote, or that :meth:`dumps` gave.

        Raises:
            UsageError: the file cannot be read or is malformed.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"Expected a case file but {path} cannot be read: {error}. Give the path of one."
            ) from error
        return cls.loads(text, str(path))
