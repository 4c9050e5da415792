"""Strategies for whole cases. Every one builds valid cases; none filters.

All shrink towards one rank, one leaf, the smallest shape that still splits unevenly, contiguous memory.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from dcpbench.case import Case, Layout, LeafLayout, Mesh, Misuse, ObjectLeaf, Options, Part, Step, TensorLeaf
from dcpbench.strategies.absences import absences
from dcpbench.strategies.background import async_saves, bad_async_saves
from dcpbench.strategies.contents import contents, one_in
from dcpbench.strategies.layouts import layouts, world_sizes
from dcpbench.strategies.scope import narrowed, scope
from dcpbench.strategies.sequences import chains, conversions, sequences, stateful_round_trips
from dcpbench.strategies.stages import lonely_failures, process_groups, stages
from dcpbench.strategies.switches import changing_states, lenient_loads, switched

__all__ = [
    "absences",
    "async_saves",
    "bad_async_saves",
    "bad_loads",
    "bad_saves",
    "chains",
    "changing_states",
    "concurrent_readers",
    "conversions",
    "lenient_loads",
    "lonely_failures",
    "multi_checkpoint",
    "overwriting",
    "partial_loads",
    "process_groups",
    "resharding",
    "round_trips",
    "sequences",
    "stages",
    "stateful_round_trips",
    "switched",
    "without_process_group",
]

_seeds = st.integers(0, 2**16)


@st.composite
def round_trips(draw: st.DrawFn) -> Case:
    """Draws a case that saves and loads on the same layout."""
    tensors, objects = draw(contents())
    layout = draw(layouts(tensors, draw(world_sizes(scope.max_world_size), label="ranks")), label="layout")
    return Case("roundtrip", draw(_seeds), tensors, objects, (layout,), (Step("save", 0), Step("load", 0)))


@st.composite
def resharding(draw: st.DrawFn) -> Case:
    """Draws a case that saves on N ranks and loads on M, each under a layout of its own."""
    tensors, objects = draw(contents())
    saved_on = draw(world_sizes(scope.max_world_size), label="saving ranks")
    loaded_on = draw(world_sizes(scope.max_world_size), label="loading ranks")
    pair = (
        draw(layouts(tensors, saved_on), label="save layout"),
        draw(layouts(tensors, loaded_on), label="load layout"),
    )
    return narrowed(Case("reshard", draw(_seeds), tensors, objects, pair, (Step("save", 0), Step("load", 1))))


@st.composite
def multi_checkpoint(draw: st.DrawFn) -> Case:
    """Draws a case with several checkpoints after each other, of different content, loaded in any order.

    The steps share their writer and reader objects, or make new ones. A checkpoint is never overwritten.
    """
    tensors, objects = draw(contents())
    world = draw(world_sizes(scope.max_world_size), label="ranks")
    pair = tuple(draw(layouts(tensors, world), label="layout") for _ in range(2))
    names = draw(st.sampled_from([("first", "second"), ("step-9", "step-10", "step-11")]), label="checkpoints")
    steps = [Step("save", draw(st.integers(0, 1)), name, version) for version, name in enumerate(names)]
    loads = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3), label="loads")
    steps += [Step("load", draw(st.integers(0, 1)), name) for name in loads]
    if draw(st.booleans(), label="load between the saves"):
        steps.insert(1, Step("load", 0, names[0]))
    options = Options(reuse=draw(st.booleans(), label="reuse"))
    return narrowed(Case("several", draw(_seeds), tensors, objects, pair, tuple(steps), options))


@st.composite
def without_process_group(draw: st.DrawFn) -> Case:
    """Draws a case that saves on N ranks and loads in one process without a process group."""
    tensors, objects = draw(contents())
    saved_on = draw(layouts(tensors, draw(world_sizes(scope.max_world_size), label="ranks")), label="save layout")
    alone = Layout(1, Mesh(("dp",), (1,), (0,)), tuple(LeafLayout() for _ in tensors), distributed=False)
    return narrowed(
        Case("alone", draw(_seeds), tensors, objects, (saved_on, alone), (Step("save", 0), Step("load", 1)))
    )


@st.composite
def concurrent_readers(draw: st.DrawFn) -> Case:
    """Draws a case that saves on N ranks and loads on all M ranks at once, each by itself, without a process group."""
    tensors, objects = draw(contents())
    saved_on = draw(layouts(tensors, draw(world_sizes(scope.max_world_size), label="ranks")), label="save layout")
    num_readers = draw(world_sizes(scope.max_world_size), label="readers")
    mesh = Mesh(("dp",), (num_readers,), tuple(range(num_readers)))
    readers = Layout(num_readers, mesh, tuple(LeafLayout() for _ in tensors), distributed=False)
    return Case("readers", draw(_seeds), tensors, objects, (saved_on, readers), (Step("save", 0), Step("load", 1)))


@st.composite
def overwriting(draw: st.DrawFn) -> Case:
    """Draws a case that saves other content, on as many or other ranks, over a checkpoint, and loads it.

    What was there may have been loaded before. All ranks may refuse to write over it.
    """
    case = draw(resharding())
    before = [Step("load", draw(st.integers(0, 1), label="layout of the load before"))] * draw(
        st.integers(0, 1), "loads"
    )
    steps = (
        Step("save", 0),
        *before,
        Step("save", draw(st.integers(0, 1), label="layout of the second save"), version=1, may_refuse=True),
        Step("load", draw(st.integers(0, 1), label="layout of the load")),
    )
    options = Options(reuse=draw(st.booleans(), label="reuse"))
    return replace(case, family="overwrite", steps=steps, options=options)


@st.composite
def partial_loads(draw: st.DrawFn) -> Case:
    """Draws a case whose load asks for some of the leaves only: at least one, and all of each list."""
    case = draw(resharding())
    free = [number for number, leaf in enumerate(case.leaves) if all(part.kind == "key" for part in leaf.path)]
    tied = {tensor.tied_to for tensor in case.tensors}
    may_go = [number for number in free if number not in tied]
    keep = [] if len(may_go) < len(case.leaves) else may_go[:1]
    may_go = [number for number in may_go if number not in keep]
    without = tuple(number for number in may_go if draw(st.booleans(), label="left out"))
    return narrowed(replace(case, family="partial", steps=(Step("save", 0), Step("load", 1, without=without))))


@st.composite
def bad_loads(draw: st.DrawFn) -> Case:
    """Draws a case whose load asks for what is not there, on all ranks or on one; all ranks must refuse."""
    tensors, objects = draw(contents())
    world = draw(world_sizes(scope.max_world_size), label="ranks")
    pair = tuple(draw(layouts(tensors, world), label="layout") for _ in range(2))
    leaves: tuple[TensorLeaf | ObjectLeaf, ...] = (*tensors, *objects)
    number = draw(st.integers(0, len(leaves) - 1), label="misused leaf")
    kinds: list[Misuse] = ["no-checkpoint"]
    if leaves[number].path[-1].kind == "key":
        kinds[:0] = ["unknown-key"] * 3  # the one misuse that may be one rank's alone
    if number >= len(tensors):
        kinds.insert(0, "other-kind")
    else:
        kinds.insert(0, "extra-dim")
        if tensors[number].shape:
            kinds.insert(0, "larger")
        if tensors[number].shape and tensors[number].shape[0]:
            kinds.insert(0, "smaller")
    misuse = draw(st.sampled_from(kinds), label="misuse")
    if misuse == "no-checkpoint":
        return narrowed(Case("refuse", 0, tensors, objects, pair, (Step("load", 1, "absent", misuse="no-checkpoint"),)))
    on = None
    if misuse == "unknown-key" and world > 1 and not one_in(draw, 3, "on all ranks"):
        on = draw(st.sampled_from([*range(1, world), 0]), label="rank")
    steps = (Step("save", 0), Step("load", 1, misuse=misuse, misused=number, misused_on=on))
    return narrowed(Case("refuse", draw(_seeds), tensors, objects, pair, steps))


@st.composite
def bad_saves(draw: st.DrawFn) -> Case:
    """Draws a case that saves a value which cannot be pickled, on all ranks; all ranks must refuse."""
    tensors, objects = draw(contents())
    objects = objects or (ObjectLeaf((Part("key", "unsavable"),), None),)
    layout = draw(layouts(tensors, draw(world_sizes(scope.max_world_size), label="ranks")), label="layout")
    number = draw(st.integers(len(tensors), len(tensors) + len(objects) - 1), label="misused leaf")
    step = Step("save", 0, misuse="unsavable", misused=number)
    options = Options(num_threads=2) if one_in(draw, 4, "threads") else Options()
    return Case("unsavable", 0, tensors, objects, (layout,), (step,), options)
