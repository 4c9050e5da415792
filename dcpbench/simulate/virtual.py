"""Tensors of virtual ranks: DTensors over device meshes without any process group."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from dcpbench.geometry import Region
from dcpbench.layout import Layout, Mesh
from dcpbench.ranks.dtensors import dtensor

__all__ = ["held_by", "mesh_of"]


@functools.lru_cache(maxsize=4096)
def mesh_of(mesh: Mesh, rank: int) -> DeviceMesh:
    """Returns a mesh as ``rank`` sees it."""
    ranks = torch.tensor(mesh.ranks).reshape(mesh.sizes)
    return DeviceMesh("cpu", ranks, mesh_dim_names=mesh.axes, _init_backend=False, _rank=rank)


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
    return dtensor(part, shape, mesh_of(layout.mesh_of(leaf), rank), placements, part.dtype)
