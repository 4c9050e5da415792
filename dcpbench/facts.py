"""Facts about a leaf of a case: short words by which a known defect says when it strikes.

An entry of a known-defects file names facts; it explains a finding if all of them hold for the leaf that the finding
is about, or, where the finding is about a step as a whole, for some leaf of the case.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from dcpbench.case import Case, Layout, LeafLayout, ObjectLeaf, TensorLeaf
from dcpbench.case_files import AnyCase
from dcpbench.geometry import Region
from dcpbench.models.case import TrainingCase
from dcpbench.models.facts import TRAINING_FACTS, training_facts_of
from dcpbench.oracle.verdict import Finding
from dcpbench.protocol_case import ProtocolCase

__all__ = ["FACTS", "facts_of"]

FACTS = {
    "tensor": "the leaf is a tensor",
    "object": "the leaf is a value that is no tensor",
    "int-key": "a dict on the way to the leaf has an int as key",
    "list": "the leaf lies in a list",
    "special-container": "the value is or holds a tuple or dict of a special kind, such as a named tuple",
    "scalar": "a 0-d tensor",
    "empty": "a tensor without elements",
    "expanded": "its source has stride 0 along dim 0",
    "sharded": "a mesh axis of the save cuts it",
    "plain": "it was saved as a plain tensor on every rank",
    "distributed": "it was saved as a DTensor",
    "strided": "it was saved as a strided shard",
    "several-boxes": "a rank that saved it held no single box of it",
    "empty-shard": "a rank that saved it held no element of it",
    "load-sharded": "a mesh axis of the load cuts it",
    "load-strided": "it is loaded as a strided shard",
    "load-several-boxes": "a rank that loads it holds no single box of it",
    "load-empty-shard": "a rank that loads it holds no element of it",
    "partial-mesh": "its mesh leaves ranks of the save out",
    "load-partial-mesh": "its mesh leaves ranks of the load out",
    "some-ranks": "not every rank that saved had it in its state dict",
    "load-some-ranks": "not every rank that loads asks for it",
    "stateful": "it is part of the state of a Stateful object",
    "later": "its shape or dtype changes between saves",
    "async": "it was saved by async_save",
    "left-open": "several saves were under way at once",
    "converted": "it went through a torch.save file",
    "unflattened": "the planners were made with flatten_state_dict=False",
    "caches-plans": "the save planner was made with enable_plan_caching=True",
    "threads": "the writer was made with a thread_count above 1",
    "lenient": "the load planner was made with allow_partial_load=True",
    "group": "a process group other than the default one took part",
    "again": "the save wrote over a checkpoint",
    "misuse:<kind>": "what was wrong on purpose with the step",
    "dtype:<name>": "its dtype",
    "memory:<form>": "how its source lay in memory",
    "load-memory:<form>": "how its destination lies in memory",
    "protocol": "the case is one of virtual ranks",
    "part:<name>": "what of the backend they drove: storage or planner",
    "stopped:<call>": "the call at which a rank was stopped in this step, or in a save before it",
    "overwritten": "the save that was stopped was of a checkpoint that was there",
    "reused": "writers, readers and planners had been used in a step before",
    **TRAINING_FACTS,
}
"""Every fact, with the sentence that defines it."""


def facts_of(case: AnyCase, finding: Finding) -> Iterator[set[str]]:
    """Yields the facts of each leaf that the finding may be about."""
    if isinstance(case, TrainingCase):
        yield from training_facts_of(case, finding.fqn, finding.step)
        return
    if isinstance(case, ProtocolCase):
        yield set(_protocol_facts(case, finding))
        return
    save, load = _layouts(case, finding.step)
    general = set(_case_facts(case, finding.step))
    for number, leaf in enumerate(case.leaves):
        own = _path_facts(case, leaf) | set(_holder_facts(number, save, load)) | general
        if isinstance(leaf, TensorLeaf):
            if finding.fqn in ("", leaf.fqn):
                yield own | set(_tensor_facts(number, leaf.at(case.version_held(finding.step)), save, load))
        elif finding.fqn in ("", leaf.fqn, "/".join(repr(part.value) for part in leaf.path)):
            yield own | {"object"} | ({"special-container"} if _is_special(leaf.encoded) else set())
    if finding.fqn not in {leaf.fqn for leaf in case.leaves} | {""}:
        for leaf in case.leaves:
            kind = "tensor" if isinstance(leaf, TensorLeaf) else "object"
            yield _path_facts(case, leaf) | {kind} | general
    if not case.leaves:
        yield general


def _protocol_facts(case: ProtocolCase, finding: Finding) -> Iterator[str]:
    yield "protocol"
    yield f"part:{case.part}"
    if case.reuse and finding.step:
        yield "reused"
    for number, step in enumerate(case.steps[: finding.step + 1]):
        if step.halt is not None and (number == finding.step or step.saves):
            yield f"stopped:{step.halt.call}"
            if any(one.saves and one.checkpoint == step.checkpoint for one in case.steps[:number]):
                yield "overwritten"
    for leaf in case.leaves:
        if leaf.fqn == finding.fqn:
            yield f"dtype:{leaf.dtype}" if leaf.dtype else "object"
            yield "tensor" if leaf.dtype else "object"


def _layouts(case: Case, number: int) -> tuple[Layout | None, Layout | None]:
    step = case.steps[number]
    source = number if step.saves else case.source_of(number)
    save = case.layouts[case.steps[source].layout] if source is not None else None
    return save, case.layouts[step.layout] if step.action == "load" else None


def _case_facts(case: Case, number: int) -> Iterator[str]:
    step, options = case.steps[number], case.options
    source = number if step.saves else case.source_of(number)
    if source is not None and case.steps[source].action == "async_save":
        yield "async"
    if any(earlier.is_left_open for earlier in case.steps[: number + 1]):
        yield "left-open"
    if any(earlier.action in ("convert", "import") for earlier in case.steps[: number + 1]):
        yield "converted"
    if not options.is_flattened:
        yield "unflattened"
    if options.caches_plans:
        yield "caches-plans"
    if options.num_threads > 1:
        yield "threads"
    if step.lenient:
        yield "lenient"
    if any(case.layouts[one.layout].members for one in case.steps[: number + 1]):
        yield "group"
    if source is not None and case.source_of(source) is not None:
        yield "again"
    if step.misuse != "none":
        yield f"misuse:{step.misuse}"


def _holder_facts(number: int, save: Layout | None, load: Layout | None) -> Iterator[str]:
    for layout, fact in ((save, "some-ranks"), (load, "load-some-ranks")):
        if layout is not None and any(held.leaf == number for held in layout.holders):
            yield fact


def _is_special(encoded: object) -> bool:
    text = json.dumps(encoded)
    return any(f'{{"{tag}": ' in text for tag in ("OrderedDict", "defaultdict", "namedtuple", "Size"))


def _path_facts(case: Case, leaf: TensorLeaf | ObjectLeaf) -> set[str]:
    facts = set()
    if leaf.path[0].value in case.options.statefuls:
        facts.add("stateful")
    if any(part.kind == "key" and isinstance(part.value, int) for part in leaf.path):
        facts.add("int-key")
    if any(part.kind == "index" for part in leaf.path):
        facts.add("list")
    return facts


def _tensor_facts(number: int, leaf: TensorLeaf, save: Layout | None, load: Layout | None) -> Iterator[str]:
    yield "tensor"
    yield f"dtype:{leaf.dtype}"
    if not leaf.shape:
        yield "scalar"
    if 0 in leaf.shape:
        yield "empty"
    if leaf.expanded:
        yield "expanded"
    if leaf.later_shape is not None or leaf.later_dtype is not None:
        yield "later"
    if save is not None:
        yield from _layout_facts(number, leaf, save, "")
        yield "plain" if save.leaves[number].placements is None else "distributed"
    if load is not None:
        yield from _layout_facts(number, leaf, load, "load-")


def _layout_facts(number: int, leaf: TensorLeaf, layout: Layout, prefix: str) -> Iterator[str]:
    held: LeafLayout = layout.leaves[number]
    yield f"{prefix}memory:{held.memory}"
    regions = [layout.region(number, leaf.shape, rank) for rank in range(layout.world_size)]
    if any(p.dim is not None for p in held.placements or ()):
        yield f"{prefix}sharded"
    if any(p.split_factor > 1 for p in held.placements or ()):
        yield f"{prefix}strided"
    if any(isinstance(region, Region) and len(list(region.boxes())) > 1 for region in regions):
        yield f"{prefix}several-boxes"
    if any(region is not None and not region.numel for region in regions):
        yield f"{prefix}empty-shard"
    if any(region is None for region in regions):
        yield f"{prefix}partial-mesh"
