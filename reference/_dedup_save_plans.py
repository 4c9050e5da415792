"""Dropping replicas from local plans, under torch's module name; see `dedup`."""

from __future__ import annotations

import dataclasses

from torch.distributed.checkpoint.planner import SavePlan

from .dedup import assign_replicas

__all__ = ["dedup_save_plans"]


def dedup_save_plans(all_plans: list[SavePlan], save_to_lowest_rank: bool = False) -> list[SavePlan]:
    """Return the plans with every item in one of them only; the given plans stay as they are.

    Args:
        all_plans: one per rank.
        save_to_lowest_rank: give each replica to the lowest rank that holds it, instead of balancing bytes.

    Raises:
        ReplicaConflictError: ranks describe a leaf in ways that exclude each other.
    """
    kept = assign_replicas(all_plans, to_lowest_rank=save_to_lowest_rank)
    return [dataclasses.replace(plan, items=items) for plan, items in zip(all_plans, kept, strict=True)]
