"""A storage in memory for the tests of planners: it does what is asked, and keeps what it was asked for."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from dcpbench.geometry import Box
from dcpbench.protocol_seen import Planned
from dcpbench.simulate.scripted import raw_of

__all__ = ["MemoryReader", "MemoryStore", "MemoryWriter"]


@dataclass
class MemoryStore:
    """The checkpoints of a run, by their ids."""

    items: dict[str, dict[MetadataIndex, torch.Tensor | bytes]] = field(default_factory=dict)
    metadata: dict[str, Metadata] = field(default_factory=dict)


class MemoryWriter(StorageWriter):
    """Asks the planner for each item twice, and keeps both answers in ``planned``.

    Args:
        asks_twice: False asks once, and keeps none.
    """

    def __init__(self, store: MemoryStore, checkpoint_id: str, rank: int, *, asks_twice: bool = True) -> None:
        self._store, self._rank, self._times = store, rank, 2 if asks_twice else 1
        self.reset(checkpoint_id)

    def reset(self, checkpoint_id: Any = None) -> None:
        self._id = str(checkpoint_id)
        self.planned: list[Planned] = []

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._store.items.setdefault(self._id, {})

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        held, results = self._store.items[self._id], []
        for item in plan.items:
            answers = [planner.resolve_data(item) for _ in range(self._times)]
            if self._times > 1:
                self.planned.append(self._noted(item, answers))
            last = answers[-1]
            held[item.index] = last.detach().clone() if isinstance(last, torch.Tensor) else last.getvalue()
            results.append(WriteResult(item.index, 0, None))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._store.metadata[self._id] = metadata

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def _noted(self, item: WriteItem, answers: list[Any]) -> Planned:
        if item.tensor_data is None:
            return Planned(item.index.fqn, self._rank, None)
        chunk = item.tensor_data.chunk
        box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        tensors = [answer for answer in answers if isinstance(answer, torch.Tensor)]
        kinds = tuple(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in tensors)
        return Planned(item.index.fqn, self._rank, box, tuple(raw_of(tensor) for tensor in tensors), kinds)


class MemoryReader(StorageReader):
    """Fills what the planner gives, and commits it."""

    def __init__(self, store: MemoryStore, checkpoint_id: str) -> None:
        self._store = store
        self.reset(checkpoint_id)

    def reset(self, checkpoint_id: Any = None) -> None:
        self._id = str(checkpoint_id)
        self.num_read: dict[str, int] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._id not in self._store.metadata:
            raise FileNotFoundError(f"no checkpoint {self._id!r}")
        return self._store.metadata[self._id]

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        return

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        held = self._store.items[self._id]
        for item in plan.items:
            source = held[item.storage_index]
            if item.type == LoadItemType.BYTE_IO or not isinstance(source, torch.Tensor):
                planner.load_bytes(item, io.BytesIO(source if isinstance(source, bytes) else b""))
                continue
            fqn = item.dest_index.fqn
            self.num_read[fqn] = self.num_read.get(fqn, 0) + item.lengths.numel()
            if source.size() != item.lengths:
                for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    source = source.narrow(dim, offset, length)
            target = planner.resolve_tensor(item)
            target.detach().copy_(source)
            planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
