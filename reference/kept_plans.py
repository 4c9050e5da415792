"""Loads in which no rank needs another's plan: then none is sent, and the coordinator does not see them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["are_plans_kept", "keeps_plans"]

F = TypeVar("F", bound=Callable[..., Any])


def keeps_plans(method: F) -> F:
    """Mark a `create_global_plan` or `prepare_global_plan` that returns the plans of a load as they are."""
    method.keeps_plans = True  # type: ignore[attr-defined]
    return method


def are_plans_kept(planner: Any, storage: Any) -> bool:
    """Whether the global steps of both are marked; one that a subclass puts in their place is not."""
    steps = planner.create_global_plan, storage.prepare_global_plan
    return all(getattr(step, "keeps_plans", False) for step in steps)
