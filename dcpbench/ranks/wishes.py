"""From the options of a case to the arguments of a call. Runs on ranks.

A *wish* is an argument that a backend may or may not take: where it does not, it is called without. A *feature* is
what a step makes no sense without: a backend that lacks it is not judged.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dcpbench.backends.protocol import Session
from dcpbench.case import Case
from dcpbench.ranks.meshes import group_of

__all__ = ["features", "missing", "wishes"]


def wishes(case: Case, number: int) -> dict[str, Any]:
    """Returns what a step would like to pass along; all ranks of the step call it, since a group is made by all.

    Only what is not the default is there.
    """
    step, options = case.steps[number], case.options
    layout = case.layouts[step.layout]
    wanted: dict[str, Any] = {}
    if layout.members or step.is_left_open:
        # saves that are under way at once each need a group of their own: one group's collectives are in one order
        wanted["process_group"] = group_of(layout.members or tuple(range(layout.world_size)), step.checkpoint)
    if options.no_dist and layout.world_size == 1:
        wanted["no_dist"] = True
    if not options.is_flattened:
        wanted["flatten_state_dict"] = False
    if step.lenient:
        wanted["allow_partial_load"] = True
    if not step.saves:
        return wanted
    if options.is_deduplicated_low:
        wanted["dedup_save_to_lowest_rank"] = True
    if options.caches_plans:
        wanted["enable_plan_caching"] = True
    if options.has_file_per_item:
        wanted["single_file_per_rank"] = False
    if options.num_threads > 1:
        wanted["thread_count"] = options.num_threads
    return wanted


def features(case: Case, number: int) -> list[str]:
    """Returns what a backend must have for a step."""
    step = case.steps[number]
    needed = []
    if case.layouts[step.layout].members:
        needed.append("process_group")
    if step.action == "async_save":
        needed.append("async_save")
    if step.lenient:
        needed.append("allow_partial_load")
    if step.action in ("convert", "import"):
        needed.append("convert")
    if case.options.statefuls:
        needed.append("stateful")
    return needed


def missing(needed: Iterable[str], session: Session) -> list[str]:
    """Returns the features that a session lacks."""
    takes: frozenset[str] = getattr(session, "takes", frozenset())
    return [name for name in needed if name not in takes]
