"""Dropping replicas from local plans, as torch once did, under torch's module name; see `dedup`."""

from __future__ import annotations

from torch.distributed.checkpoint.planner import SavePlan

from ._dedup_save_plans import dedup_save_plans

__all__ = ["dedup_tensors"]


def dedup_tensors(all_plans: list[SavePlan]) -> list[SavePlan]:
    """Return the plans with every item in the first one only that has it."""
    return dedup_save_plans(all_plans, save_to_lowest_rank=True)
