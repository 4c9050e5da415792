"""From a case to real tensors on one rank, and back to bytes. Runs on ranks.

Sources hold the content of the case. Destinations hold other bytes in every element, inside storages whose remaining
bytes are a pattern, so that an element that was never read and a write beside the shard both show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from dcpbench.case import Case, Layout, MemoryForm, Mesh, Misuse, Part, Step, TensorLeaf
from dcpbench.content import DTYPES, Bytes
from dcpbench.geometry import Region
from dcpbench.objects import NEVER_LOADED
from dcpbench.ranks.dtensors import dtensor
from dcpbench.ranks.meshes import mesh_of
from dcpbench.ranks.stateful import Keeper, Unsavable

__all__ = ["Built", "BuiltTensor", "build", "find", "taken_from", "tensor_bytes"]

GUARD_BYTES = 64
PATTERN = 0xA5


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
    sharded = [index for index, leaf in enumerate(layout.leaves) if leaf.placements is not None]
    meshes = {mesh: mesh_of(mesh, device) for mesh in dict.fromkeys(layout.mesh_of(index) for index in sharded)}
    maker = _Maker(case, number, rank, device, meshes)
    asked_for = set(case.asked_for(number, rank))
    wanted = asked_for | {leaf.tied_to for index, leaf in enumerate(case.tensors) if index in asked_for}
    tensors: list[BuiltTensor | None] = []
    for index in range(len(case.tensors)):
        tensors.append(maker.tensor(index, tensors) if index in wanted else None)
    placed: list[tuple[tuple[Part, ...], Any]] = [
        (held.path, held.given) for index, held in enumerate(tensors) if held and index in asked_for
    ]
    for index, leaf in enumerate(case.objects, len(tensors)):
        if index in asked_for:
            value = leaf.value(step.version, rank) if step.saves else NEVER_LOADED
            misuse = maker.misuse_of(index)
            wrong: dict[str, Callable[[], Any]] = {"unsavable": Unsavable, "other-kind": lambda: torch.zeros(3)}
            placed.append((maker.path(index), wrong[misuse]() if misuse in wrong else value))
    if not step.saves and case.seed % 2:
        placed.reverse()  # nothing may depend on the order in which keys were put in
    state_dict = _nest(placed)
    for key in case.options.statefuls:
        if isinstance(state_dict.get(key), dict):
            fails = step.misuse == "failing-stateful" and step.misused_on in (None, rank)
            state_dict[key] = Keeper(state_dict[key], fails=fails)
    return Built(state_dict, [held if index in asked_for else None for index, held in enumerate(tensors)])


def taken_from(case: Case, number: int, state_dict: dict[str, Any]) -> Built:
    """Returns a state dict that came from elsewhere, as if it had been built for step ``number``."""
    asked_for, tensors = set(case.asked_for(number, 0)), list[BuiltTensor | None]()
    for index in range(len(case.tensors)):
        leaf = case.tensor(index, case.version_held(number))
        try:
            found = find(state_dict, leaf.path)
        except LookupError:
            found = None
        given = found if isinstance(found, torch.Tensor) else torch.empty(0)
        held = BuiltTensor(leaf, leaf.path, given, given, given.data_ptr())
        tensors.append(held if index in asked_for else None)
    return Built(state_dict, tensors)


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes the tensors of one step on one rank."""

    case: Case
    number: int
    rank: int
    device: str
    meshes: dict[Mesh, DeviceMesh]

    @property
    def step(self) -> Step:
        return self.case.steps[self.number]

    @property
    def layout(self) -> Layout:
        return self.case.layouts[self.step.layout]

    def tensor(self, index: int, earlier: list[BuiltTensor | None]) -> BuiltTensor:
        leaf, path = self.case.tensor(index, self.case.version_held(self.number)), self.path(index)
        tied = None if leaf.tied_to is None else earlier[leaf.tied_to]
        if tied is not None and self.misuse_of(index) == "none":
            return BuiltTensor(leaf, path, tied.given, tied.local, tied.data_ptr)
        shape = self.case.shape_asked(index, self.number, self.rank)
        region = self.layout.region(index, shape, self.rank)
        local = None if region is None else self._local(index, leaf, region)
        if local is not None and leaf.requires_grad:
            local = local.detach().requires_grad_()
        given = self._distribute(index, leaf, local, shape)
        return BuiltTensor(leaf, path, given, local, local.data_ptr() if local is not None else 0)

    def misuse_of(self, index: int) -> Misuse:
        return self.case.misuse_of(self.number, index, self.rank)

    def path(self, index: int) -> tuple[Part, ...]:
        """Returns where leaf ``index`` hangs, wrong on purpose where the step says so."""
        path = self.case.leaves[index].path
        if self.misuse_of(index) == "unknown-key":
            return (*path[:-1], Part("key", f"{path[-1].value}_unknown"))
        return path

    def _local(self, index: int, leaf: TensorLeaf, region: Region) -> torch.Tensor:
        case, step = self.case, self.step
        memory = self.layout.leaves[index].memory
        if not step.saves:
            data = case.destination_bytes(index, self.number, self.rank)
            return _allocate(data, region.shape, leaf.dtype, memory, self.device, guard_bytes=GUARD_BYTES)
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

    def _distribute(
        self, index: int, leaf: TensorLeaf, local: torch.Tensor | None, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Returns the tensor that goes into the state dict: the local one, or a DTensor around it."""
        placements = self.layout.leaves[index].placements
        if placements is None:
            assert local is not None, "a plain tensor lies on every rank that holds it"
            return local
        dtype = cast("torch.dtype", getattr(torch, leaf.dtype))
        if local is None:
            local = torch.empty(0, dtype=dtype, device=self.device, requires_grad=leaf.requires_grad)
        return dtensor(local, shape, self.meshes[self.layout.mesh_of(index)], placements, dtype)


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
    pattern = PATTERN & 1 if dtype_name == "bool" else PATTERN
    raw = np.full(num_elements * size + 2 * guard_bytes, pattern, dtype=np.uint8)
    is_inset = memory == "sliced" and math.prod(shape) > 0
    offset = guard_bytes // size + (sum(s // steps for s in strides) if is_inset else 0)
    _view(raw, offset, shape, strides, size)[...] = data.reshape(*shape, size)
    # torch's own memory: a storage that numpy knows, on either side, can neither be resized nor shared
    storage = torch.from_numpy(raw).to(device, copy=True).untyped_storage()
    return torch.empty(0, dtype=dtype, device=device).set_(storage, offset, shape, tuple(strides))


def _view(raw: Bytes, offset: int, shape: tuple[int, ...], strides: list[int] | tuple[int, ...], size: int) -> Bytes:
    along = (*(stride * size for stride in strides), 1)
    return np.ndarray((*shape, size), np.uint8, buffer=raw, offset=offset * size, strides=along)


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
        at = at.held if isinstance(at, Keeper) else at
        if not isinstance(at, list if part.kind == "index" else dict):
            raise LookupError(part.value)
        at = at[cast("Any", part.value)]
    return at


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Returns the bytes of a local tensor, row-major; of no elements, no bytes."""
    tensor = tensor.detach().resolve_conj()
    if tensor.element_size() == 1:
        tensor = tensor.view(torch.uint8)  # torch cannot transpose every dtype of one byte
    # a clone, since contiguous() leaves odd strides along dims of size 1 as they are
    flat = tensor.clone(memory_format=torch.contiguous_format).reshape(-1).cpu()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def outside_intact(tensor: torch.Tensor) -> bool:
    """Reads as: every byte of the storage of ``tensor`` that is not an element of it is still the pattern."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return True  # there is none
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    raw = storage.cpu().numpy().copy()
    pattern = PATTERN & 1 if tensor.dtype == torch.bool else PATTERN
    _view(raw, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.element_size())[...] = pattern
    return bool((raw == pattern).all())
