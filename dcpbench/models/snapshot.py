"""The state of a training loop as plain data, read from modules and optimizers themselves. Runs on ranks.

Nothing here calls a function that is under test, nor anything collective: each rank tells what it holds, and of which
part of the whole tensor that is, by the arithmetic of :mod:`dcpbench.geometry`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardedAlong
from torch.distributed.tensor.placement_types import _StridedShard

from dcpbench import objects
from dcpbench.geometry import Region, full_region, runs_of, split, split_strided
from dcpbench.models.observed import Shard, State
from dcpbench.models.places import Leaves
from dcpbench.ranks.materialize import tensor_bytes

__all__ = ["digests_of", "state_of"]


def state_of(leaves: Leaves) -> State:
    """Returns ``leaves`` as plain data."""
    state = State()
    for key, value in leaves:
        if isinstance(value, torch.Tensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            dtype = str(value.dtype).removeprefix("torch.")
            state.tensors[key] = Shard(dtype, tuple(value.shape), _region(value), tensor_bytes(local))
        else:
            state.objects[key] = objects.encode(value)
    return state


def digests_of(leaves: Leaves) -> dict[str, str]:
    """Returns a digest of what this rank holds under each key, by key."""
    found = {}
    for key, value in leaves:
        if isinstance(value, torch.Tensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            data = f"{value.dtype}{tuple(value.shape)}".encode() + tensor_bytes(local)
        else:
            data = repr(objects.encode(value)).encode()
        found[key] = hashlib.blake2b(data, digest_size=8).hexdigest()
    return found


def _region(tensor: torch.Tensor) -> Region:
    """Returns which part of the whole tensor this rank holds.

    Source: documentation of the placements in ``torch.distributed.tensor``.
    """
    if not isinstance(tensor, DTensor):
        return full_region(tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "each rank of a training case is in its mesh"
    indices: list[Any] = [range(size) for size in tensor.shape]
    for place, size, placement in zip(coordinate, tensor.device_mesh.shape, tensor.placements, strict=True):
        if isinstance(placement, _StridedShard):
            indices[placement.dim] = split_strided(indices[placement.dim], int(placement.split_factor), size, place)
        elif isinstance(placement, ShardedAlong):
            indices[placement.dim] = split(indices[placement.dim], size, place)
        else:
            assert placement.is_replicate(), f"a state holds no {placement}"
    region = Region(tuple(runs_of(along) for along in indices))
    assert region.shape == tuple(tensor.to_local().shape), f"{tensor.placements}: {region.shape}"
    return region
