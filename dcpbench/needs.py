"""Which capabilities a step of a case needs: a pure function of the case, which asks no backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from dcpbench.capabilities import DTYPE_FAMILIES
from dcpbench.case import Case, Layout, TensorLeaf
from dcpbench.case_files import AnyCase
from dcpbench.messages import Observation
from dcpbench.models.case import TrainingCase
from dcpbench.protocol_case import ProtocolCase

__all__ = ["TRAINING_NEEDS", "needs_of", "with_absences"]

TRAINING_NEEDS = frozenset(("objects", "resharding", "scalar-tensors", "strided-shards"))
"""What any state of models and optimizers may hold: step counts, hyperparameters, shards of two parallelisms."""

_FAMILY_OF = {dtype: family for family, dtypes in DTYPE_FAMILIES.items() for dtype in dtypes}


def needs_of(case: AnyCase, number: int) -> frozenset[str]:
    """Returns the names of the open capabilities that step ``number`` of ``case`` needs.

    A load also needs what the save of its checkpoint needed. A case of the protocol needs nothing that may be absent.
    """
    if isinstance(case, TrainingCase):
        return TRAINING_NEEDS
    if isinstance(case, ProtocolCase):
        return frozenset()
    step = case.steps[number]
    found = {*_of_leaves(case, number), *_of_store(case, number)}
    source = case.source_of(number)
    if step.action in ("load", "convert") and source is not None:
        found |= {*_of_leaves(case, source)}
        saved_on, loaded_on = case.layouts[case.steps[source].layout], case.layouts[step.layout]
        if _arrangement(saved_on) != _arrangement(loaded_on):
            found.add("resharding")
        if set(step.without) - set(case.steps[source].without):
            found.add("partial-loads")
    return frozenset(found)


def _of_leaves(case: Case, number: int) -> Iterator[str]:
    layout, version = case.layouts[case.steps[number].layout], case.version_held(number)
    for leaf in case.asked_for(number):
        if leaf >= len(case.tensors):
            yield "objects"
        else:
            yield from _of_tensor(leaf, case.tensor(leaf, version), layout)


def _of_tensor(number: int, leaf: TensorLeaf, layout: Layout) -> Iterator[str]:
    if not leaf.shape:
        yield "scalar-tensors"
    if 0 in leaf.shape:
        yield "empty-tensors"
    if leaf.dtype in _FAMILY_OF:
        yield _FAMILY_OF[leaf.dtype]
    if any(placement.split_factor > 1 for placement in layout.leaves[number].placements or ()):
        yield "strided-shards"


def _of_store(case: Case, number: int) -> Iterator[str]:
    step = case.steps[number]
    if step.saves and case.source_of(number) is not None:
        yield "overwrite"
    if len({name for one in case.steps[: number + 1] for name in (one.checkpoint, one.target) if name}) > 1:
        yield "several-checkpoints"
    if case.layouts[step.layout].world_size > 1 and not case.layouts[step.layout].distributed:
        yield "concurrent-readers"
    if step.action in ("delete", "copy", "rename") or case.options.id_form != "text":
        yield "local-folders"


def _arrangement(layout: Layout) -> object:
    """Returns what of a layout makes a load under it a reshard: all but how shards lie in memory."""
    leaves = tuple(replace(leaf, memory="contiguous", mesh=layout.mesh_of(n)) for n, leaf in enumerate(layout.leaves))
    num_ranks = (len(layout.members) or layout.world_size) if layout.distributed else 1
    return num_ranks if num_ranks == 1 else (num_ranks, layout.members, leaves, layout.holders)


def with_absences(
    case: AnyCase, observations: Sequence[Observation], absent: Mapping[str, frozenset[str]]
) -> tuple[Observation, ...]:
    """Returns ``observations`` with what each step needed and its backend declares absent.

    Args:
        case: what was run.
        observations: as the pool returns them.
        absent: declared capabilities for the action ``load``, and for all others under ``save``.
    """
    found = []
    needed = {number: needs_of(case, number) for number in {seen.step for seen in observations}}
    for seen in observations:
        lacks = needed[seen.step] & absent["load" if seen.action == "load" else "save"]
        found.append(replace(seen, lacks=tuple(sorted(lacks))) if lacks else seen)
    return tuple(found)
