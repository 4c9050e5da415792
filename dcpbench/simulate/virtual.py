"""Tensors of virtual ranks: DTensors over device meshes without any process group."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from dcpbench.geometry import Region
from dcpbench.layout import Layout, Mesh
from dcpbench.layout import Placement as Cut

__all__ = ["as_dtensor", "held_by", "mesh_of"]


@functools.lru_cache(maxsize=4096)
def mesh_of(mesh: Mesh, rank: int) -> DeviceMesh:
    """Returns a mesh as ``rank`` sees it."""
    ranks = torch.tensor(mesh.ranks).reshape(mesh.sizes)
    return DeviceMesh("cpu", ranks, mesh_dim_names=mesh.axes, _init_backend=False, _rank=rank)


def as_dtensor(local: torch.Tensor, shape: tuple[int, ...], mesh: Mesh, cuts: tuple[Cut, ...], rank: int) -> DTensor:
    """Returns ``local`` as this rank's part of a tensor of ``shape``."""
    return DTensor.from_local(
        local,
        mesh_of(mesh, rank),
        [_placement(cut) for cut in cuts],
        run_check=False,
        shape=torch.Size(shape),
        stride=_stride(shape),
    )


def held_by(layout: Layout, leaf: int, shape: tuple[int, ...], rank: int, local: Any) -> torch.Tensor:
    """Returns what the state dict of ``rank`` has for a leaf.

    Args:
        layout: how the leaf lies on the ranks.
        leaf: its number.
        shape: of the whole tensor.
        rank: whose.
        local: given a region, the tensor that holds it.
    """
    placements = layout.leaves[leaf].placements
    region = layout.region(leaf, shape, rank)
    part: torch.Tensor = local(region if region is not None else Region(((),) * len(shape)))
    if placements is None:
        return part
    if region is None:
        part = part.reshape(0) if part.dim() != 1 else part
    return as_dtensor(part, shape, layout.mesh_of(leaf), placements, rank)


@functools.cache
def _placement(cut: Cut) -> Placement:
    if cut.dim is None:
        return Replicate()
    return Shard(cut.dim) if cut.split_factor == 1 else _StridedShard(cut.dim, split_factor=cut.split_factor)


def _stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))
