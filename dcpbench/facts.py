"""Facts about a leaf of a case: short words by which a known defect says when it strikes.

An entry of a known-defects file names facts; it explains a finding if all of them hold for the leaf that the finding
is about, or, where the finding is about a step as a whole, for some leaf of the case.
"""

from __future__ import annotations

from collections.abc import Iterator

from dcpbench.case import Case, Layout, LeafLayout, ObjectLeaf, TensorLeaf
from dcpbench.geometry import Region
from dcpbench.oracle.verdict import Finding

__all__ = ["FACTS", "facts_of"]

FACTS = {
    "tensor": "the leaf is a tensor",
    "object": "the leaf is a value that is no tensor",
    "int-key": "a dict on the way to the leaf has an int as key",
    "list": "the leaf lies in a list",
    "scalar": "a 0-d tensor",
    "empty": "a tensor without elements",
    "expanded": "its source has stride 0 along dim 0",
    "sharded": "a mesh axis of the save cuts it",
    "plain": "it was saved as a plain tensor on every rank",
    "strided": "it was saved as a strided shard",
    "several-boxes": "a rank that saved it held no single box of it",
    "empty-shard": "a rank that saved it held no element of it",
    "load-sharded": "a mesh axis of the load cuts it",
    "load-strided": "it is loaded as a strided shard",
    "load-several-boxes": "a rank that loads it holds no single box of it",
    "load-empty-shard": "a rank that loads it holds no element of it",
    "partial-mesh": "its mesh leaves ranks of the save out",
    "load-partial-mesh": "its mesh leaves ranks of the load out",
    "dtype:<name>": "its dtype",
    "memory:<form>": "how its source lay in memory",
    "load-memory:<form>": "how its destination lies in memory",
}
"""Every fact, with the sentence that defines it."""


def facts_of(case: Case, finding: Finding) -> Iterator[set[str]]:
    """Yields the facts of each leaf that the finding may be about."""
    save, load = _layouts(case, finding.step)
    for number, leaf in enumerate(case.tensors):
        if finding.fqn in ("", leaf.fqn):
            yield _path_facts(leaf) | set(_tensor_facts(number, leaf, save, load))
    for value in case.objects:
        if finding.fqn in ("", value.fqn, "/".join(repr(part.value) for part in value.path)):
            yield _path_facts(value) | {"object"}
    known = {leaf.fqn for leaf in case.leaves}
    if finding.fqn not in known | {""}:
        for value in case.objects:
            yield _path_facts(value) | {"object"}


def _layouts(case: Case, number: int) -> tuple[Layout | None, Layout | None]:
    step = case.steps[number]
    saves = [s for s in case.steps[: number + 1] if s.action == "save" and s.checkpoint == step.checkpoint]
    save = case.layouts[saves[-1].layout] if saves else None
    return save, case.layouts[step.layout] if step.action == "load" else None


def _path_facts(leaf: TensorLeaf | ObjectLeaf) -> set[str]:
    facts = set()
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
    if save is not None:
        yield from _layout_facts(number, leaf, save, "")
        if save.leaves[number].placements is None:
            yield "plain"
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
