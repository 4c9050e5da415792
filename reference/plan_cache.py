"""Global plans remembered from save to save: on the coordinator, for planners with `enable_plan_caching`.

Every rank always sends its whole local plan, and a remembered global plan is used only if all local plans are, field
by field, those it was made from. So a stale plan cannot be used, whatever changed: shapes, dtypes, layouts, properties,
keys, the number of ranks. And nothing is remembered but immutable facts, so that nobody can change it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem

__all__ = ["PlanCache"]


@dataclasses.dataclass(frozen=True)
class _Entry:
    facts: list[Any]
    kept: list[list[tuple[int, MetadataIndex]]]
    metadata: Metadata


class PlanCache:
    """The last global plan for each setting of the planner."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}

    def find(self, setting: Hashable, plans: Sequence[SavePlan]) -> tuple[list[SavePlan], Metadata] | None:
        """Return the global plan that `keep` was given for equal plans, made of the items of these; else None.

        Args:
            setting: all that the global plan depends on besides the plans.
            plans: one local plan per rank.
        """
        entry = self._entries.get(setting)
        if entry is None or entry.facts != _facts(plans):
            return None
        final = []
        for plan, kept in zip(plans, entry.kept, strict=True):
            items = [dataclasses.replace(plan.items[position], index=index) for position, index in kept]
            final.append(dataclasses.replace(plan, items=items))
        return final, _copied(entry.metadata)

    def keep(self, setting: Hashable, plans: Sequence[SavePlan], final: Sequence[SavePlan], metadata: Metadata) -> None:
        """Remember which items of `plans` are in the global plan `final`; replaces the one before for this setting."""
        facts = _facts(plans)
        if facts is None:
            return
        kept = []
        for plan, chosen in zip(plans, final, strict=True):
            position = {item.index: position for position, item in enumerate(plan.items)}
            kept.append([(position[item.index], item.index) for item in chosen.items])
        self._entries[setting] = _Entry(facts, kept, _copied(metadata))


def _facts(plans: Sequence[SavePlan]) -> list[Any] | None:
    """Return all that a global plan is made from; None if a plan holds what this does not know in full."""
    facts: list[Any] = []
    for plan in plans:
        facts.append(_copied_paths(plan.planner_data))
        for item in plan.items:
            data = item.tensor_data
            if type(item) is not WriteItem or type(data) not in (TensorWriteData, type(None)):
                return None
            facts.append((item.index.fqn, item.index.offset, item.index.index, item.type, item.bytes_io_data))
            if data is not None:
                properties = tuple(vars(data.properties).values())
                if type(data.properties) is not TensorProperties or data.chunk is None:
                    return None
                facts.append((data.size, data.chunk.offsets, data.chunk.sizes, properties))
    return [len(plans), *facts]


def _copied(metadata: Metadata) -> Metadata:
    """Return a copy of which every part may be changed but the chunks, which cannot."""
    entries = {
        fqn: TensorStorageMetadata(dataclasses.replace(entry.properties), entry.size, list(entry.chunks))
        if isinstance(entry, TensorStorageMetadata)
        else copy.copy(entry)
        for fqn, entry in metadata.state_dict_metadata.items()
    }
    planner_data = _copied_paths(metadata.planner_data)
    return dataclasses.replace(metadata, state_dict_metadata=entries, planner_data=planner_data)


def _copied_paths(planner_data: Any) -> Any:
    # Tuples are what the default planner has here; copying them deeply would cost more than planning.
    if type(planner_data) is dict and all(type(path) is tuple for path in planner_data.values()):
        return dict(planner_data)
    return copy.deepcopy(planner_data)
