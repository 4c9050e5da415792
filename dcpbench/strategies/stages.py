"""Strategies for states that differ from rank to rank: pipeline stages, process groups, values of each rank's own.

They shrink towards state that all ranks hold alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from dcpbench.case import Case, Holders, Layout, LeafLayout, Mesh, ObjectLeaf, Options, Part, Step, TensorLeaf
from dcpbench.strategies.contents import contents, one_in
from dcpbench.strategies.layouts import layouts, meshes, placements, world_sizes
from dcpbench.strategies.scope import narrowed, scope

__all__ = ["lonely_failures", "process_groups", "stages"]

_seeds = st.integers(0, 2**16)


@st.composite
def stages(draw: st.DrawFn) -> Case:
    """Draws a case of which some leaves are in the state dicts of some ranks only, and some values are each rank's own.

    A sharded tensor then lies on a mesh of those ranks, as in pipeline parallelism. A load may ask for other leaves on
    other ranks than those that saved them. All ranks may refuse such a load: DCP asks for the same keys on each.
    """
    tensors, objects = draw(contents())
    objects = tuple(replace(leaf, differs=draw(st.booleans(), label="differs")) for leaf in objects)
    saved_on, loaded_on = (
        draw(_staged(tensors, objects, draw(world_sizes(scope.max_world_size), label=f"{what} ranks")), label=what)
        for what in ("saving", "loading")
    )
    steps = (Step("save", 0), Step("load", 1, may_refuse=bool(loaded_on.holders)))
    return narrowed(Case("stages", draw(_seeds), tensors, objects, (saved_on, loaded_on), steps))


@st.composite
def _staged(draw: st.DrawFn, tensors: Sequence[TensorLeaf], objects: Sequence[ObjectLeaf], world_size: int) -> Layout:
    """Draws a layout of which some leaves are on some ranks only: those that hang in dicts all the way."""
    layout = draw(layouts(tensors, world_size))
    placed, held_by = list(layout.leaves), []
    tied = {tensor.tied_to for tensor in tensors} | {n for n, one in enumerate(tensors) if one.tied_to is not None}
    leaves: list[TensorLeaf | ObjectLeaf] = [*tensors, *objects]
    for number, leaf in enumerate(leaves):
        is_free = all(part.kind == "key" for part in leaf.path) and number not in tied
        if world_size == 1 or not is_free or draw(st.booleans(), label="on all ranks"):
            continue
        most = 1 if draw(st.booleans(), label="on one rank") else world_size
        ranks = draw(st.lists(st.sampled_from(range(world_size)), min_size=1, max_size=most, unique=True), "holders")
        held_by.append(Holders(number, tuple(sorted(ranks))))
        if number < len(tensors) and placed[number].placements is not None:
            mesh = draw(_meshes_of(ranks), label="mesh")
            is_bent = scope.has("strided-shards")
            placement = draw(placements(len(tensors[number].shape), mesh, strided=is_bent), label="placements")
            placed[number] = LeafLayout(placement, placed[number].memory, mesh)
    return replace(layout, leaves=tuple(placed), holders=tuple(held_by))


def _meshes_of(ranks: Sequence[int]) -> st.SearchStrategy[Mesh]:
    def relabel(mesh: Mesh) -> Mesh:
        return replace(mesh, ranks=tuple(ranks[place] for place in mesh.ranks))

    return meshes(len(ranks), any_order=False).map(relabel)


@st.composite
def lonely_failures(draw: st.DrawFn) -> Case:
    """Draws a case whose save fails on one rank only, and all ranks must hear of it.

    That rank alone holds a value that cannot be pickled, in a save or in one in the background, or a Stateful that
    raises.
    """
    tensors, _ = draw(contents())
    world_size = draw(st.sampled_from(range(min(2, scope.max_world_size), scope.max_world_size + 1)), label="ranks")
    rank = draw(st.sampled_from(range(world_size)), label="failing rank")
    layout = draw(layouts(tensors, world_size), label="layout")
    kinds = {"save": "", "async_save": "async", "stateful": "statefuls"}
    kind = draw(st.sampled_from([kind for kind, needed in kinds.items() if scope.has(needed)]), label="kind")
    if kind == "stateful":
        value = ObjectLeaf((Part("key", "trainer"), Part("key", "step")), {"int": "1"})
        step = Step("save", 0, misuse="failing-stateful", misused_on=rank)
        return Case("lonely", 0, tensors, (value,), (layout,), (step,), Options(statefuls=("trainer",)))
    value = ObjectLeaf((Part("key", "unsavable"),), None)
    layout = replace(layout, holders=(Holders(len(tensors), (rank,)),))
    step = Step("save", 0, misuse="unsavable", misused=len(tensors))
    step = replace(step, action="async_save") if kind == "async_save" else step
    return Case("lonely", 0, tensors, (value,), (layout,), (step,))


@st.composite
def process_groups(draw: st.DrawFn) -> Case:
    """Draws a case whose save and load are called by some ranks only, as a process group of their own.

    The coordinator is the first of them, which need not be rank 0.
    """
    tensors, objects = draw(contents())
    world_size = draw(st.sampled_from(range(min(2, scope.max_world_size), scope.max_world_size + 1)), label="ranks")
    saved_by, loaded_by = (
        draw(st.lists(st.sampled_from(range(world_size)), min_size=1, unique=True), label=what)
        for what in ("saving", "loading")
    )
    pair = tuple(draw(_within(tensors, tuple(sorted(members)), world_size)) for members in (saved_by, loaded_by))
    if one_in(draw, 3, "loaded by all"):
        pair = (pair[0], draw(layouts(tensors, world_size), label="load layout"))
    return narrowed(Case("group", draw(_seeds), tensors, objects, pair, (Step("save", 0), Step("load", 1))))


@st.composite
def _within(draw: st.DrawFn, tensors: Sequence[TensorLeaf], members: tuple[int, ...], world_size: int) -> Layout:
    layout = draw(layouts(tensors, len(members)))
    mesh = replace(layout.mesh, ranks=tuple(members[place] for place in layout.mesh.ranks))
    return replace(layout, world_size=world_size, mesh=mesh, members=members)
