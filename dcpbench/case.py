"""`Case`: one generated run as plain frozen data, with JSON both ways.

A case says what a state dict holds (leaves), how it lies on the ranks (layouts) and what is done with it (steps).
It holds no tensor and names no backend, so that the same case runs on any backend, any day.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dcpbench import codec, objects
from dcpbench.content import DTYPES, Bytes, shard_bytes
from dcpbench.errors import MalformedFile, UsageError
from dcpbench.geometry import Region
from dcpbench.layout import Layout, LeafLayout, MemoryForm, Mesh, Placement

__all__ = [
    "Case",
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


Misuse = Literal["none", "unknown-key", "larger", "smaller", "extra-dim", "no-checkpoint", "unsavable"]
"""What is wrong on purpose with a load: it asks for a key that was never saved, or for a larger or smaller tensor than
was saved, or for one with a further dim, or for a checkpoint that does not exist. Or with a save: a value raises when
it is pickled."""


@dataclass(frozen=True)
class Part:
    """One step of the way from the state dict to a leaf: a dict key (text or int) or a list index."""

    kind: Literal["key", "index"]
    value: str | int

    def to_json(self) -> Any:
        if self.kind == "index":
            return self.value
        return self.value if isinstance(self.value, str) else {"key": self.value}

    @classmethod
    def from_json(cls, data: Any) -> Part:
        if type(data) is str:
            return cls("key", data)
        if type(data) is int and data >= 0:
            return cls("index", data)
        if isinstance(data, dict) and type(data.get("key")) is int:
            return cls("key", data["key"])
        raise ValueError(f'expected text, a list index or {{"key": <int>}} but got {data!r:.60}.')


def fqn_of(path: tuple[Part, ...]) -> str:
    """Returns the flattened key of a leaf, as DCP forms it: the parts joined by dots."""
    return ".".join(str(part.value) for part in path)


@dataclass(frozen=True)
class TensorLeaf:
    """A tensor of the state dict: where it hangs, its global shape and dtype.

    Attributes:
        expanded: all rows along dim 0 hold the same; a source is made by ``expand``, with stride 0 there.
        requires_grad: it is what a parameter is.
        tied_to: number of an earlier leaf that is the very same tensor, under another key; None if there is none.
    """

    path: tuple[Part, ...]
    shape: tuple[int, ...]
    dtype: str = "float32"
    expanded: bool = False
    requires_grad: bool = False
    tied_to: int | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("expected a path with at least one part but got an empty one.")
        if self.dtype not in DTYPES:
            raise ValueError(f"expected a dtype such as {', '.join(list(DTYPES)[:3])} but got {self.dtype!r}.")
        if self.expanded and not self.shape:
            raise ValueError("expected an expanded tensor to have a dim but got shape=().")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"expected sizes of 0 and more but got shape={self.shape}.")

    @property
    def fqn(self) -> str:
        return fqn_of(self.path)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype]


@dataclass(frozen=True)
class ObjectLeaf:
    """A value of the state dict that is no tensor, held as :func:`dcpbench.objects.encode` gives it."""

    path: tuple[Part, ...]
    encoded: Any

    @property
    def fqn(self) -> str:
        return fqn_of(self.path)

    def value(self, version: int) -> Any:
        """Returns the value that the leaf has in ``version`` of the content: a tuple from version 1 on."""
        held = objects.decode(self.encoded)
        return held if version == 0 else (version, held)


@dataclass(frozen=True)
class Step:
    """One action of a case.

    Attributes:
        action: ``save`` writes, ``load`` reads into a destination prepared with other bytes.
        layout: which of the case's layouts.
        checkpoint: name of the checkpoint, one path component.
        version: which content a save writes; a load expects that of the last save under the same name.
        may_refuse: all ranks may refuse the step; what follows is then not judged.
        without: numbers of leaves (:attr:`Case.leaves`) that a load does not ask for.
        misuse: what is wrong on purpose, so that all ranks must refuse the step.
        misused: number of the leaf that the misuse is about.
        misused_on: the one rank that asks for the wrong thing; None means all ranks do.
    """

    action: Literal["save", "load"]
    layout: int
    checkpoint: str = "ckpt"
    version: int = 0
    may_refuse: bool = False
    without: tuple[int, ...] = ()
    misuse: Misuse = "none"
    misused: int = 0
    misused_on: int | None = None


@dataclass(frozen=True)
class Options:
    """Switches of a case.

    Attributes:
        reuse: the steps share one writer and one reader object, as a training loop does that keeps them.
    """

    reuse: bool = False


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

    def _check_leaf_numbers(self) -> None:
        num_tensors, num_leaves = len(self.tensors), len(self.leaves)
        for step in self.steps:
            room = {"none": 1, "no-checkpoint": 1, "unknown-key": num_leaves, "unsavable": num_leaves}.get(
                step.misuse, num_tensors
            )
            if not 0 <= step.misused < max(1, room) or room == 0:
                raise ValueError(f"expected misuse of one of {room} leaves but got misused={step.misused}.")
            if any(not 0 <= number < num_leaves for number in step.without):
                raise ValueError(f"expected a load without some of {num_leaves} leaves but got {step.without}.")
        for number, tensor in enumerate(self.tensors):
            if tensor.tied_to is not None and not self._may_tie(number, tensor.tied_to):
                raise ValueError(f"expected tensor {number} to be like an earlier one, and to lie as it does.")

    def _may_tie(self, number: int, earlier: int) -> bool:
        one = self.tensors[number]
        if not 0 <= earlier < number or self.tensors[earlier].tied_to is not None:
            return False
        other = self.tensors[earlier]
        same = (one.shape, one.dtype, one.expanded, one.requires_grad) == (
            other.shape,
            other.dtype,
            other.expanded,
            other.requires_grad,
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

    def version_at(self, step: int) -> int | None:
        """Returns the content version that a load at ``step`` must bring back, or None if nothing was saved there."""
        saves = [s for s in self.steps[:step] if s.action == "save" and s.checkpoint == self.steps[step].checkpoint]
        return saves[-1].version if saves else None

    def version_held(self, step: int) -> int:
        """Returns the content version that a state dict must hold after ``step``: the saved or the loaded one."""
        held = self.steps[step].version if self.steps[step].action == "save" else self.version_at(step)
        return held or 0

    def asked_for(self, step: int) -> list[int]:
        """Returns the numbers of the leaves (:attr:`leaves`) that the state dict of ``step`` holds."""
        return [number for number in range(len(self.leaves)) if number not in self.steps[step].without]

    def content_seed(self, version: int) -> int:
        """Returns the seed of :mod:`dcpbench.content` for one content version of this case."""
        return self.seed * 1_000_003 + version

    def expected_bytes(self, leaf: int, version: int, region: Region) -> Bytes:
        """Returns the bytes ``[numel, element size]`` that ``region`` of tensor ``leaf`` has in a content version."""
        tensor = self.tensors[leaf]
        if tensor.tied_to is not None:
            tensor = self.tensors[tensor.tied_to]
        if tensor.expanded:
            region = Region((((0, 1),) * region.shape[0], *region.runs[1:]))
        return shard_bytes(self.content_seed(version), tensor.fqn, tensor.shape, region, tensor.dtype)

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
