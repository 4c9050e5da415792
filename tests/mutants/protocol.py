"""Storages and planners that are wrong in themselves, each by one planted defect: what the protocol suite must find.

In a bank of their own: most of them do well under torch's own planners and storage, in rank order, without failures.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, SavePlan, WriteItemType

import reference
from dcpbench import PlannerBackend, StorageBackend
from tests.mutants.bank import Reader, Writer
from tests.odd_backends.storage import ItemReader, Items, ItemWriter

__all__ = ["PROTOCOL_MUTANTS", "ProtocolMutant"]


@dataclasses.dataclass(frozen=True, slots=True)
class ProtocolMutant:
    """A storage or a pair of planners with one planted defect.

    Attributes:
        backend: its specification.
        defect: what is wrong with it, in a sentence.
        rule: that names the defect.
        strategy: in ``dcpbench.protocol``, that shows it.
    """

    name: str
    backend: str
    defect: str
    rule: str
    strategy: str


PROTOCOL_MUTANTS: dict[str, ProtocolMutant] = {}


def shown_by(strategy: str, rule: str, reader: Any = dcp.FileSystemReader) -> Callable[[type], Any]:
    """Returns a class decorator that enters a bent part into the bank and makes a backend of it."""

    def enter(part: type) -> Any:
        name = part.__name__
        backend = f"{part.__module__}:{name}"
        PROTOCOL_MUTANTS[name] = ProtocolMutant(name, backend, (part.__doc__ or "").strip(), rule, strategy)
        if issubclass(part, dcp.StorageWriter):
            return StorageBackend(name, part, reader)
        if issubclass(part, dcp.StorageReader):
            return StorageBackend(name, Writer, part)
        if issubclass(part, dcp.SavePlanner):
            return PlannerBackend(name, part, dcp.DefaultLoadPlanner)
        return PlannerBackend(name, dcp.DefaultSavePlanner, part)

    return enter


@shown_by("storages", "R001")
class needs_items_on_each_rank(Writer):
    """Takes for granted that each rank has something to write."""

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        if not plan.items:
            raise IndexError("list index out of range")
        return super().write_data(plan, planner)


@shown_by("storages", "R002")
class reads_from_the_start(Reader):
    """Reads so many elements as are asked for, always from the start of the item."""

    def bend(self, item: Any) -> Any:
        return dataclasses.replace(item, storage_offsets=torch.Size([0] * len(item.storage_offsets)))


class _Through:
    """Hands calls on to a planner."""

    def __init__(self, planner: Any) -> None:
        self.planner = planner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.planner, name)


class _Uncommitted(_Through):
    def commit_tensor(self, item: Any, tensor: torch.Tensor) -> None:
        pass


@shown_by("storages", "R003")
class never_commits(Reader):
    """Fills what resolve_tensor gives, and leaves it at that."""

    def read_data(self, plan: Any, planner: Any) -> Any:
        return super().read_data(plan, _Uncommitted(planner))


@shown_by("storages", "R004")
class reports_tensors_only(Writer):
    """Writes objects, and says nothing of them."""

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        objects = {item.index for item in plan.items if item.type == WriteItemType.BYTE_IO}
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result([one for one in super().write_data(plan, planner).value() if one.index not in objects])
        return done


@shown_by("storages", "R005")
class asks_for_what_it_likes(Writer):
    """Has a look at the start of each tensor, whoever holds it."""

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        for item in plan.items:
            if item.index.offset and any(item.index.offset):
                start = MetadataIndex(item.index.fqn, torch.Size([0] * len(item.index.offset)))
                planner.resolve_data(dataclasses.replace(item, index=start))
        return super().write_data(plan, planner)


@shown_by("storages", "R006")
class remembers_first_id(Writer):
    """Writes to the first checkpoint id that it was ever given."""

    def reset(self, checkpoint_id: Any = None) -> None:
        self.first = getattr(self, "first", checkpoint_id)
        super().reset(self.first)


@shown_by("storages", "R007")
class last_rank_clears(Writer):
    """Has each rank leave a note in the folder, which the coordinator clears when it is set up."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        folder = Path(self.path)
        folder.mkdir(parents=True, exist_ok=True)
        for note in folder.glob("*.note") if is_coordinator else ():
            note.unlink()
        self.note = folder / f"{id(self)}.note"
        self.note.touch()

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        self.note.unlink()
        return super().write_data(plan, planner)


@shown_by("stopped_storages", "R008")
class skips_what_fails(Writer):
    """Leaves out items whose data cannot be had."""

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        held = []
        for item in plan.items:
            try:
                planner.resolve_data(item)
            except RuntimeError:
                continue
            held.append(item)
        return super().write_data(dataclasses.replace(plan, items=held), planner)


@shown_by("stopped_storages", "R009", reference.FileSystemReader)
class clears_on_set_up(reference.FileSystemWriter):
    """Removes the checkpoint that it is to replace before it writes."""

    def __init__(self, path: str) -> None:
        super().__init__(path, sync_files=False)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        (Path(self.path) / ".metadata").unlink(missing_ok=True)


@shown_by("stopped_storages", "R010", lambda path: ItemReader(path, Items()))
class commits_while_writing(ItemWriter):
    """Writes the metadata as soon as it knows the plans."""

    def __init__(self, path: str) -> None:
        super().__init__(path, Items())

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        plans = super().prepare_global_plan(plans)
        metadata = Metadata({}, storage_data={})
        for plan in plans:
            for number, item in enumerate(plan.items):
                self.enter(metadata, item, f"{plan.storage_data}-{number}")
        (self.folder / "metadata.pkl").write_bytes(pickle.dumps(metadata))
        return plans

    def enter(self, metadata: Metadata, item: Any, name: str) -> None:
        data, entries = item.tensor_data, metadata.state_dict_metadata
        if data is None:
            entries[item.index.fqn] = BytesStorageMetadata()
            metadata.storage_data[item.index] = (name, torch.uint8, (5,))
            return
        entry = entries.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
        entry.chunks.append(data.chunk)
        metadata.storage_data[item.index] = (name, data.properties.dtype, tuple(data.chunk.sizes))


@shown_by("planners", "R011")
class keeps_all_replicas(dcp.DefaultSavePlanner):
    """Leaves each rank's plan as it is, replicas and all."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        _, metadata = super().create_global_plan(all_plans)
        return all_plans, metadata


@shown_by("planners", "R012")
class lists_whole_tensors(dcp.DefaultSavePlanner):
    """Lists each tensor as one chunk, however it is cut."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                entry.chunks = [ChunkStorageMetadata(torch.Size([0] * len(entry.size)), entry.size)]
        return plans, metadata


@shown_by("planners", "R013")
class gives_data_once(dcp.DefaultSavePlanner):
    """Lets go of what it has given."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        super().set_up_planner(*args, **kwargs)
        self.given: set[MetadataIndex] = set()

    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        is_first = write_item.index not in self.given
        self.given.add(write_item.index)
        return data if is_first or not isinstance(data, torch.Tensor) else torch.empty(0, dtype=data.dtype)


@shown_by("planners", "R014")
class reads_replicas_too(dcp.DefaultLoadPlanner):
    """Reads its last tensor twice."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        tensors = [item for item in plan.items if item.type == LoadItemType.TENSOR]
        return dataclasses.replace(plan, items=[*plan.items, *tensors[-1:]])


@shown_by("planners", "R015")
class loads_into_copies(dcp.DefaultLoadPlanner):
    """Gives copies to be filled, and never copies them back."""

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        return super().resolve_tensor(read_item).clone()
