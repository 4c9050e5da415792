"""Strategies for the options of a call: how a checkpoint is named, how planners and writers are made.

All shrink towards the defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from dcpbench.case import Case, IdForm, Layout, ObjectLeaf, Options, Part, Step, TensorLeaf
from dcpbench.strategies.contents import MAY_REQUIRE_GRAD, contents, one_in
from dcpbench.strategies.layouts import layouts, world_sizes
from dcpbench.strategies.scope import narrowed, scope
from dcpbench.strategies.values import dtypes

__all__ = ["changing_states", "lenient_loads", "switched", "with_switches"]

_seeds = st.integers(0, 2**16)
_NAMES = ("ckpt", "step 10", "ключ-权重", "é", "a.b", "%41", "-r", ".hidden", "#1", "x" * 120)
_FORMS: tuple[IdForm, ...] = ("text", "path", "relative", "slash")


@st.composite
def with_switches(draw: st.DrawFn, case: Case) -> Case:
    """Draws ``case`` under another name of its checkpoint, and other options of planners and writers.

    Where state dicts are not flattened, as planners may be told, all keys are at the top.
    """
    names = _NAMES if scope.has("local-folders") else _NAMES[:1]
    name = draw(st.sampled_from(names), label="checkpoint")
    is_flattened = not one_in(draw, 6, "not flattened")
    if not is_flattened:
        case = replace(
            case,
            tensors=tuple(replace(leaf, path=(Part("key", leaf.fqn),)) for leaf in case.tensors),
            objects=tuple(replace(leaf, path=(Part("key", leaf.fqn),)) for leaf in case.objects),
        )
    options = replace(
        case.options,
        id_form=draw(st.sampled_from(_FORMS), label="form of the id"),
        no_dist=draw(st.booleans(), label="no_dist"),
        is_flattened=is_flattened,
        is_deduplicated_low=draw(st.booleans(), label="to the lowest rank"),
        has_file_per_item=one_in(draw, 3, "a file per item"),
        num_threads=draw(st.sampled_from([1, 1, 3]), label="threads"),
    )
    renamed = tuple(replace(step, checkpoint=name) for step in case.steps)
    return narrowed(replace(case, steps=renamed, options=options))


@st.composite
def switched(draw: st.DrawFn) -> Case:
    """Draws a case that saves and loads under other layouts, and with other options than the defaults.

    A rank is alone more often than elsewhere, since some options are for that.
    """
    tensors, objects = draw(contents())
    alone = st.sampled_from([*["several"] * 5, "saver", "loader", "both"])
    which = draw(alone, label="one rank")
    pair = tuple(
        draw(layouts(tensors, 1 if which in (who, "both") else draw(world_sizes(scope.max_world_size), label="ranks")))
        for who in ("saver", "loader")
    )
    case = Case("options", draw(_seeds), tensors, objects, pair, (Step("save", 0), Step("load", 1)))
    return draw(with_switches(case))


@st.composite
def lenient_loads(draw: st.DrawFn) -> Case:
    """Draws a case whose checkpoint lacks leaves that the load asks for, and may leave as they are.

    Now and then it was saved over an older one that had them all: what that held is gone.
    """
    tensors, objects = draw(contents())
    pair = tuple(draw(layouts(tensors, draw(world_sizes(scope.max_world_size), label="ranks"))) for _ in range(2))
    without = draw(_some_of((*tensors, *objects)), label="not saved")
    save, load = Step("save", 0, without=without), Step("load", 1, lenient=True)
    steps: tuple[Step, ...] = (save, load)
    if one_in(draw, 3, "over an older one"):
        steps = (Step("save", 0, version=1), replace(save, may_refuse=True), load)
    return narrowed(Case("lenient", draw(_seeds), tensors, objects, pair, steps))


@st.composite
def _some_of(draw: st.DrawFn, leaves: Sequence[TensorLeaf | ObjectLeaf]) -> tuple[int, ...]:
    """Draws numbers of leaves that may be left out of a state dict: at least one stays, and all of each list."""
    # neither of two tied tensors: they are one, and it would be both there and missing
    pairs = [
        (n, one.tied_to) for n, one in enumerate(leaves) if isinstance(one, TensorLeaf) and one.tied_to is not None
    ]
    tied = {number for pair in pairs for number in pair}
    free = [n for n, leaf in enumerate(leaves) if all(part.kind == "key" for part in leaf.path) and n not in tied]
    if len(free) == len(leaves):
        free = free[1:]
    return tuple(number for number in free if draw(st.booleans(), label="left out"))


@st.composite
def changing_states(draw: st.DrawFn) -> Case:
    """Draws a case that saves several times, each time perhaps with other shapes, dtypes, keys or another layout.

    Half of the cases cache plans, which must not show; each checkpoint is loaded in the end.
    """
    tensors, objects = draw(contents())
    tensors = tuple(_alike(one, draw(_growing(one)), tensors) for one in tensors)
    tensors = tuple(_alike(one, one, tensors) for one in tensors)
    world = draw(world_sizes(scope.max_world_size), label="ranks")
    pair: tuple[Layout, ...] = tuple(draw(layouts(tensors, world), label="layout") for _ in range(2))
    saves: list[Step] = []
    for number, version in enumerate(
        draw(st.sampled_from([(0, 1), (0, 0, 1), (0, 1, 0), (0, 1, 2)]), label="versions")
    ):
        without = draw(_some_of((*tensors, *objects))) if one_in(draw, 4, "other keys") else ()
        layout = draw(st.sampled_from([0, 0, 1]), label="save layout")
        saves.append(Step("save", layout, f"step-{number}", version, without=without))
    loads = [Step("load", draw(st.integers(0, 1)), one.checkpoint, without=one.without) for one in reversed(saves)]
    options = Options(reuse=draw(st.booleans(), label="reuse"), caches_plans=draw(st.booleans(), label="caching"))
    return narrowed(Case("changing", draw(_seeds), tensors, objects, pair, (*saves, *loads), options))


@st.composite
def _growing(draw: st.DrawFn, leaf: TensorLeaf) -> TensorLeaf:
    """Draws ``leaf`` with another shape or dtype later, or as it is."""
    change = draw(st.sampled_from(["nothing", "dtype", "shape", "dtype"]), label="change")
    if change == "shape" and leaf.shape:
        return replace(leaf, later_shape=(leaf.shape[0] + draw(st.sampled_from([1, 4])), *leaf.shape[1:]))
    if change == "dtype":
        others = st.sampled_from(sorted(MAY_REQUIRE_GRAD)) if leaf.requires_grad else dtypes()
        return replace(leaf, later_dtype=draw(others, label="later dtype"))
    return leaf


def _alike(leaf: TensorLeaf, grown: TensorLeaf, tensors: Sequence[TensorLeaf]) -> TensorLeaf:
    """Returns ``grown``, or for a tied tensor one that changes as the tensor that it is tied to."""
    if leaf.tied_to is None:
        return grown
    like = tensors[leaf.tied_to]
    return replace(leaf, later_shape=like.later_shape, later_dtype=like.later_dtype)
