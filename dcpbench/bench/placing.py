"""How a workload lies on ranks: FSDP2, HSDP, tensor parallelism, all three at once. Standard library only."""

from __future__ import annotations

import functools
import hashlib

from dcpbench.bench.workloads import StateTensor, Workload
from dcpbench.errors import expected
from dcpbench.layout import Layout, LeafLayout, Mesh, Placement

__all__ = ["LAYOUTS", "digest_of", "place"]

LAYOUTS = ("fsdp2", "hsdp", "tp", "3d")
"""Sharded over all ranks; the same, replicated twice; tensor parallel; replicas x shards x tensor parallel."""

_WHOLE = LeafLayout()


@functools.lru_cache(maxsize=8)
def place(name: str, workload: Workload, world_size: int) -> Layout:
    """Returns how ``workload`` lies on ``world_size`` ranks.

    With ``hsdp`` the ranks are two replicas; ``3d`` takes 2 x 2 x 2, 1 x 2 x 2 or 1 x 1 x 2 of them, more shards first.

    Raises:
        UsageError: there is no such layout, or it does not go with so many ranks.
    """
    if name not in LAYOUTS:
        raise expected(f"one of {', '.join(LAYOUTS)}", "--layout", name, "Give one of these.")
    divisor = {"hsdp": 2, "3d": 2}.get(name, 1)
    if world_size < 1 or world_size % divisor:
        raise expected(
            f"a number of ranks that {divisor} divides for layout {name}", "--world-size", world_size, "Give another."
        )
    axes, sizes = _mesh(name, world_size)
    leaves = tuple(_leaf(name, tensor, sizes) for tensor in workload.tensors)
    return Layout(world_size, Mesh(axes, sizes, tuple(range(world_size))), leaves)


def digest_of(layout: Layout) -> str:
    """Returns a digest of the mesh and of every placement."""
    content = f"{layout.mesh}|{'|'.join(map(str, layout.leaves))}"
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _mesh(name: str, world_size: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if name == "fsdp2":
        return ("dp",), (world_size,)
    if name == "tp":
        return ("tp",), (world_size,)
    if name == "hsdp":
        return ("dp_replicate", "dp_shard"), (2, world_size // 2)
    replicas = 2 if world_size % 8 == 0 else 1
    return ("dp_replicate", "dp_shard", "tp"), (replicas, world_size // replicas // 2, 2)


def _leaf(name: str, tensor: StateTensor, sizes: tuple[int, ...]) -> LeafLayout:
    if not tensor.shape:
        return _WHOLE
    by_tp = Placement(tensor.tp_dim)
    if name == "fsdp2":
        return _shared((Placement(0),))
    if name == "tp":
        return _shared((by_tp,))
    if name == "hsdp":
        return _shared((Placement(), Placement(0)))
    # FSDP2 cuts what tensor parallelism has left over, though its axis comes first in the mesh: a strided shard.
    is_twice_cut = tensor.tp_dim == 0 and sizes[1] > 1
    return _shared((Placement(), Placement(0, sizes[2] if is_twice_cut else 1), by_tp))


@functools.lru_cache(maxsize=64)
def _shared(placements: tuple[Placement, ...]) -> LeafLayout:
    return LeafLayout(placements)
