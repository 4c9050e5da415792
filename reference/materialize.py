"""Memory for meta tensors in the destination of a load."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

__all__ = ["materialize"]


def materialize(fqn: str, value: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised tensor like the meta tensor `value`, on this rank's device.

    The device is the accelerator's current one if the default process group runs on it alone, else the CPU. For a
    DTensor only the local shard is allocated.

    Raises:
        ValueError: a ShardedTensor, which has no way to be given memory.
    """
    if isinstance(value, ShardedTensor):
        raise ValueError(f"Expected a tensor or DTensor but got {fqn!r}, a ShardedTensor on device='meta'.")
    device = _device()
    if isinstance(value, DTensor):
        local = torch.empty_like(value.to_local(), device=device)
        # With the spec of its own, which knows more than placements: the order in which mesh axes cut a dim.
        return DTensor(local, value._spec, requires_grad=value.requires_grad)  # type: ignore[no-untyped-call]
    return torch.empty_like(value, device=device)


def _device() -> torch.device:
    if dist.is_available() and dist.is_initialized():
        devices = dist.distributed_c10d._get_default_group()._device_types
        accelerators = [device for device in devices if device.type != "cpu"]
        if accelerators and len(accelerators) == len(devices):
            module = torch.get_device_module(accelerators[0])
            return torch.device(accelerators[0].type, module.current_device())
    return torch.device("cpu")
