"""Whole tensors from shards and shards from whole tensors, without leaving a rank waiting.

`state_dict` calls this where ranks must act together. Before tensors travel, ranks agree that all of them got there:
a rank on which something went wrong takes part in that exchange, and then every rank raises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from .collectives import Abort, Failure, Message, Ok, attempt, pack, unpack
from .layout import is_sharded, local_boxes

__all__ = [
    "Announced",
    "Pending",
    "agree",
    "announce",
    "current_rank",
    "gather_tree",
    "leaves_of",
    "map_tree",
    "meshes_of",
    "realize",
    "shard_like",
    "travel_device",
]


def current_rank() -> int:
    """Return this rank in the default group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def travel_device(model: nn.Module) -> torch.device:
    """Return where the model's tensors are, or would be; if ranks cannot exchange tensors there, where they can."""
    tensors = list(chain(model.parameters(), model.buffers()))
    devices = [tensor.device for tensor in tensors if not tensor.is_meta and tensor.dim()]
    devices += [torch.device(mesh.device_type) for mesh in meshes_of(tensors)] + [torch.device("cpu")]
    if not dist.is_initialized():
        return devices[0]
    possible = {one.type: one for one in dist.distributed_c10d._get_default_group()._device_types}
    return next((device for device in devices if device.type in possible), next(iter(possible.values())))


def map_tree(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return `tree` with each leaf replaced; dicts, lists and tuples, named ones too, are new."""
    if isinstance(tree, dict):
        return {key: map_tree(function, value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_tree(function, value) for value in tree]
    if type(tree) is tuple:
        return tuple(map_tree(function, value) for value in tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tree(function, value) for value in tree))
    return function(tree)


def leaves_of(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield each leaf with its path, joined by dots."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            inner = isinstance(value, dict | list | tuple)
            yield from ((f"{key}.{path}", leaf) for path, leaf in leaves_of(value)) if inner else [(str(key), value)]


def meshes_of(tensors: Iterable[torch.Tensor]) -> list[DeviceMesh]:
    """Return the meshes that this rank belongs to, each once, in the order in which they occur."""
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
    return [mesh for mesh in meshes if mesh.get_coordinate() is not None]


def agree(step: str, own: Message, groups: Iterable[dist.ProcessGroup | None]) -> dict[int, Any]:
    """Return every rank's value, by global rank; all ranks of all `groups` (None: the default group) must call this.

    Each group passes on what the earlier ones have heard, so that one group per mesh axis reaches the whole mesh.

    Raises:
        BaseException: what went wrong on this rank, if something did.
        CheckpointException: something went wrong on other ranks only; tells which, and what.
    """
    rank = current_rank()
    raw, own = pack(own, rank, step)
    heard = {rank: raw}
    for group in groups:
        answers: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(answers, heard, group=group)
        for answer in answers:
            heard.update(answer)
    if isinstance(own, Failure):
        raise own.error
    messages = {other: unpack(heard[other], other, step) if other != rank else own for other in sorted(heard)}
    failures = tuple(message for message in messages.values() if isinstance(message, Failure))
    if failures:
        raise Abort(step, failures).exception()
    return {other: message.value for other, message in messages.items() if isinstance(message, Ok)}


def gather_tree(step: str, make: Callable[[], Any], meshes: list[DeviceMesh], *, cpu_offload: bool) -> Any:
    """Return the tree that `make` returns, with whole tensors in place of DTensors. All ranks of `meshes` call this.

    Args:
        step: what the errors call it.
        make: what it raises on one rank reaches all ranks before any tensor travels.
        meshes: those of the model, in the same order on each of their ranks.
        cpu_offload: results go to the CPU, and only global rank 0 gets them; others get empty dicts.
    """
    rank = current_rank()
    made = attempt(rank, step, make)
    digests = {_mesh_key(mesh): _digest(made.value, mesh) for mesh in meshes} if isinstance(made, Ok) else {}
    told = Ok(digests) if isinstance(made, Ok) else made
    heard = agree(step, told, [mesh.get_group(axis) for mesh in meshes for axis in range(mesh.ndim)])
    for mesh in meshes:
        key = _mesh_key(mesh)
        odd = [other for other in mesh.mesh.flatten().tolist() if heard[other].get(key) != digests[key]]
        if odd:
            raise RuntimeError(
                f"Expected the same sharded tensors on all ranks of a mesh but rank {rank} and ranks {odd} differ in "
                "keys, shapes, dtypes or placements. Build model and optimizer alike on all of them."
            )
    assert isinstance(made, Ok)
    keep = not cpu_offload or rank == 0

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and is_sharded(leaf):
            leaf = _gather(leaf)
        if not keep or not isinstance(leaf, torch.Tensor):
            return leaf if keep else None
        return leaf.cpu() if cpu_offload else leaf

    full = map_tree(whole, made.value)
    return full if keep else tuple({} for _ in full)


def shard_like(name: str, full: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of the whole tensor `full`, laid out as `target`; nothing is communicated.

    Args:
        name: for the error message.
        full: any dtype, which is kept; any device.
        target: a DTensor, or a plain tensor: then `full` itself is returned, or a copy on a real device.
    """
    if full.shape != target.shape:
        raise RuntimeError(f"Expected shape {tuple(target.shape)} for {name!r} but got {tuple(full.shape)}.")
    if not isinstance(target, DTensor):
        return full
    device = target.device_mesh.device_type if target.is_meta else target.device
    part = torch.empty_like(target.detach(), dtype=full.dtype, device=device)
    assert isinstance(part, DTensor)
    for box in local_boxes(name, part):
        assert box.data is not None
        box.data.copy_(full[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))])
    return part


@dataclass(frozen=True)
class Announced:
    """A tensor that rank 0 holds and will send."""

    index: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass(eq=False)
class Pending:
    """A leaf still to be cut to shape: `source` whole, or announced; `target` None to take it whole."""

    name: str
    source: torch.Tensor | Announced
    target: torch.Tensor | None


def announce(step: str, tree: Any) -> tuple[Any, list[Any]]:
    """Return rank 0's tree on all ranks, with `Announced` in place of its tensors; and, on rank 0, these tensors.

    Scalars travel within the tree. Collective on the default group; what fails on rank 0 is raised by all ranks.
    """
    rank, sent = current_rank(), []

    def outline(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if is_sharded(leaf):
            raise ValueError(f"Expected full tensors on rank 0 but got a {type(leaf).__name__}. Get the full state.")
        if leaf.dim() == 0:
            return leaf.detach().cpu()
        sent.append(leaf.detach())
        return Announced(len(sent) - 1, leaf.shape, leaf.dtype)

    message: Message | None = attempt(rank, step, lambda: map_tree(outline, tree)) if rank == 0 else None
    if dist.is_initialized():
        raw = [pack(message, rank, step)[0] if message is not None else None]
        dist.broadcast_object_list(raw, src=0)
        assert raw[0] is not None
        message = pack(message, rank, step)[1] if message is not None else unpack(raw[0], 0, step)
    if isinstance(message, Failure):
        raise message.error if rank == 0 else Abort(step, (message,)).exception()
    assert isinstance(message, Ok)
    return message.value, sent


def realize(prepared: Any, outline: Any, sent: list[Any], device: torch.device) -> Any:
    """Return `prepared` with each `Pending` leaf cut to shape.

    Announced tensors are sent one by one, so that a rank never holds more than one whole tensor.

    Args:
        prepared: a tree; may use any part of `outline`, also twice.
        outline: what `announce` returned, or anything without announced tensors: then nothing is communicated.
        sent: the tensors on rank 0.
        device: where tensors travel.
    """
    waiting: dict[int, list[Pending]] = {}
    done: dict[int, torch.Tensor] = {}
    for _, leaf in leaves_of(prepared):
        if isinstance(leaf, Pending) and isinstance(leaf.source, Announced):
            waiting.setdefault(leaf.source.index, []).append(leaf)
    for _, leaf in leaves_of(outline):
        if isinstance(leaf, Announced):
            full = _broadcast(leaf, sent[leaf.index] if sent else None, device)
            for pending in waiting.get(leaf.index, ()):
                # A copy, since on rank 0 it may be the very tensor that was given.
                done[id(pending)] = (
                    full.clone() if pending.target is None else shard_like(pending.name, full, pending.target)
                )

    def finished(leaf: Any) -> Any:
        if not isinstance(leaf, Pending):
            return leaf
        if isinstance(leaf.source, Announced):
            return done[id(leaf)]
        return leaf.source if leaf.target is None else shard_like(leaf.name, leaf.source, leaf.target)

    return map_tree(finished, prepared)


def _broadcast(what: Announced, tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    if tensor is None:
        tensor = torch.empty(what.shape, dtype=what.dtype, device=device)
    tensor = tensor.to(device).contiguous()
    if tensor.numel() and dist.is_initialized():
        # As bytes: a communication backend knows some dtypes only.
        dist.broadcast(tensor.view(torch.uint8), src=0)
    return tensor


def _gather(value: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, DTensor):
        raise NotImplementedError(
            f"Expected DTensors but got a {type(value).__name__}. Gather it before, or shard with DTensor."
        )
    local = value.to_local()
    if local.device.type != value.device_mesh.device_type:
        local = local.to(value.device_mesh.device_type)
    if not value.dim() or not all(
        isinstance(placement, Shard | _StridedShard | Replicate) for placement in value.placements
    ):
        return value.full_tensor()
    # As bytes, in one more dim: a communication backend knows some dtypes only.
    size = torch.Size([*value.size(), value.element_size()])
    raw = local.contiguous().unsqueeze(-1).view(torch.uint8)
    stride = torch.empty(size, device="meta").stride()
    whole = DTensor.from_local(raw, value.device_mesh, value.placements, run_check=False, shape=size, stride=stride)
    return whole.full_tensor().view(value.dtype).squeeze(-1)


def _mesh_key(mesh: DeviceMesh) -> str:
    return repr(mesh.mesh.tolist())


def _digest(tree: Any, mesh: DeviceMesh) -> str:
    """Return a fingerprint of the DTensors on `mesh`: ranks that gather them must have the same, in the same order."""
    digest = hashlib.sha256()
    for path, leaf in leaves_of(tree):
        if isinstance(leaf, DTensor) and leaf.device_mesh == mesh:
            digest.update(f"{path} {tuple(leaf.shape)} {leaf.dtype} {leaf.placements}\n".encode())
    return digest.hexdigest()
