"""Strategies for protocol cases. Every one builds valid cases; none filters.

All shrink towards one rank, one small leaf, one save and one load, in rank order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hypothesis import strategies as st

from dcpbench.content import DTYPES
from dcpbench.geometry import Box
from dcpbench.layout import Layout, LeafLayout, Mesh
from dcpbench.protocol_case import (
    BY_STORAGE,
    CALLS,
    ON_COORDINATOR,
    Halt,
    ProtocolCase,
    ProtocolLeaf,
    ProtocolPart,
    ProtocolStep,
)
from dcpbench.strategies.contents import one_in
from dcpbench.strategies.layouts import meshes, placements

__all__ = ["planners", "stopped_planners", "stopped_storages", "storages"]

MAX_VIRTUAL_RANKS = 8

_SHAPES = ((4,), (1,), (3, 2), (5,), (2, 3, 2), (), (0,), (3, 0), (7, 3))
_NAMES = ("w", "b.c", "a/b", "ключ", "w.0")


@st.composite
def storages(draw: st.DrawFn) -> ProtocolCase:
    """Draws saves and loads of plans that torch's planner never makes: any split, order, rank and hints."""
    leaves = _leaves(draw)
    steps = [_save(draw, leaves, "a")]
    if one_in(draw, 3, "a second checkpoint"):
        name = draw(st.sampled_from("ba"), label="its name")
        steps.append(_save(draw, leaves, name))
    names = sorted({step.checkpoint for step in steps})
    steps += [_load(draw, leaves, name) for name in names]
    return ProtocolCase("storage", _seed(draw), leaves, tuple(steps), draw(st.booleans(), label="reuse"))


@st.composite
def stopped_storages(draw: st.DrawFn) -> ProtocolCase:
    """Draws a save or load that stops at any call on any rank, with a checkpoint before it and loads after it."""
    leaves = _leaves(draw)
    first = _save(draw, leaves, "a")
    if one_in(draw, 4, "a load stops"):
        load = _stopped(draw, _load(draw, leaves, "a"))
        steps = [first, load, replace(load, halt=None)]
    else:
        name = draw(st.sampled_from("ba"), label="what it saves")
        stopped = _stopped(draw, _save(draw, leaves, name))
        steps = [first, stopped, *(_load(draw, leaves, one) for one in sorted({"a", name}))]
        if one_in(draw, 2, "saved again"):
            steps += [replace(stopped, halt=None), _load(draw, leaves, name)]
    return ProtocolCase("storage", _seed(draw), leaves, tuple(steps), draw(st.booleans(), label="reuse"))


@st.composite
def planners(draw: st.DrawFn) -> ProtocolCase:
    """Draws a save by planners under any layout, and a load under another one."""
    leaves = _leaves(draw)
    steps = [_planned(draw, leaves, "save"), _planned(draw, leaves, "load")]
    if one_in(draw, 4, "a second time"):
        steps += [_planned(draw, leaves, "save"), _planned(draw, leaves, "load")]
    return ProtocolCase("planner", _seed(draw), leaves, tuple(steps), draw(st.booleans(), label="reuse"))


@st.composite
def stopped_planners(draw: st.DrawFn) -> ProtocolCase:
    """Draws planners that fail in any call on any rank, and are then used again."""
    leaves = _leaves(draw)
    save, load = _planned(draw, leaves, "save"), _planned(draw, leaves, "load")
    stops_save = draw(st.booleans(), label="the save stops")
    before = [_stopped(draw, save), save, load] if stops_save else [save, _stopped(draw, load), load]
    return ProtocolCase("planner", _seed(draw), leaves, tuple(before), draw(st.booleans(), label="reuse"))


def _seed(draw: st.DrawFn) -> int:
    return draw(st.integers(0, 2**10), label="seed")


def _leaves(draw: st.DrawFn) -> tuple[ProtocolLeaf, ...]:
    number = draw(st.integers(1, 3), label="leaves")
    leaves = []
    for name in draw(st.permutations(_NAMES), label="names")[:number]:
        if one_in(draw, 5, "object"):
            leaves.append(ProtocolLeaf(name, dtype=""))
        else:
            shape = draw(st.sampled_from(_SHAPES), label="shape")
            leaves.append(ProtocolLeaf(name, shape, draw(st.sampled_from(list(DTYPES)), label="dtype")))
    return tuple(leaves)


def _world(draw: st.DrawFn) -> int:
    return draw(st.sampled_from([1, 2, 3, 4, 2, 3, MAX_VIRTUAL_RANKS]), label="ranks")


def _save(draw: st.DrawFn, leaves: tuple[ProtocolLeaf, ...], name: str) -> ProtocolStep:
    world_size = _world(draw)
    parts = []
    for number, leaf in enumerate(leaves):
        boxes = _split(draw, leaf.shape) if leaf.dtype else [None]
        ranks = st.integers(0, world_size - 1)
        parts += [ProtocolPart(number, draw(ranks, label="rank"), box) for box in boxes]
    return _in_any_order(draw, ProtocolStep("save", name, world_size, _permuted(draw, parts)))


def _load(draw: st.DrawFn, leaves: tuple[ProtocolLeaf, ...], name: str) -> ProtocolStep:
    """Draws what each rank wants: now a box as it may have been saved, now any other, now nothing."""
    world_size = _world(draw)
    parts = []
    for number, leaf in enumerate(leaves):
        whole = Box((0,) * len(leaf.shape), leaf.shape)
        for rank in range(world_size) if world_size < 4 else draw(st.permutations(range(world_size)))[:3]:
            how = draw(st.sampled_from(("whole", "part", "nothing")), label="wanted")
            if how == "nothing" and rank:
                continue
            box = None if not leaf.dtype else whole if how == "whole" else _part(draw, leaf.shape)
            parts.append(ProtocolPart(number, rank, box))
    return _in_any_order(draw, ProtocolStep("load", name, world_size, _permuted(draw, parts)))


def _permuted(draw: st.DrawFn, parts: list[ProtocolPart]) -> tuple[ProtocolPart, ...]:
    return tuple(draw(st.permutations(parts), label="order of items"))


def _in_any_order(draw: st.DrawFn, step: ProtocolStep) -> ProtocolStep:
    schedule = draw(st.lists(st.integers(0, 7), max_size=4 * step.world_size), label="order of ranks")
    has_hints = not draw(st.booleans(), label="no hints")
    is_fine = step.world_size <= 3 and one_in(draw, 4, "turns at each call")
    return replace(step, schedule=tuple(schedule), has_hints=has_hints, is_fine=is_fine)


def _split(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Draws boxes that tile a tensor: it is cut again and again, at any place along any dim. Shrinks towards one."""
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 4), label="cuts")):
        at = draw(st.integers(0, len(boxes) - 1), label="box to cut")
        box = boxes[at]
        dims = [dim for dim, size in enumerate(box.sizes) if size > 1]
        if not dims:
            continue
        dim = draw(st.sampled_from(dims), label="dim")
        place = draw(st.integers(1, box.sizes[dim] - 1), label="place")
        boxes[at : at + 1] = _cut(box, dim, place)
    return boxes


def _cut(box: Box, dim: int, place: int) -> list[Box]:
    def with_(values: tuple[int, ...], value: int) -> tuple[int, ...]:
        return (*values[:dim], value, *values[dim + 1 :])

    rest = Box(with_(box.offsets, box.offsets[dim] + place), with_(box.sizes, box.sizes[dim] - place))
    return [Box(box.offsets, with_(box.sizes, place)), rest]


def _part(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets, sizes = [], []
    for size in shape:
        begin = draw(st.integers(0, max(0, size - 1)), label="begin")
        offsets.append(begin)
        sizes.append(draw(st.integers(min(1, size), size - begin), label="size"))
    return Box(tuple(offsets), tuple(sizes))


def _planned(draw: st.DrawFn, leaves: tuple[ProtocolLeaf, ...], action: str) -> ProtocolStep:
    world_size = _world(draw)
    if draw(st.booleans(), label="any order of ranks"):
        ranks = tuple(draw(st.permutations(range(world_size)), label="ranks"))
        mesh = Mesh(("dp",), (world_size,), ranks)
    else:
        mesh = draw(meshes(world_size, any_order=False), label="mesh")
    held = []
    for leaf in leaves:
        is_plain = not leaf.dtype or one_in(draw, 5, "plain")
        cuts = None if is_plain else draw(placements(len(leaf.shape), mesh, strided=False), label="placements")
        held.append(LeafLayout(cuts))
    layout = Layout(world_size, mesh, tuple(held))
    step = ProtocolStep("save" if action == "save" else "load", "a", world_size, layout=layout)
    return replace(_in_any_order(draw, step), has_hints=True)


def _stopped(draw: st.DrawFn, step: ProtocolStep) -> ProtocolStep:
    part = "planner" if step.layout is not None else "storage"
    kind: Literal["raises", "dies"] = draw(st.sampled_from(("raises", "dies")), label="how it stops")
    calls = [call for call in CALLS[part, step.action] if kind == "raises" or call not in BY_STORAGE]
    call = draw(st.sampled_from(calls), label="where it stops")
    rank = 0 if call in ON_COORDINATOR else draw(st.integers(0, step.world_size - 1), label="which rank stops")
    when: Literal["before", "after"] = draw(st.sampled_from(("before", "after")), label="when")
    return replace(step, halt=Halt(rank, call, kind, when))
