"""How tensors lie on ranks: meshes, placements, layouts, and the region that a rank then holds. Part of a case."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from dcpbench.geometry import Region, full_region, runs_of, split, split_strided

__all__ = ["Holders", "Layout", "LeafLayout", "MemoryForm", "Mesh", "Placement"]

MemoryForm = Literal["contiguous", "transposed", "sliced", "conjugated"]
"""How a local tensor lies in memory: in order; with the order of its strides reversed; as a view with gaps into a
larger storage; as a lazily conjugated view, which only complex sources are (others are contiguous then)."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class LeafLayout:
    """How one tensor lies on the ranks: placements, one per mesh axis, or None for a plain tensor on every rank.

    Attributes:
        mesh: the mesh of this tensor, where it is not that of the layout.
    """

    placements: tuple[Placement, ...] | None = None
    memory: MemoryForm = "contiguous"
    mesh: Mesh | None = None

    def __str__(self) -> str:
        form = "" if self.memory == "contiguous" else f" {self.memory}"
        if self.placements is None:
            return f"plain{form}"
        own = "" if self.mesh is None else f" on mesh {self.mesh}"
        return f"[{', '.join(map(str, self.placements))}]{form}{own}"


@dataclass(frozen=True)
class Holders:
    """The ranks whose state dict has a leaf, where not all have it.

    Attributes:
        leaf: its number among the leaves of the case.
        ranks: at least one, ascending.
    """

    leaf: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How the state dict lies on a world of ranks.

    Attributes:
        world_size: ranks that take part in the step.
        mesh: the mesh of the sharded tensors.
        leaves: one entry per tensor leaf of the case, in its order.
        distributed: False means that each rank is alone, without any process group: plain tensors only.
        holders: of each leaf that only some ranks have in their state dict; all others are held by all members.
        members: the ranks that take part, as a process group of their own; none means all, and the default group.
    """

    world_size: int
    mesh: Mesh
    leaves: tuple[LeafLayout, ...]
    distributed: bool = True
    holders: tuple[Holders, ...] = ()
    members: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.world_size < 1 or any(not 0 <= rank < self.world_size for rank in self.mesh.ranks):
            raise ValueError(f"expected the mesh within the world but got {self.world_size=} ranks={self.mesh.ranks}.")
        if not self.distributed and any(leaf.placements is not None for leaf in self.leaves):
            raise ValueError(f"expected plain tensors without a process group but got {self.leaves}.")
        if any(not 0 <= rank < self.world_size for rank in self.members):
            raise ValueError(f"expected members of a world of {self.world_size} but got {self.members}.")
        taking_part = set(self.members or range(self.world_size))
        if any(not held.ranks or not taking_part.issuperset(held.ranks) for held in self.holders):
            raise ValueError(f"expected ranks that take part as holders but got {self.holders}.")
        for number, leaf in enumerate(self.leaves):
            mesh = self.mesh_of(number)
            if leaf.placements is not None and len(leaf.placements) != len(mesh.axes):
                raise ValueError(f"expected one placement per mesh axis but got {leaf} on {mesh}.")
            if leaf.placements is not None and not all(self.holds(number, rank) for rank in mesh.ranks):
                raise ValueError(f"expected each rank of {mesh} to hold what lies on it but got {self.holders}.")

    def mesh_of(self, leaf: int) -> Mesh:
        """Returns the mesh of tensor ``leaf``."""
        return self.leaves[leaf].mesh or self.mesh

    def takes_part(self, rank: int) -> bool:
        """Reads as: ``rank`` makes the call."""
        return not self.members or rank in self.members

    def holds(self, leaf: int, rank: int) -> bool:
        """Reads as: the state dict of ``rank`` has the leaf of that number, be it without any element of it."""
        held = next((held.ranks for held in self.holders if held.leaf == leaf), None)
        return self.takes_part(rank) if held is None else rank in held

    def region(self, leaf: int, shape: tuple[int, ...], rank: int) -> Region | None:
        """Returns what ``rank`` holds of tensor ``leaf``; None if its mesh leaves the rank out.

        Source: documentation of ``Shard``, ``Replicate`` and ``_StridedShard`` in ``torch.distributed.tensor``:
        placements cut from the first mesh axis to the last, each what the ones before left over.
        """
        placements = self.leaves[leaf].placements
        if placements is None:
            return full_region(shape)
        mesh = self.mesh_of(leaf)
        coordinate = mesh.coordinate(rank)
        return None if coordinate is None else _cut(shape, coordinate, mesh.sizes, placements)


@functools.lru_cache(maxsize=1024)
def _cut(
    shape: tuple[int, ...], coordinate: tuple[int, ...], sizes: tuple[int, ...], placements: tuple[Placement, ...]
) -> Region:
    indices: list[Any] = [range(size) for size in shape]
    for place, size, cut in zip(coordinate, sizes, placements, strict=True):
        if cut.dim is None:
            continue
        if cut.split_factor == 1:
            indices[cut.dim] = split(indices[cut.dim], size, place)
        else:
            indices[cut.dim] = split_strided(indices[cut.dim], cut.split_factor, size, place)
    return Region(tuple(runs_of(along) for along in indices))
