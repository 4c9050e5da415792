"""Runs on a rank: the device meshes of the default process group, made once each, as in a job.

They hold the groups that were made for them, and letting go of a gloo group takes tens of milliseconds: whoever ends
the default group takes the meshes from here and lets go of all of it at once.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from dcpbench.layout import Mesh

__all__ = ["forget", "mesh_of"]

_meshes: dict[tuple[Mesh, str], DeviceMesh] = {}


def mesh_of(mesh: Mesh, device: str) -> DeviceMesh:
    """Returns the device mesh of the default group that ``mesh`` describes; all ranks call it."""
    key = (mesh, device)
    if key not in _meshes:
        ranks = torch.tensor(mesh.ranks).reshape(mesh.sizes)
        _meshes[key] = DeviceMesh(device, ranks, mesh_dim_names=mesh.axes)
    return _meshes[key]


def forget() -> list[object]:
    """Returns the meshes that were made, and forgets them: their process group is about to end."""
    held: list[object] = list(_meshes.values())
    _meshes.clear()
    return held
