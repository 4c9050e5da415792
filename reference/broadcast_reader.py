"""Loading a `torch.save` file into sharded tensors on many ranks: one rank reads, the others receive."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from .flatten import flatten
from .items import memory_of
from .layout import global_size, is_tensor_leaf, source_tensor
from .leaves import PlanningError
from .load_planner import DefaultLoadPlanner

__all__ = ["BroadcastingTorchSaveReader", "DynamicMetaLoadPlanner"]


@dataclass(frozen=True)
class _Parcel:
    """A tensor that the coordinator sends to all ranks."""

    fqn: str
    size: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Route:
    """What every rank receives, in the same order, whether or not it needs all of it."""

    parcels: tuple[_Parcel, ...]
    is_shared: bool


class BroadcastingTorchSaveReader(StorageReader):
    """Reads a `torch.save` file on one rank and broadcasts its tensors, one at a time, to the default group.

    To be used with `DynamicMetaLoadPlanner`. Only tensors can be loaded. What the file lacks, or holds in another
    shape, is refused before any destination changes. The file is unpickled, so load only what you trust.

    Args:
        checkpoint_id: the file.
        coordinator_rank: global rank that reads; must be the load's coordinator.

    Source: torch.distributed.checkpoint.format_utils.
    """

    def __init__(self, checkpoint_id: str | os.PathLike[str] | None = None, coordinator_rank: int = 0) -> None:
        self.checkpoint_id = checkpoint_id
        self.coordinator_rank = coordinator_rank
        self._tensors: dict[str, Any] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load, from `checkpoint_id` if given. All ranks."""
        if checkpoint_id:
            self.checkpoint_id = checkpoint_id

    def read_metadata(self) -> Metadata:
        """Return empty metadata: the file has none, and the planner makes its own."""
        return Metadata(state_dict_metadata={})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:  # noqa: ARG002
        """Check that the file is named and that the right rank reads it. All ranks.

        Raises:
            ValueError: no file is named, or the load's coordinator is not `coordinator_rank`.
        """
        if self.checkpoint_id is None:
            raise ValueError("Expected a torch.save file but got checkpoint_id=None. Give its path.")
        if is_coordinator and _is_distributed() and dist.get_world_size() > 1:
            rank = dist.get_rank()
            if rank != self.coordinator_rank:
                raise ValueError(
                    f"Expected rank {rank}, the coordinator of this load, to read the file but got "
                    f"coordinator_rank={self.coordinator_rank!r}."
                )

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged. All ranks.

        Raises:
            RuntimeError: the plan asks for an object.
        """
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise RuntimeError(
                    f"Expected only tensors but got {item.storage_index.fqn!r}, an object. Leave it out."
                )
        return plan

    def prepare_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Read the file, check it against every rank's plan, and tell all ranks what will be sent. Coordinator only.

        Raises:
            PlanningError: the file lacks a tensor, or holds it in another shape.
            ValueError: the load is not on the default group.
        """
        if len(global_plan) > 1 and len(global_plan) != dist.get_world_size():
            raise ValueError(
                f"Expected a load on all {dist.get_world_size()} ranks of the default group, or on one process alone, "
                f"but got {len(global_plan)} ranks. Leave process_group out."
            )
        assert self.checkpoint_id is not None
        held = torch.load(self.checkpoint_id, map_location="cpu", weights_only=False)
        self._tensors = {**flatten(held).leaves, **held}
        parcels = tuple(self._parcel(fqn, global_plan) for fqn in _names(global_plan))
        route = _Route(parcels, is_shared=len(global_plan) > 1)
        return [replace(plan, storage_data=route) for plan in global_plan]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Send or receive each tensor and fill what `plan` names. All ranks of the default group.

        A rank that fails goes on receiving to the end, so that no other is left waiting.
        """
        route: _Route = plan.storage_data
        items: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            items.setdefault(item.storage_index.fqn, []).append(item)
        failures: list[BaseException] = []
        for parcel in route.parcels:
            tensor = self._deliver(parcel, is_shared=route.is_shared)
            for item in items.get(parcel.fqn, ()):
                try:
                    _fill(planner, item, tensor)
                except BaseException as error:
                    failures.append(error)
        self._tensors = {}
        if failures:
            raise failures[0]
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether `checkpoint_id` is a file here."""
        return os.path.isfile(checkpoint_id)  # noqa: PTH113  also takes what is no path

    def _parcel(self, fqn: str, plans: list[LoadPlan]) -> _Parcel:
        held = self._tensors.get(fqn)
        if not isinstance(held, torch.Tensor):
            got = "nothing" if fqn not in self._tensors else f"a {type(held).__qualname__}"
            raise PlanningError(f"Expected a tensor {fqn!r} in {str(self.checkpoint_id)!r} but got {got}.")
        size = tuple(held.size())
        for rank, plan in enumerate(plans):
            wanted = plan.planner_data.get(fqn, size) if isinstance(plan.planner_data, dict) else size
            if tuple(wanted) != size:
                raise PlanningError(
                    f"Expected {fqn!r} to have shape {tuple(wanted)}, as on rank {rank}, but got {size} in the file."
                )
        return _Parcel(fqn, size, held.dtype)

    def _deliver(self, parcel: _Parcel, *, is_shared: bool) -> torch.Tensor:
        if parcel.fqn in self._tensors:
            tensor: torch.Tensor = self._tensors[parcel.fqn].detach().resolve_conj().resolve_neg().contiguous()
        else:
            tensor = torch.empty(parcel.size, dtype=parcel.dtype)
        num_bytes = math.prod(parcel.size) * parcel.dtype.itemsize
        if is_shared and num_bytes:
            # As bytes, because communication backends know few dtypes.
            raw = torch.frombuffer(memory_of(tensor), dtype=torch.uint8)
            device = _group_device()
            sent = raw if device.type == "cpu" else raw.to(device)
            dist.broadcast(sent, src=self.coordinator_rank)
            if sent is not raw:
                raw.copy_(sent)
        return tensor


class DynamicMetaLoadPlanner(DefaultLoadPlanner):
    """Plans a load from a file that has no metadata: what the destination asks for is taken to be there.

    To be used with `BroadcastingTorchSaveReader`. Only tensors can be loaded.
    """

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,  # noqa: ARG002  there is none
        is_coordinator: bool = False,
    ) -> None:
        """Take the destination, and make metadata in which each of its tensors is one chunk. All ranks.

        Raises:
            RuntimeError: a value is no tensor.
        """
        super().set_up_planner(state_dict, None, is_coordinator)
        entries: dict[str, Any] = {}
        for fqn, value in self.state_dict.items():
            if not is_tensor_leaf(value):
                raise RuntimeError(
                    f"Expected only tensors but got {fqn!r}, a {type(value).__qualname__}. Leave it out."
                )
            size = global_size(value)
            whole = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
            entries[fqn] = TensorStorageMetadata(TensorProperties(dtype=source_tensor(value).dtype), size, [whole])
        # Once more with the metadata, so that meta tensors get memory.
        super().set_up_planner(state_dict, Metadata(state_dict_metadata=entries), is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        """Return the reads of this rank, with each tensor's whole shape for the reader to check. All ranks."""
        plan = super().create_local_plan()
        assert self.metadata is not None
        sizes = {fqn: tuple(entry.size) for fqn, entry in self.metadata.state_dict_metadata.items()}  # type: ignore[union-attr]
        return replace(plan, planner_data=sizes)


def _names(plans: list[LoadPlan]) -> list[str]:
    return list(dict.fromkeys(item.storage_index.fqn for plan in plans for item in plan.items))


def _fill(planner: LoadPlanner, item: ReadItem, tensor: torch.Tensor) -> None:
    # A planner may have described the whole as several chunks: what it asks for is relative to one of them.
    begin = item.storage_index.offset or (0,) * tensor.dim()
    for dim, (offset, inner, length) in enumerate(zip(begin, item.storage_offsets, item.lengths, strict=True)):
        tensor = tensor.narrow(dim, offset + inner, length)
    target = planner.resolve_tensor(item).detach()
    if target.dtype != tensor.dtype:
        warnings.warn(
            f"{item.dest_index.fqn!r} was saved as {tensor.dtype} and is loaded as {target.dtype}: "
            "values are converted.",
            stacklevel=2,
        )
    target.copy_(tensor)
    planner.commit_tensor(item, target)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _group_device() -> torch.device:
    """Return where the default group broadcasts: the CPU if it can."""
    devices = dist.distributed_c10d._get_default_group()._device_types
    if torch.device("cpu") in devices:
        return torch.device("cpu")
    return torch.device(devices[0].type, torch.get_device_module(devices[0]).current_device())
