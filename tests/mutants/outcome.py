"""Mutants that end a step in the wrong way: refuse what is good, accept what is bad, hang, die."""

from __future__ import annotations

import copy
import logging
import os
import queue
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan
from torch.distributed.checkpoint.planner_helpers import _create_read_items
from torch.distributed.tensor import DTensor

from dcpbench import Case
from tests.mutants.bank import (
    Engine,
    LoadPlanner,
    SourcePlanner,
    Writer,
    any_key,
    any_tensor,
    breaks,
    local_of,
    rank,
    tensors_of,
    world_size,
)


@breaks("R501", suite="round_trips", on=any_tensor(lambda leaf: 0 in leaf.shape))
class refuses_empty_tensors(SourcePlanner):
    """Refuses to write a shard without elements."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.numel():
            raise ValueError("cannot write an empty tensor")
        return tensor


@breaks("R501", suite="round_trips", on=any_key(lambda fqn: "/" in fqn))
class refuses_slashes(Writer):
    """Makes a file per key, and so fails on keys with a slash."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        for item in plan.items:
            name = (
                item.index.fqn.encode("utf-8", "surrogatepass").hex() if "/" not in item.index.fqn else item.index.fqn
            )
            Path(self.path, f"{name[:100]}.lock").touch()
        return super().write_data(plan, planner)


@breaks("R501", suite="round_trips", on=lambda case: len(case.layouts[0].mesh.ranks) < case.layouts[0].world_size)
class refuses_partial_mesh(SourcePlanner):
    """Fails on a rank that is no part of a tensor's mesh."""

    def create_local_plan(self) -> SavePlan:
        meshes = [value.device_mesh for value in self.state_dict.values() if isinstance(value, DTensor)]
        (*_,) = (len(mesh.get_coordinate()) for mesh in meshes)
        return super().create_local_plan()


@breaks("R502", suite="bad_loads", on=lambda case: any(step.misused_on for step in case.steps))
class silent_coordinator(Engine):
    """Keeps from the coordinator's caller what other ranks could not load."""

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        try:
            super().load(state_dict, checkpoint_id)
        except CheckpointException as error:
            if rank() or 0 in error.failures or world_size() == 1:
                raise


@breaks("R502", suite="bad_loads", on=lambda case: any(step.misused_on for step in case.steps))
class own_failures_only(Engine):
    """Raises on the ranks that failed, and lets the others go on."""

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        try:
            super().load(state_dict, checkpoint_id)
        except CheckpointException as error:
            if rank() in error.failures:
                raise


@breaks("R503", suite="round_trips", on=lambda case: case.layouts[0].world_size > 1)
class waits_for_ever(Writer):
    """Has a rank with nothing to write wait for data."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        return super().write_data(plan, planner) if plan.items else queue.Queue().get()


@breaks("R504", suite="round_trips", on=any_tensor(lambda leaf: not leaf.shape))
class exits_on_scalar(Engine):
    """Ends the process on a 0-d tensor."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        if any(not local_of(tensor).dim() for tensor in tensors_of(state_dict)):
            os._exit(3)
        super().save(state_dict, checkpoint_id)


def _asks_for_a_value(case: Case) -> bool:
    """Reads as: the leaf that is misused is no tensor."""
    return any(step.misuse == "unknown-key" and step.misused >= len(case.tensors) for step in case.steps)


class _LenientPlanner(LoadPlanner):
    """Loads what it can: a subclass says which missing keys and sizes it lets pass."""

    def lets_pass(self, fqn: str) -> bool:
        return True

    def create_local_plan(self) -> LoadPlan:
        known = self.metadata.state_dict_metadata
        held = {fqn: value for fqn, value in self.state_dict.items() if fqn in known or not self.lets_pass(fqn)}
        return create_default_local_load_plan(held, self.metadata)


@breaks("R505", suite="bad_loads")
class lenient_loader(_LenientPlanner):
    """Passes over keys that the checkpoint does not have."""


@breaks("R505", suite="bad_loads", on=lambda case: any(step.misused_on for step in case.steps))
class lenient_off_coordinator(_LenientPlanner):
    """Checks keys on the coordinator only."""

    def lets_pass(self, fqn: str) -> bool:
        return not self.is_coordinator


@breaks("R505", suite="bad_loads")
class lenient_below_top(_LenientPlanner):
    """Passes over missing keys of nested dicts."""

    def lets_pass(self, fqn: str) -> bool:
        return len(self.mappings[fqn]) > 1


@breaks("R505", suite="bad_loads")
class lenient_about_sizes(LoadPlanner):
    """Fills of a tensor what the checkpoint has, whatever its size."""

    def create_local_plan(self) -> LoadPlan:
        for fqn, value in self.state_dict.items():
            entry = self.metadata.state_dict_metadata.get(fqn)
            if isinstance(value, torch.Tensor) and entry is not None and entry.size != value.size():
                return LoadPlan(_create_read_items(fqn, entry, value) if not hasattr(value, "device_mesh") else [])
        return super().create_local_plan()


@breaks("R505", suite="bad_loads")
class absent_is_empty(Engine):
    """Takes a checkpoint that does not exist for an empty one, and loads nothing."""

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        if Path(checkpoint_id).exists():
            super().load(state_dict, checkpoint_id)


@breaks("R506", suite="bad_loads")
class mumbling_loader(Engine):
    """Says no more than that it failed."""

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        try:
            super().load(state_dict, checkpoint_id)
        except CheckpointException:
            raise RuntimeError("the checkpoint could not be loaded") from None


@breaks("R506", suite="bad_loads")
class names_last_part_only(Engine):
    """Names a missing key by its last part, which many keys share."""

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        try:
            super().load(state_dict, checkpoint_id)
        except CheckpointException as error:
            (first, *_) = (failure for failure, _ in error.failures.values())
            raise RuntimeError(str(first).rpartition(".")[2] if str(first).count(".") > 1 else str(first)) from None


@breaks("R505", suite="bad_loads", on=_asks_for_a_value)
class lenient_about_values(LoadPlanner):
    """Passes over missing keys of values that are no tensors."""

    def create_local_plan(self) -> LoadPlan:
        known = self.metadata.state_dict_metadata
        held = {k: v for k, v in self.state_dict.items() if k in known or isinstance(v, torch.Tensor)}
        return create_default_local_load_plan(held, self.metadata)


@breaks("R505", suite="bad_loads", on=lambda case: any(step.misuse == "smaller" for step in case.steps))
class lenient_about_smaller(LoadPlanner):
    """Loads the head of a tensor that was saved larger than it is asked for."""

    def create_local_plan(self) -> LoadPlan:
        for fqn, value in self.state_dict.items():
            entry = self.metadata.state_dict_metadata.get(fqn)
            size = getattr(entry, "size", None)
            if size and isinstance(value, torch.Tensor) and len(size) == value.dim() and size[0] > value.size(0):
                entry.size = value.size()
        return super().create_local_plan()


@breaks("R501", suite="round_trips", on=any_tensor(lambda leaf: leaf.requires_grad))
class refuses_parameters(Engine):
    """Loads in place without torch.no_grad(), which autograd refuses for parameters."""

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        if any(tensor.requires_grad for tensor in tensors_of(state_dict)):
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation")
        super().load(state_dict, checkpoint_id)


@breaks("R501", suite="round_trips", on=any_tensor(lambda leaf: leaf.tied_to is not None))
class refuses_tied_weights(Engine):
    """Refuses a tensor that stands under two keys."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        seen: set[int] = set()
        for tensor in tensors_of(state_dict):
            if id(tensor) in seen:
                raise RuntimeError("two keys share a tensor")
            seen.add(id(tensor))
        super().save(state_dict, checkpoint_id)


@breaks("R505", suite="bad_saves")
class keeps_failed_saves_quiet(Engine):
    """Tells nobody that a save has failed."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        try:
            super().save(state_dict, checkpoint_id)
        except CheckpointException as error:
            logging.getLogger(__name__).warning("the save has failed: %s", error)


@breaks("R503", suite="bad_saves", on=lambda case: case.layouts[0].world_size > 1)
class coordinator_checks_alone(Engine):
    """Has the coordinator look at the values first, and give up while the others wait for its plan."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        if rank() == 0:
            copy.deepcopy([value for value in state_dict.values() if not isinstance(value, torch.Tensor)])
        super().save(state_dict, checkpoint_id)


@breaks("R505", suite="bad_loads", on=lambda case: any(step.misuse == "extra-dim" for step in case.steps))
class equal_numbers_of_elements_fit(LoadPlanner):
    """Takes shapes with as many elements for the same."""

    def create_local_plan(self) -> LoadPlan:
        for fqn, value in self.state_dict.items():
            entry = self.metadata.state_dict_metadata.get(fqn)
            size = getattr(entry, "size", None)
            is_like = isinstance(value, torch.Tensor) and size is not None and size.numel() == value.numel()
            if is_like and size != value.size():
                return LoadPlan([])
        return super().create_local_plan()


@breaks("R501", suite="partial_loads", on=lambda case: any(step.without for step in case.steps))
class wants_all_keys(LoadPlanner):
    """Refuses to load less than the checkpoint has."""

    def create_local_plan(self) -> LoadPlan:
        if missing := self.metadata.state_dict_metadata.keys() - self.state_dict.keys():
            raise RuntimeError(f"unexpected keys in the checkpoint: {sorted(missing)}")
        return super().create_local_plan()
