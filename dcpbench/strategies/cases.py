"""Strategies for whole cases. Every one builds valid cases; none filters.

All shrink towards one rank, one leaf, the smallest shape that still splits unevenly, contiguous memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from dcpbench.case import Case, Layout, LeafLayout, Mesh, Misuse, ObjectLeaf, Options, Part, Step, TensorLeaf
from dcpbench.strategies.layouts import layouts, world_sizes
from dcpbench.strategies.values import dtypes, keys, shapes, values

__all__ = ["bad_loads", "multi_checkpoint", "resharding", "round_trips", "scope", "without_process_group"]


@dataclass(slots=True)
class Scope:
    """What cases may ask for. The pytest plugin sets the one of the session, :data:`scope`, from its options.

    Attributes:
        max_world_size: the largest world that a case may use.
        max_tensors, max_objects: leaves per case.
    """

    max_world_size: int = 4
    max_tensors: int = 4
    max_objects: int = 3


scope = Scope()
"""Read at each draw, since strategies are built when a suite is imported, before the options are known."""


LARGE_SHAPES = ((257, 1031), (65_537,), (3, 300, 200))
"""Beyond the buffers and block sizes that an implementation may have: a quarter of a million elements and less."""

_seeds = st.integers(0, 2**16)


@st.composite
def leaf_paths(draw: st.DrawFn, count: int) -> list[tuple[Part, ...]]:
    """Draws ``count`` paths of different FQNs that together form one nested state dict.

    A container is a dict or a list; list indices are given in order, without holes; a dict may have int keys.
    """
    paths: list[tuple[Part, ...]] = []
    groups: dict[tuple[Part, ...], int] = {}
    taken: set[str] = set()
    for number in range(count):
        base = draw(st.sampled_from([(), *groups]), label="container")
        path = (*base, _free_part(draw, base, groups, taken, number))
        if draw(st.sampled_from([False, False, True]), label="nested"):
            is_list = draw(st.booleans(), label="list")
            groups[path] = 0 if is_list else -1
            path = (*path, _free_part(draw, path, groups, taken, number))
        paths.append(path)
    return paths


def _free_part(
    draw: st.DrawFn, base: tuple[Part, ...], groups: dict[tuple[Part, ...], int], taken: set[str], number: int
) -> Part:
    """Draws the last part of a path below ``base``, such that no other path has, or runs through, the same FQN."""
    prefix = "".join(f"{part.value}." for part in base)
    if groups.get(base, -1) >= 0:
        part = Part("index", groups[base])
        groups[base] += 1
    elif base and draw(st.sampled_from([False, False, False, True]), label="int key"):
        part = Part("key", draw(st.integers(0, 2), label="int"))
    else:
        part = Part("key", draw(keys(), label="key"))
    while f"{prefix}{part.value}" in taken:
        part = Part("key", number + 3 if isinstance(part.value, int) else f"{part.value}{number}")
    taken.add(f"{prefix}{part.value}")
    return part


@st.composite
def contents(draw: st.DrawFn) -> tuple[tuple[TensorLeaf, ...], tuple[ObjectLeaf, ...]]:
    """Draws the leaves of a state dict; at least one tensor or one object."""
    num_tensors = draw(st.sampled_from([n for n in (1, 2, 3, 4, 0) if n <= scope.max_tensors]), label="tensors")
    least = 1 if num_tensors == 0 else 0
    num_objects = draw(st.integers(least, max(least, scope.max_objects)), label="objects")
    paths = draw(leaf_paths(num_tensors + num_objects))
    tensors = []
    for path in paths[:num_tensors]:
        is_large = draw(st.sampled_from([False] * 24 + [True]), label="large")
        shape = draw(st.sampled_from(LARGE_SHAPES) if is_large else shapes(), label="shape")
        is_expanded = bool(shape) and draw(st.sampled_from([False] * 7 + [True]), label="expanded")
        tensors.append(TensorLeaf(path, shape, draw(dtypes(), label="dtype"), is_expanded))
    return tuple(tensors), tuple(ObjectLeaf(path, draw(values(), label="value")) for path in paths[num_tensors:])


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
    return Case("reshard", draw(_seeds), tensors, objects, pair, (Step("save", 0), Step("load", 1)))


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
    return Case("several", draw(_seeds), tensors, objects, pair, tuple(steps), options)


@st.composite
def without_process_group(draw: st.DrawFn) -> Case:
    """Draws a case that saves on N ranks and loads in one process without a process group."""
    tensors, objects = draw(contents())
    saved_on = draw(layouts(tensors, draw(world_sizes(scope.max_world_size), label="ranks")), label="save layout")
    alone = Layout(1, Mesh(("dp",), (1,), (0,)), tuple(LeafLayout() for _ in tensors), distributed=False)
    return Case("alone", draw(_seeds), tensors, objects, (saved_on, alone), (Step("save", 0), Step("load", 1)))


@st.composite
def bad_loads(draw: st.DrawFn) -> Case:
    """Draws a case whose load asks for what is not there, on all ranks or on one; all ranks must refuse."""
    tensors, objects = draw(contents())
    world = draw(world_sizes(scope.max_world_size), label="ranks")
    pair = tuple(draw(layouts(tensors, world), label="layout") for _ in range(2))
    number = draw(st.integers(0, max(0, len(tensors) - 1)), label="misused leaf")
    kinds: list[Misuse] = ["no-checkpoint"]
    if tensors and tensors[number].path[-1].kind == "key":
        kinds.insert(0, "unknown-key")
    if tensors and tensors[number].shape:
        kinds.insert(0, "other-size")
    misuse = draw(st.sampled_from(kinds), label="misuse")
    if misuse == "no-checkpoint":
        return Case("refuse", 0, tensors, objects, pair, (Step("load", 1, "absent", misuse="no-checkpoint"),))
    on = draw(st.one_of(st.none(), st.integers(0, world - 1)), label="on rank") if misuse == "unknown-key" else None
    steps = (Step("save", 0), Step("load", 1, misuse=misuse, misused=number, misused_on=on))
    return Case("refuse", draw(_seeds), tensors, objects, pair, steps)
