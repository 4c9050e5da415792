"""The bank of wrong backends: how one is entered, and the correct parts that each bends in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem, SavePlan
from torch.distributed.tensor import DTensor

from dcpbench import Case, EngineBackend, PlannerBackend, StorageBackend
from dcpbench.case import TensorLeaf
from tests.odd_backends import Background, Calls, Dense

__all__ = [
    "MUTANTS",
    "Background",
    "Calls",
    "Dense",
    "Engine",
    "LoadPlanner",
    "Mutant",
    "Reader",
    "SavePlanner",
    "SourcePlanner",
    "Writer",
    "any_key",
    "any_tensor",
    "any_value",
    "breaks",
    "local_of",
    "rank",
    "tensors_of",
    "world_size",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Mutant:
    """A backend with one planted defect.

    Attributes:
        backend, base: specifications of the backend, and of what it would be without its defect.
        defect: what is wrong with it, in a sentence.
        rules: any of them names the defect; the primary one first.
        suite: the strategy in ``dcpbench.cases`` that is most likely to show it.
        shows_on: says of a case whether the defect can show there; cases of which it says no are not worth running.
    """

    name: str
    backend: str
    base: str
    defect: str
    rules: tuple[str, ...]
    suite: str
    shows_on: Callable[[Case], bool]


MUTANTS: dict[str, Mutant] = {}

_PLANNERS: dict[str, Any] = {"save_planner": dcp.DefaultSavePlanner, "load_planner": dcp.DefaultLoadPlanner}
"""With all of their options, as the backend ``torch`` has them."""


def any_tensor(is_meant: Callable[[TensorLeaf], Any]) -> Callable[[Case], bool]:
    """Returns a predicate over cases: some tensor is meant."""
    return lambda case: any(is_meant(leaf) for leaf in case.tensors)


def any_value(is_meant: Callable[[Any], Any]) -> Callable[[Case], bool]:
    """Returns a predicate over cases: some value that is no tensor is meant."""
    return lambda case: any(is_meant(leaf.value(0)) for leaf in case.objects)


def any_key(is_meant: Callable[[str], Any]) -> Callable[[Case], bool]:
    """Returns a predicate over cases: some flattened key is meant."""
    return lambda case: any(is_meant(leaf.fqn) for leaf in (*case.tensors, *case.objects))


def breaks(
    *rules: str, suite: str = "resharding", on: Callable[[Case], bool] = lambda case: True
) -> Callable[[type], Any]:
    """Returns a class decorator that enters a bent part into the bank and makes a backend of it."""

    def enter(part: type) -> Any:
        name, base = part.__name__, "tests.odd_backends:dense" if issubclass(part, Dense) else "torch"
        base = "tests.odd_backends:background" if issubclass(part, Background) else base
        backend = f"{part.__module__}:{name}"
        assert name not in MUTANTS, f"two mutants are called {name}"
        MUTANTS[name] = Mutant(name, backend, base, (part.__doc__ or "").strip(), rules, suite, on)
        if issubclass(part, Calls):
            return part().backend(name)
        if issubclass(part, Engine | Dense):
            engine = part()
            return EngineBackend(name, engine.save, engine.load)
        if issubclass(part, dcp.StorageWriter):
            return StorageBackend(name, part, dcp.FileSystemReader, **_PLANNERS)
        if issubclass(part, dcp.StorageReader):
            return StorageBackend(name, dcp.FileSystemWriter, part, **_PLANNERS)
        if issubclass(part, dcp.SavePlanner):
            return PlannerBackend(name, part, dcp.DefaultLoadPlanner)
        return PlannerBackend(name, dcp.DefaultSavePlanner, part)

    return enter


def rank() -> int:
    """Returns the number of this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what this rank holds of a tensor, not detached from the tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Returns all tensors of a state dict."""
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for child in children for tensor in tensors_of(child)]


class Engine:
    """torch's own save and load."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        dcp.save(state_dict, checkpoint_id=checkpoint_id)

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        dcp.load(state_dict, checkpoint_id=checkpoint_id)


class Writer(dcp.FileSystemWriter):
    """torch's file writer, without fsync."""

    def __init__(self, path: str) -> None:
        super().__init__(path, sync_files=False)


class Reader(dcp.FileSystemReader):
    """torch's file reader: a subclass says which read items to bend, and how."""

    def bend(self, item: ReadItem) -> ReadItem | None:
        """Returns what is read in place of a tensor's ``item``; None leaves it out."""
        return item

    def prepare_local_plan(self, plan: Any) -> Any:
        bent = [self.bend(item) if item.type == LoadItemType.TENSOR else item for item in plan.items]
        return dataclasses.replace(plan, items=[item for item in bent if item is not None])


class LoadPlanner(dcp.DefaultLoadPlanner):
    """torch's load planner."""


class SavePlanner(dcp.DefaultSavePlanner):
    """torch's save planner without its check of the global plan."""

    def dedup(self, plans: list[SavePlan]) -> list[SavePlan]:
        return self._dedup_save_plans(plans)

    def bend(self, fqn: str, tensor: TensorStorageMetadata) -> TensorStorageMetadata | None:
        """Returns what the metadata says of ``tensor`` in place of the truth; None for no word of it."""
        return tensor

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(self.dedup(all_plans))
        mappings = {fqn: path for plan in plans for fqn, path in (plan.planner_data or {}).items()}
        entries = {
            fqn: self.bend(fqn, entry) if isinstance(entry, TensorStorageMetadata) else entry
            for fqn, entry in metadata.state_dict_metadata.items()
        }
        held = {fqn: entry for fqn, entry in entries.items() if entry is not None}
        return plans, dataclasses.replace(metadata, state_dict_metadata=held, planner_data=mappings)


class SourcePlanner(dcp.DefaultSavePlanner):
    """torch's save planner: a subclass says how the tensors and values that are written are bent."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def value(self, value: Any) -> Any:
        return value

    def transform_object(self, write_item: Any, object: Any) -> Any:
        if isinstance(object, torch.Tensor):
            return self.tensor(object)
        return super().transform_object(write_item, self.value(object))
