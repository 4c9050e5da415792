"""From a case to real tensors on one rank, and back to bytes. Runs on ranks.

Sources hold the content of the case. Destinations hold other bytes in every element, inside storages whose remaining
bytes are a pattern, so that an element that was never read and a write beside the shard both show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from dcpbench.case import Case, Layout, MemoryForm, Misuse, Part, Placement, Step, TensorLeaf
from dcpbench.content import DTYPES, Bytes, overwritten
from dcpbench.geometry import Region
from dcpbench.ranks.meshes import mesh_of

__all__ = ["NEVER_LOADED", "Built", "BuiltTensor", "build", "find", "tensor_bytes"]

GUARD_BYTES = 64
PATTERN = 0xA5
NEVER_LOADED = "dcpbench: this value was never loaded"


class Unsavable:
    """A value that raises when it is pickled, or copied."""

    def __reduce_ex__(self, protocol: object) -> str:
        raise RuntimeError("dcpbench: this value cannot be pickled")


_CONJUGABLE = ("complex64", "complex128")
"""complex32 is not: torch negates its imaginary part through float32, where signalling NaNs turn quiet."""


@dataclass(slots=True)
class BuiltTensor:
    """A tensor that was put into a state dict, and what must still hold of it after a load."""

    leaf: TensorLeaf
    path: tuple[Part, ...]
    given: torch.Tensor
    local: torch.Tensor | None
    data_ptr: int


@dataclass(slots=True)
class Built:
    """A state dict, with one entry per tensor leaf: None where the step does not ask for it."""

    state_dict: dict[str, Any]
    tensors: list[BuiltTensor | None]


def build(case: Case, number: int, rank: int, device: str) -> Built:
    """Returns the state dict of step ``number`` on ``rank``: the source of a save or the destination of a load.

    All ranks of the step must call it, since a mesh is made by all ranks together.
    """
    step = case.steps[number]
    layout = case.layouts[step.layout]
    has_shards = any(leaf.placements is not None for leaf in layout.leaves)
    maker = _Maker(case, number, rank, device, mesh_of(layout.mesh, device) if has_shards else None)
    tensors: list[BuiltTensor] = []
    for index in range(len(case.tensors)):
        tensors.append(maker.tensor(index, tensors))
    placed: list[tuple[tuple[Part, ...], Any]] = [(held.path, held.given) for held in tensors]
    is_source = step.action == "save"
    for index, leaf in enumerate(case.objects, len(tensors)):
        value = leaf.value(step.version) if is_source else NEVER_LOADED
        placed.append((maker.path(index), Unsavable() if maker.misuse_of(index) == "unsavable" else value))
    asked_for = set(case.asked_for(number))
    placed = [one for index, one in enumerate(placed) if index in asked_for]
    if not is_source and case.seed % 2:
        placed.reverse()  # nothing may depend on the order in which keys were put in
    return Built(_nest(placed), [held if index in asked_for else None for index, held in enumerate(tensors)])


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes the tensors of one step on one rank."""

    case: Case
    number: int
    rank: int
    device: str
    mesh: DeviceMesh | None

    @property
    def step(self) -> Step:
        return self.case.steps[self.number]

    @property
    def layout(self) -> Layout:
        return self.case.layouts[self.step.layout]

    def tensor(self, index: int, earlier: list[BuiltTensor]) -> BuiltTensor:
        leaf, path = self.case.tensors[index], self.path(index)
        if leaf.tied_to is not None and self.misuse_of(index) == "none":
            tied = earlier[leaf.tied_to]
            return BuiltTensor(leaf, path, tied.given, tied.local, tied.data_ptr)
        shape = self._shape(index)
        region = self.layout.region(index, shape, self.rank)
        local = None if region is None else self._local(index, region, shape)
        if local is not None and leaf.requires_grad:
            local = local.detach().requires_grad_()
        given = self._distribute(index, local, shape)
        return BuiltTensor(leaf, path, given, local, local.data_ptr() if local is not None else 0)

    def misuse_of(self, index: int) -> Misuse:
        step = self.step
        return step.misuse if index == step.misused and step.misused_on in (None, self.rank) else "none"

    def path(self, index: int) -> tuple[Part, ...]:
        """Returns where leaf ``index`` hangs, wrong on purpose where the step says so."""
        path = self.case.leaves[index].path
        if self.misuse_of(index) == "unknown-key":
            return (*path[:-1], Part("key", f"{path[-1].value}_unknown"))
        return path

    def _shape(self, index: int) -> tuple[int, ...]:
        """Returns the global shape of a tensor, wrong on purpose where the step says so."""
        shape = self.case.tensors[index].shape
        match self.misuse_of(index):
            case "larger":
                return (shape[0] + 1, *shape[1:])
            case "smaller":
                return (shape[0] - 1, *shape[1:])
            case "extra-dim":
                return (*shape, 1)
        return shape

    def _local(self, index: int, region: Region, shape: tuple[int, ...]) -> torch.Tensor:
        case, step, leaf = self.case, self.step, self.case.tensors[index]
        memory = self.layout.leaves[index].memory
        if step.action == "save":
            if leaf.expanded and region.numel:
                row = Region((((0, 1),), *region.runs[1:]))
                data = case.expected_bytes(index, step.version, row)
                return _allocate(data, row.shape, leaf.dtype, memory, self.device, guard_bytes=0).expand(region.shape)
            data = case.expected_bytes(index, step.version, region)
            if memory == "conjugated" and leaf.dtype in _CONJUGABLE:
                data = data.copy()
                data[:, -1] ^= 0x80  # the sign of the imaginary part, which the view turns again
                return _allocate(data, region.shape, leaf.dtype, memory, self.device, guard_bytes=0).conj()
            return _allocate(data, region.shape, leaf.dtype, memory, self.device, guard_bytes=0)
        if shape == leaf.shape:
            version = case.version_at(self.number) or 0
            data = overwritten(case.expected_bytes(index, version, region), leaf.dtype)
        else:
            data = np.zeros((region.numel, DTYPES[leaf.dtype]), dtype=np.uint8)
        return _allocate(data, region.shape, leaf.dtype, memory, self.device, guard_bytes=GUARD_BYTES)

    def _distribute(self, index: int, local: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns the tensor that goes into the state dict: the local one, or a DTensor around it."""
        placements = self.layout.leaves[index].placements
        if placements is None or self.mesh is None:
            assert local is not None, "a plain tensor lies on every rank"
            return local
        dtype = cast("torch.dtype", getattr(torch, self.case.tensors[index].dtype))
        if local is None:
            requires_grad = self.case.tensors[index].requires_grad
            local = torch.empty(0, dtype=dtype, device=self.device, requires_grad=requires_grad)
        # as distribute_tensor ends; from_local would take an empty shape, that of a 0-d tensor, for none at all
        meta = TensorMeta(torch.Size(shape), _contiguous_stride(shape), dtype)
        spec = DTensorSpec(self.mesh, tuple(_placement(p) for p in placements), tensor_meta=meta)
        return DTensor(local.detach(), spec, requires_grad=local.requires_grad)  # type: ignore[no-untyped-call]


def _allocate(
    data: Bytes, shape: tuple[int, ...], dtype_name: str, memory: MemoryForm, device: str, *, guard_bytes: int
) -> torch.Tensor:
    """Returns a tensor of ``shape`` with ``data``, in a storage of its own that holds a pattern wherever else."""
    dtype = cast("torch.dtype", getattr(torch, dtype_name))
    size = DTYPES[dtype_name]
    steps = 2 if memory == "sliced" else 1
    outer = tuple(extent * steps + (steps - 1) for extent in shape)
    order = tuple(reversed(range(len(shape)))) if memory == "transposed" else tuple(range(len(shape)))
    strides = [0] * len(shape)
    stride = 1
    for dim in reversed(order):
        strides[dim] = stride * steps
        stride *= max(outer[dim], 1)
    num_elements = math.prod(outer) if memory == "sliced" else math.prod(shape)
    raw = np.full(num_elements * size + 2 * guard_bytes, PATTERN, dtype=np.uint8)
    if dtype_name == "bool":
        raw &= 1
    is_inset = memory == "sliced" and math.prod(shape) > 0
    offset = guard_bytes // size + (sum(s // steps for s in strides) if is_inset else 0)
    _view(raw, offset, shape, strides, size)[...] = data.reshape(*shape, size)
    storage = torch.from_numpy(raw).to(device).untyped_storage() if device != "cpu" else _cpu_storage(raw)
    empty = torch.empty(0, dtype=dtype, device=device)
    return empty.set_(storage, offset, shape, tuple(strides))


def _cpu_storage(raw: Bytes) -> torch.UntypedStorage:
    """Returns a storage that torch itself allocated: one that wraps numpy's memory cannot be resized or shared."""
    return torch.from_numpy(raw).clone().untyped_storage()


def _view(raw: Bytes, offset: int, shape: tuple[int, ...], strides: list[int] | tuple[int, ...], size: int) -> Bytes:
    along = (*(stride * size for stride in strides), 1)
    return np.ndarray((*shape, size), np.uint8, buffer=raw, offset=offset * size, strides=along)


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(max(1, size) for size in shape[dim + 1 :]) for dim in range(len(shape)))


def _placement(placement: Placement) -> TorchPlacement:
    if placement.dim is None:
        return Replicate()
    if placement.split_factor == 1:
        return Shard(placement.dim)
    return cast("TorchPlacement", _StridedShard(placement.dim, split_factor=placement.split_factor))


def _nest(placed: list[tuple[tuple[Part, ...], Any]]) -> dict[str, Any]:
    root: dict[Any, Any] = {}
    for path, value in placed:
        at: Any = root
        for part, following in zip(path, (*path[1:], None), strict=True):
            held: Any = value if following is None else [] if following.kind == "index" else {}
            if part.kind == "index":
                at.extend([None] * (int(part.value) + 1 - len(at)))
                if following is None or at[part.value] is None:
                    at[part.value] = held
            elif following is None:
                at[part.value] = held
            else:
                at.setdefault(part.value, held)
            at = at[part.value]
    return root


def find(state_dict: Any, path: tuple[Part, ...]) -> Any:
    """Returns what hangs at ``path``.

    Raises:
        LookupError: nothing does.
    """
    at = state_dict
    for part in path:
        if not isinstance(at, list if part.kind == "index" else dict):
            raise LookupError(part.value)
        at = at[cast("Any", part.value)]
    return at


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Returns the bytes of a local tensor, row-major; of no elements, no bytes."""
    # a clone, since contiguous() leaves odd strides along dims of size 1 as they are
    flat = tensor.detach().resolve_conj().clone(memory_format=torch.contiguous_format).reshape(-1).cpu()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def outside_intact(tensor: torch.Tensor) -> bool:
    """Reads as: every byte of the storage of ``tensor`` that is not an element of it is still the pattern."""
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    raw = storage.cpu().numpy().copy()
    pattern = PATTERN & 1 if tensor.dtype == torch.bool else PATTERN
    _view(raw, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.element_size())[...] = pattern
    return bool((raw == pattern).all())
