"""Runs on a rank: device meshes and groups within the default process group, made once each, as in a job.

They hold the groups that were made for them, and letting go of a gloo group takes tens of milliseconds: whoever ends
the default group takes the meshes from here and lets go of all of it at once.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from dcpbench.layout import Mesh
from dcpbench.ranks import dtensors

__all__ = ["forget", "group_of", "mesh_of"]

_meshes: dict[tuple[Mesh, str], DeviceMesh] = {}
_groups: dict[tuple[tuple[int, ...], str], object] = {}


def group_of(members: tuple[int, ...], purpose: str) -> object:
    """Returns a process group of ``members`` of the default group; all ranks of the default group call it.

    Args:
        members: ranks; a rank that is none of them gets no group that it could use.
        purpose: groups of the same members for different purposes are different ones.
    """
    key = (members, purpose)
    if key not in _groups:
        _groups[key] = dist.new_group(list(members))
    return _groups[key]


def mesh_of(mesh: Mesh, device: str) -> DeviceMesh:
    """Returns the device mesh of the default group that ``mesh`` describes; all ranks call it."""
    key = (mesh, device)
    if key not in _meshes:
        ranks = torch.tensor(mesh.ranks).reshape(mesh.sizes)
        _meshes[key] = DeviceMesh(device, ranks, mesh_dim_names=mesh.axes)
    return _meshes[key]


def forget() -> list[object]:
    """Returns the meshes and groups that were made, and forgets them: their process group is about to end."""
    held: list[object] = [*_meshes.values(), *_groups.values()]
    if _meshes:  # DTensor remembers meshes that are equal to those to come, but whose groups are gone
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
        _gen_transform_infos.cache_clear()
        clear_redistribute_planner_cache()
        dtensors.forget()
    _meshes.clear()
    _groups.clear()
    return held
