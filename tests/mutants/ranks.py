"""Mutants that take all ranks to be alike: the same keys on each, rank 0 among them, one group for everything."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.planner import SavePlan

from dcpbench import Case
from tests.mutants.bank import Calls, LoadPlanner, SavePlanner, Writer, breaks, local_of, rank, tensors_of


def _is_staged(case: Case) -> bool:
    return bool(case.layouts[case.steps[0].layout].holders)


def _has_group(case: Case) -> bool:
    return any(layout.members for layout in case.layouts)


def _without_rank_zero(case: Case) -> bool:
    members = case.layouts[case.steps[0].layout].members
    return bool(members) and 0 not in members


_COMMON = ("bfloat16", "float16", "float64")


def _converts_common(case: Case) -> bool:
    return case.family == "convert" and any(one.dtype in _COMMON for one in case.tensors)


@breaks("R304", "R501", suite="stages", on=_is_staged)
class coordinators_keys_only(SavePlanner):
    """Plans for the keys that the coordinator has."""

    def dedup(self, plans: list[SavePlan]) -> list[SavePlan]:
        known = {item.index.fqn for item in plans[0].items}
        held = [[item for item in plan.items if item.index.fqn in known] for plan in super().dedup(plans)]
        return [dataclasses.replace(plan, items=items) for plan, items in zip(plans, held, strict=True)]


@breaks("R402", "R501", suite="stages", on=lambda case: _is_staged(case) and case.objects)
class values_of_coordinator_only(SavePlanner):
    """Saves values that are no tensors on the coordinator only, and passes over all that it does not have."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [item for item in plan.items if self.is_coordinator or item.tensor_data is not None]
        return dataclasses.replace(plan, items=items)


@breaks("R304", suite="process_groups", on=_without_rank_zero)
class rank_zero_commits(Writer):
    """Writes the metadata on rank 0, whether it takes part or not."""

    def finish(self, metadata: Any, results: Any) -> None:
        if rank() == 0:
            super().finish(metadata, results)


@breaks("R503", suite="process_groups", on=_has_group)
class one_group_for_all(Calls):
    """Saves on the default process group, whichever it was given."""

    def save(self, state_dict: dict[str, Any], **given: Any) -> Any:
        return super().save(state_dict, **{**given, "process_group": None})


@breaks("R108", suite="lenient_loads", on=lambda case: case.tensors and case.steps[0].without)
class zeroes_missing(LoadPlanner):
    """Fills what the checkpoint lacks with zeros."""

    def __init__(self, allow_partial_load: bool = False) -> None:
        super().__init__(allow_partial_load=allow_partial_load)

    def create_local_plan(self) -> Any:
        missing = [value for fqn, value in self.state_dict.items() if fqn not in self.metadata.state_dict_metadata]
        with torch.no_grad():
            for tensor in tensors_of(missing) if self.allow_partial_load else ():
                local_of(tensor).zero_()
        return super().create_local_plan()


@breaks(
    "R205", suite="bad_loads", on=lambda case: case.tensors and case.steps[-1].misuse not in ("no-checkpoint", "none")
)
class fills_before_checking(LoadPlanner):
    """Fills all tensors with zeros before it looks whether it can load them."""

    def set_up_planner(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for tensor in tensors_of(state_dict):
                local_of(tensor).zero_()
        super().set_up_planner(state_dict, *args, **kwargs)


@breaks("R402", suite="stateful_round_trips", on=lambda case: case.options.statefuls and case.objects)
class keeps_what_it_loads(Calls):
    """Asks Stateful objects for their state, loads into that, and never gives it to them."""

    def load(self, state_dict: dict[str, Any], **given: Any) -> None:
        held = {
            key: one.state_dict() if isinstance(one, dcp.stateful.Stateful) else one for key, one in state_dict.items()
        }
        dcp.load(held, **given)
        state_dict.update({key: one for key, one in held.items() if not hasattr(state_dict[key], "state_dict")})


@breaks("R102", suite="conversions", on=_converts_common)
class converts_to_common_dtypes(Calls):
    """Writes floating tensors of other common widths as float32 into a file."""

    def dcp_to_torch_save(self, folder: str, file: str) -> None:
        super().dcp_to_torch_save(folder, file)
        torch.save(self.widened(torch.load(file, weights_only=False)), file)

    def widened(self, held: Any) -> Any:
        if isinstance(held, torch.Tensor):
            return held.float() if str(held.dtype).removeprefix("torch.") in _COMMON else held
        if type(held) is dict:
            return {key: self.widened(one) for key, one in held.items()}
        return [self.widened(one) for one in held] if type(held) is list else held
