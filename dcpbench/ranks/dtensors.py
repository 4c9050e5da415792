"""DTensors as layouts describe them, around local tensors that are there already. Runs on ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from dcpbench.layout import Placement

__all__ = ["dtensor", "forget"]


def dtensor(
    local: torch.Tensor, shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement], dtype: torch.dtype
) -> DTensor:
    """Returns ``local`` as this rank's part of a tensor of ``shape``; it requires a gradient where ``local`` does.

    It ends as ``distribute_tensor`` does: ``from_local`` would take an empty shape, that of a 0-d tensor, for none.
    """
    spec = DTensorSpec.__new__(DTensorSpec)  # a copy: a backend may change what it is given
    vars(spec).update(vars(_spec(tuple(shape), _This(mesh), tuple(placements), dtype)))
    return DTensor(local.detach(), spec, requires_grad=local.requires_grad)  # type: ignore[no-untyped-call]


def forget() -> None:
    """Lets go of meshes: what is kept of them here is of no use once their process groups end."""
    _spec.cache_clear()


class _This:
    """A mesh by its identity: those of virtual ranks are equal, and yet each stands elsewhere in its own."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _This) and self.mesh is other.mesh

    def __hash__(self) -> int:
        return id(self.mesh)


@functools.lru_cache(maxsize=256)
def _spec(shape: tuple[int, ...], this: _This, placements: tuple[Placement, ...], dtype: torch.dtype) -> DTensorSpec:
    strides = tuple(math.prod(max(1, size) for size in shape[dim + 1 :]) for dim in range(len(shape)))
    meta = TensorMeta(torch.Size(shape), strides, dtype)
    return DTensorSpec(this.mesh, tuple(map(_placement, placements)), tensor_meta=meta)


@functools.cache
def _placement(placement: Placement) -> TorchPlacement:
    if placement.dim is None:
        return Replicate()
    if placement.split_factor == 1:
        return Shard(placement.dim)
    return cast("TorchPlacement", _StridedShard(placement.dim, split_factor=placement.split_factor))
