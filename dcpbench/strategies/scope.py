"""What cases may ask for: bounds, and the capabilities that the backend under test lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dcpbench.capabilities import DTYPE_FAMILIES
from dcpbench.case import Case, Layout, Options, Step

__all__ = ["Scope", "narrowed", "scope"]


@dataclass(slots=True)
class Scope:
    """What cases may ask for. The pytest plugin sets the one of the session, :data:`scope`, from its options.

    Attributes:
        max_world_size: the largest world that a case may use.
        max_tensors, max_objects: leaves per case; a long list now and then has more.
        absent: capabilities of which cases make no use by the way; those that are about one of them still do.
    """

    max_world_size: int = 4
    max_tensors: int = 4
    max_objects: int = 3
    absent: frozenset[str] = field(default_factory=frozenset)

    def has(self, capability: str) -> bool:
        """Reads as: a case may make use of ``capability``."""
        return capability not in self.absent

    def takes_dtype(self, dtype: str) -> bool:
        """Reads as: a tensor of a case may be of ``dtype``."""
        return not any(dtype in dtypes for family, dtypes in DTYPE_FAMILIES.items() if family in self.absent)


scope = Scope()
"""Read at each draw, since strategies are built when a suite is imported, before the options are known."""


def narrowed(case: Case) -> Case:
    """Returns ``case`` without what the backend under test lacks, as far as steps and layouts go."""
    if not scope.has("resharding"):
        case = replace(case, layouts=_all_like_the_first(case.layouts))
    if not scope.has("partial-loads"):
        case = replace(case, steps=tuple(_whole(case, number, step) for number, step in enumerate(case.steps)))
    if not scope.has("local-folders"):
        case = replace(case, options=replace(case.options, id_form=Options().id_form))
    return case


def _all_like_the_first(layouts: Sequence[Layout]) -> tuple[Layout, ...]:
    first = layouts[0]
    found = []
    for layout in layouts:
        pairs = zip(first.leaves, layout.leaves, strict=True)
        found.append(replace(first, leaves=tuple(replace(one, memory=own.memory) for one, own in pairs)))
    return tuple(found)


def _whole(case: Case, number: int, step: Step) -> Step:
    source = case.source_of(number)
    if step.action != "load" or source is None:
        return step
    return replace(step, without=case.steps[source].without)
