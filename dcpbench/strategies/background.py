"""Strategies for saves in the background. They shrink towards one save of one tensor that is overwritten at once."""

from __future__ import annotations

from hypothesis import strategies as st

from dcpbench.case import Case, Disturbance, ObjectLeaf, Options, Part, Step
from dcpbench.strategies.contents import contents, one_in
from dcpbench.strategies.layouts import layouts, world_sizes
from dcpbench.strategies.scope import narrowed, scope

__all__ = ["async_saves", "bad_async_saves"]

_seeds = st.integers(0, 2**16)
_disturbances: st.SearchStrategy[Disturbance] = st.sampled_from(
    ["overwrite", "overwrite", "clear", "overwrite", "clear", "free"]  # who reads freed memory may well end the rank
)


@st.composite
def async_saves(draw: st.DrawFn) -> Case:
    """Draws a case that saves in the background, changes or frees all that was saved, and loads.

    Now and then a second save of other content begins while the first is under way; each of the two then has a
    process group of its own.
    """
    tensors, objects = draw(contents())
    world = draw(world_sizes(scope.max_world_size), label="ranks")
    pair = tuple(draw(layouts(tensors, world, is_whole=True), label="layout") for _ in range(2))
    after = draw(_disturbances, label="disturbance")
    options = Options(reuse=draw(st.booleans(), label="reuse"))
    if not one_in(draw, 3, "two at once"):
        saves = [Step("async_save", 0, "first", 0, disturbance=after)]
        if draw(st.booleans(), label="a second one, after it"):
            saves.append(Step("async_save", draw(st.integers(0, 1)), "second", 1, disturbance=after))
    else:
        options = Options()
        saves = [
            Step("async_save", layout, name, version, disturbance=after, is_left_open=True)
            for version, (layout, name) in enumerate(((0, "first"), (draw(st.integers(0, 1)), "second")))
        ]
    waits = [Step("wait", one.layout, one.checkpoint) for one in saves if one.is_left_open]
    loads = [Step("load", draw(st.integers(0, 1), label="load layout"), one.checkpoint) for one in saves]
    return narrowed(Case("async", draw(_seeds), tensors, objects, pair, (*saves, *waits, *loads), options))


@st.composite
def bad_async_saves(draw: st.DrawFn) -> Case:
    """Draws a case that saves in the background what cannot be saved, on all ranks or on one.

    Each rank must hear of it: from the call, or from its future.
    """
    tensors, objects = draw(contents())
    objects = objects or (ObjectLeaf((Part("key", "unsavable"),), None),)
    world = draw(world_sizes(scope.max_world_size), label="ranks")
    layout = draw(layouts(tensors, world, is_whole=True), label="layout")
    number = draw(st.integers(len(tensors), len(tensors) + len(objects) - 1), label="misused leaf")
    step = Step("async_save", 0, misuse="unsavable", misused=number)
    return Case("unsavable", 0, tensors, objects, (layout,), (step,))
