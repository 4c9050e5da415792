"""Mutants that plan a save wrongly: which rank writes which chunk, under which offsets, into which file."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType

from tests.mutants.bank import SavePlanner, Writer, breaks


@breaks("R301")
class dedup_by_first_offset(SavePlanner):
    """Takes chunks for replicas if they start at the same row."""

    def dedup(self, plans: list[SavePlan]) -> list[SavePlan]:
        seen: set[Any] = set()
        kept: list[list[Any]] = [[] for _ in plans]
        for number, plan in enumerate(plans):
            for item in plan.items:
                key = (item.index.fqn, (item.index.offset or (0,))[0])
                kept[number] += [item] if key not in seen else []
                seen.add(key)
        return [dataclasses.replace(plan, items=items) for plan, items in zip(plans, kept, strict=True)]


@breaks("R101", "R501", "R107", on=lambda case: case.layouts[0].world_size > 2)
class dedup_to_idle_rank(SavePlanner):
    """Moves a chunk from the busiest rank to one with nothing to write, whatever that holds."""

    def dedup(self, plans: list[SavePlan]) -> list[SavePlan]:
        plans = super().dedup(plans)
        busiest = max(plans, key=lambda plan: len(plan.items))
        idle = next((n for n, plan in enumerate(plans) if not plan.items), None)
        if idle is not None and busiest.items and busiest.items[-1].type == WriteItemType.SHARD:
            plans[idle] = dataclasses.replace(plans[idle], items=[busiest.items.pop()])
        return plans


@breaks("R101", "R301", "R302", "R303", "R501", on=lambda case: case.layouts[0].mesh.sizes == (2, 2))
class column_major_mesh(SavePlanner):
    """Numbers the ranks of a square mesh of two axes column by column."""

    def create_local_plan(self) -> SavePlan:
        from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

        plan = super().create_local_plan()
        for number, item in enumerate(plan.items):
            tensor = self.state_dict[item.index.fqn]
            mesh = getattr(tensor, "device_mesh", None)
            if mesh is None or len(mesh.shape) != 2 or mesh.shape[0] != mesh.shape[1]:
                continue
            coordinate = mesh.get_coordinate()[::-1]
            _, offset = _compute_local_shape_and_global_offset(tensor.shape, mesh.shape, coordinate, tensor.placements)
            chunk = dataclasses.replace(item.tensor_data.chunk, offsets=torch.Size(offset))
            plan.items[number] = dataclasses.replace(
                item,
                index=dataclasses.replace(item.index, offset=torch.Size(offset)),
                tensor_data=dataclasses.replace(item.tensor_data, chunk=chunk),
            )
        return plan


@breaks("R101", "R501", "R107", on=lambda case: case.layouts[0].world_size > 3)
class files_by_local_rank(Writer):
    """Names files by the rank's number on its host, of three ranks: the fourth writes over the first."""

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        prefixes = (_StoragePrefix(f"__{number % 3}_") for number in range(len(plans)))
        return [dataclasses.replace(plan, storage_data=prefix) for plan, prefix in zip(plans, prefixes, strict=True)]
