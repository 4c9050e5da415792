"""`Case`: one generated run as plain frozen data, with JSON both ways.

A case says what a state dict holds (leaves), how it lies on the ranks (layouts) and what is done with it (steps).
It holds no tensor and names no backend, so that the same case runs on any backend, any day.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dcpbench import codec, objects
from dcpbench.content import DTYPES, Bytes, shard_bytes
from dcpbench.errors import MalformedFile, UsageError
from dcpbench.geometry import Region, full_region, runs_of, split, split_strided

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

MemoryForm = Literal["contiguous", "transposed", "sliced", "conjugated"]
"""How a local tensor lies in memory: in order; with the order of its strides reversed; as a view with gaps into a
larger storage; as a lazily conjugated view, which only complex sources are (others are contiguous then)."""

Misuse = Literal["none", "unknown-key", "larger", "smaller", "extra-dim", "no-checkpoint"]
"""What is wrong on purpose with a load: it asks for a key that was never saved, or for a larger or smaller tensor than
was saved, or for one with a further dim, or for a checkpoint that does not exist."""


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Mesh:
    """A device mesh: its axes, their sizes and the ranks at its places, row-major.

    ``ranks`` may be permuted, and may leave ranks of the world out: those hold nothing.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.sizes) or math.prod(self.sizes) != len(self.ranks):
            raise ValueError(f"expected as many ranks as places but got sizes={self.sizes} ranks={self.ranks}.")
        if len(set(self.ranks)) != len(self.ranks) or len(set(self.axes)) != len(self.axes):
            raise ValueError(f"expected each rank and axis once but got ranks={self.ranks} axes={self.axes}.")

    def coordinate(self, rank: int) -> tuple[int, ...] | None:
        """Returns where ``rank`` stands in the mesh, or None if it is not part of it."""
        if rank not in self.ranks:
            return None
        place = self.ranks.index(rank)
        coordinate = []
        for size in reversed(self.sizes):
            place, at = divmod(place, size)
            coordinate.append(at)
        return tuple(reversed(coordinate))

    def __str__(self) -> str:
        text = " ".join(f"{axis}={size}" for axis, size in zip(self.axes, self.sizes, strict=True))
        return text if self.ranks == tuple(range(len(self.ranks))) else f"{text} ranks={list(self.ranks)}"


_PLACEMENT = re.compile(r"Replicate\(\)|Shard\((\d+)\)|_StridedShard\((\d+), split_factor=(\d+)\)")


@dataclass(frozen=True, slots=True)
class Placement:
    """What one mesh axis does to a tensor: ``Replicate()``, ``Shard(dim)`` or a strided shard.

    Attributes:
        dim: the tensor dim that is cut; None replicates.
        split_factor: above 1 the cut is strided, as FSDP2 over tensor parallelism makes it.
    """

    dim: int | None = None
    split_factor: int = 1

    def to_json(self) -> str:
        return str(self)

    @classmethod
    def from_json(cls, data: Any) -> Placement:
        match = _PLACEMENT.fullmatch(data) if isinstance(data, str) else None
        if match is None:
            raise ValueError(
                f"expected 'Replicate()', 'Shard(0)' or '_StridedShard(0, split_factor=2)' but got {data!r}."
            )
        dim, strided_dim, factor = match.groups()
        if dim is not None:
            return cls(int(dim))
        return cls() if strided_dim is None else cls(int(strided_dim), int(factor))

    def __str__(self) -> str:
        if self.dim is None:
            return "Replicate()"
        if self.split_factor == 1:
            return f"Shard({self.dim})"
        return f"_StridedShard({self.dim}, split_factor={self.split_factor})"


@dataclass(frozen=True, slots=True)
class LeafLayout:
    """How one tensor lies on the ranks: placements, one per mesh axis, or None for a plain tensor on every rank."""

    placements: tuple[Placement, ...] | None = None
    memory: MemoryForm = "contiguous"

    def __str__(self) -> str:
        form = "" if self.memory == "contiguous" else f" {self.memory}"
        if self.placements is None:
            return f"plain{form}"
        return f"[{', '.join(map(str, self.placements))}]{form}"


@dataclass(frozen=True, slots=True)
class Layout:
    """How the state dict lies on a world of ranks.

    Attributes:
        world_size: ranks that take part in the step.
        mesh: the mesh of the sharded tensors.
        leaves: one entry per tensor leaf of the case, in its order.
        distributed: False means one process without any process group.
    """

    world_size: int
    mesh: Mesh
    leaves: tuple[LeafLayout, ...]
    distributed: bool = True

    def __post_init__(self) -> None:
        if self.world_size < 1 or any(not 0 <= rank < self.world_size for rank in self.mesh.ranks):
            raise ValueError(f"expected the mesh within the world but got {self.world_size=} ranks={self.mesh.ranks}.")
        if not self.distributed and self.world_size != 1:
            raise ValueError(f"expected world_size=1 without a process group but got {self.world_size}.")
        for leaf in self.leaves:
            if leaf.placements is not None and len(leaf.placements) != len(self.mesh.axes):
                raise ValueError(f"expected one placement per mesh axis but got {leaf} on {self.mesh}.")

    def region(self, leaf: int, shape: tuple[int, ...], rank: int) -> Region | None:
        """Returns what ``rank`` holds of tensor ``leaf``; None if its mesh leaves the rank out.

        Source: documentation of ``Shard``, ``Replicate`` and ``_StridedShard`` in ``torch.distributed.tensor``:
        placements cut from the first mesh axis to the last, each what the ones before left over.
        """
        placements = self.leaves[leaf].placements
        if placements is None:
            return full_region(shape)
        coordinate = self.mesh.coordinate(rank)
        if coordinate is None:
            return None
        indices: list[Any] = [range(size) for size in shape]
        for place, size, cut in zip(coordinate, self.mesh.sizes, placements, strict=True):
            if cut.dim is None:
                continue
            if cut.split_factor == 1:
                indices[cut.dim] = split(indices[cut.dim], size, place)
            else:
                indices[cut.dim] = split_strided(indices[cut.dim], cut.split_factor, size, place)
        return Region(tuple(runs_of(along) for along in indices))


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Options:
    """Switches of a case.

    Attributes:
        reuse: the steps share one writer and one reader object, as a training loop does that keeps them.
    """

    reuse: bool = False


@dataclass(frozen=True, slots=True)
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
            room = {"none": 1, "no-checkpoint": 1, "unknown-key": num_leaves}.get(step.misuse, num_tensors)
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
