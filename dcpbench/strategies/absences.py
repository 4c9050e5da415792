"""Strategies for cases that need, on purpose, what the backend under test declares absent.

Each such case needs one absent capability and no other. They shrink towards one small tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hypothesis import strategies as st

from dcpbench.capabilities import DTYPE_FAMILIES
from dcpbench.case import Case, Layout, LeafLayout, Mesh, ObjectLeaf, Part, Placement, Step, TensorLeaf
from dcpbench.strategies.scope import scope
from dcpbench.strategies.values import values

__all__ = ["absences"]

_STEPS = (Step("save", 0), Step("load", 0))


@st.composite
def absences(draw: st.DrawFn) -> tuple[Case, ...]:
    """Draws a case for each capability that the backend declares absent and that cases can ask for, in order."""
    wanted = scope.absent & (set(_ON_PURPOSE) - (set() if scope.max_world_size > 1 else _OF_SEVERAL_RANKS))
    return tuple(draw(_ON_PURPOSE[name](), label=name) for name in sorted(wanted))


def _layout(num_tensors: int, world_size: int, placement: Placement | None = None) -> Layout:
    mesh = Mesh(("dp",), (world_size,), tuple(range(world_size)))
    return Layout(world_size, mesh, (LeafLayout((placement or Placement(0),)),) * num_tensors)


@st.composite
def _plain(draw: st.DrawFn, num_tensors: int = 1) -> Case:
    """Draws a case of sharded tensors that needs nothing special: saved and loaded under one layout."""
    size = draw(st.sampled_from([8, 16, 24]), label="size")
    tensors = tuple(TensorLeaf((Part("key", f"w{n}"),), (size, 2)) for n in range(num_tensors))
    world = draw(st.integers(1, min(4, scope.max_world_size)), label="ranks")
    return Case("absent", draw(st.integers(0, 99)), tensors, (), (_layout(num_tensors, world),), _STEPS)


def _with_tensor(shape: tuple[int, ...], dtype: st.SearchStrategy[str]) -> st.SearchStrategy[Case]:
    """Returns a strategy for cases with a further tensor, which each rank holds whole."""

    def added(case: Case, dtype: str) -> Case:
        extra = TensorLeaf((Part("key", "extra"),), shape, dtype)
        layout = case.layouts[0]
        layout = replace(layout, leaves=(*layout.leaves, LeafLayout((Placement(),))))
        return replace(case, tensors=(*case.tensors, extra), layouts=(layout,))

    return st.builds(added, _plain(), dtype)


def _with_value() -> st.SearchStrategy[Case]:
    def added(case: Case, value: object) -> Case:
        return replace(case, objects=(ObjectLeaf((Part("key", "value"),), value),))

    return st.builds(added, _plain(), values())


def _strided() -> st.SearchStrategy[Case]:
    def bent(case: Case) -> Case:
        world = min(2, scope.max_world_size)
        return replace(case, layouts=(_layout(1, world, Placement(0, 2)),))

    return _plain().map(bent)


@st.composite
def _resharded(draw: st.DrawFn) -> Case:
    case = draw(_plain())
    most = min(4, scope.max_world_size)
    pairs = [(n, m) for n in range(1, most + 1) for m in range(1, most + 1) if n != m or n > 1]
    saved_on, loaded_on = draw(st.sampled_from(pairs), label="saving and loading ranks")
    if saved_on == loaded_on:  # by columns, then
        layouts = (_layout(1, saved_on), _layout(1, saved_on, Placement(1)))
    else:
        layouts = (_layout(1, saved_on), _layout(1, loaded_on))
    return replace(case, layouts=layouts, steps=(Step("save", 0), Step("load", 1)))


def _with_steps(*steps: Step, num_tensors: int = 1) -> Callable[[], st.SearchStrategy[Case]]:
    return lambda: _plain(num_tensors).map(lambda case: replace(case, steps=steps))


def _readers() -> st.SearchStrategy[Case]:
    def read_by_all(case: Case) -> Case:
        mesh = Mesh(("dp",), (scope.max_world_size,), tuple(range(scope.max_world_size)))
        readers = Layout(scope.max_world_size, mesh, (LeafLayout(),), distributed=False)
        saved_on = replace(_layout(1, 1), leaves=(LeafLayout(),))
        return replace(case, layouts=(saved_on, readers), steps=(Step("save", 0), Step("load", 1)))

    return _plain().map(read_by_all)


def _of_family(dtypes: tuple[str, ...]) -> Callable[[], st.SearchStrategy[Case]]:
    return lambda: _with_tensor((6,), st.sampled_from(dtypes))


_ON_PURPOSE: dict[str, Callable[[], st.SearchStrategy[Case]]] = {
    "objects": _with_value,
    "resharding": _resharded,
    "strided-shards": _strided,
    "partial-loads": _with_steps(Step("save", 0), Step("load", 0, without=(1,)), num_tensors=2),
    "scalar-tensors": lambda: _with_tensor((), st.just("float32")),
    "empty-tensors": lambda: _with_tensor((0, 3), st.just("float32")),
    **{family: _of_family(members) for family, members in DTYPE_FAMILIES.items()},
    "overwrite": _with_steps(Step("save", 0), Step("save", 0, version=1), Step("load", 0)),
    "several-checkpoints": _with_steps(
        Step("save", 0, "one"), Step("save", 0, "two", version=1), Step("load", 0, "one"), Step("load", 0, "two")
    ),
    "concurrent-readers": _readers,
}
"""How a case asks for each capability."""

_OF_SEVERAL_RANKS = {"resharding", "strided-shards", "concurrent-readers"}
