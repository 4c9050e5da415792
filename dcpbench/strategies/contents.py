"""Strategies for what a state dict holds: paths, tensors, values."""

from __future__ import annotations

from hypothesis import strategies as st

from dcpbench.case import ObjectLeaf, Part, TensorLeaf
from dcpbench.strategies.scope import scope
from dcpbench.strategies.values import alike, dtypes, keys, shapes, values

__all__ = ["MAY_REQUIRE_GRAD", "contents", "leaf_paths", "one_in"]


LARGE_SHAPES = (*((257, 1031), (65_537,), (3, 300, 200)) * 3, (2_100_001,))
"""Beyond the buffers, blocks and parts of an upload that an implementation may have: up to 16 MiB in 8 bytes each."""

LONG_LISTS = (*(12,) * 7, 270)
"""Indices of two digits: their order as text is another one. Then more items than a byte can count."""

MANY_OBJECTS = 10
"""Values cost next to nothing beside the save and the load: many of them in a case are many kinds seen."""

MAY_REQUIRE_GRAD = frozenset(("float32", "bfloat16", "float16", "float64", "complex64", "complex128"))


def one_in(draw: st.DrawFn, number: int, label: str) -> bool:
    """Draws True about once in ``number`` times. Shrinks towards False."""
    return draw(st.sampled_from([False] * (number - 1) + [True]), label=label)


@st.composite
def leaf_paths(draw: st.DrawFn, count: int) -> list[tuple[Part, ...]]:
    """Draws ``count`` paths of different FQNs that together form one nested state dict.

    A container is a dict or a list; list indices are given in order, without holes; a dict may have int keys.
    """
    paths: list[tuple[Part, ...]] = []
    groups: dict[tuple[Part, ...], int] = {}
    taken: set[str] = set()
    for _ in range(count):
        base = draw(st.sampled_from([(), *groups]), label="container")
        path = (*base, _free_part(draw, base, groups, taken))
        if one_in(draw, 3, "nested"):
            is_list = draw(st.booleans(), label="list")
            groups[path] = 0 if is_list else -1
            path = (*path, _free_part(draw, path, groups, taken))
        paths.append(path)
    return paths


def _free_part(draw: st.DrawFn, base: tuple[Part, ...], groups: dict[tuple[Part, ...], int], taken: set[str]) -> Part:
    """Draws the last part of a path below ``base``, such that no other path has, or runs through, the same FQN."""
    prefix = "".join(f"{part.value}." for part in base)
    value: str | int
    if groups.get(base, -1) >= 0:
        value = groups[base]
        groups[base] += 1
        taken.add(f"{prefix}{value}")
        return Part("index", value)
    value = draw(st.integers(0, 2), label="int") if base and one_in(draw, 4, "int key") else draw(keys(), label="key")
    while f"{prefix}{value}" in taken:
        value = value + 1 if isinstance(value, int) else f"{value}_"
    taken.add(f"{prefix}{value}")
    return Part("key", value)


@st.composite
def contents(draw: st.DrawFn) -> tuple[tuple[TensorLeaf, ...], tuple[ObjectLeaf, ...]]:
    """Draws the leaves of a state dict; at least one tensor or one object.

    Now and then a tensor is large, expanded, a parameter, or the very same as an earlier one; now and then the tensors
    are a long list.
    """
    has_objects = scope.has("objects")
    numbers = [n for n in (1, 2, 3, 4, 2, 3, 0) if n <= scope.max_tensors and (n or has_objects)]
    num_tensors = draw(st.sampled_from(numbers), label="tensors")
    least = 1 if num_tensors == 0 else 0
    most = MANY_OBJECTS if scope.max_objects > 1 and one_in(draw, 4, "many objects") else max(least, scope.max_objects)
    num_objects = draw(st.integers(least, most), label="objects") if has_objects else 0
    if one_in(draw, 16, "long list"):
        length = draw(st.sampled_from(LONG_LISTS), label="length")
        tensors = [TensorLeaf((Part("key", "list"), Part("index", n)), (n + 1,)) for n in range(length)]
        value = draw(values(), label="value")
        return tuple(tensors), tuple(ObjectLeaf((Part("key", f"o{n}"),), value) for n in range(num_objects))
    paths = draw(leaf_paths(num_tensors + num_objects))
    tensors = []
    for path in paths[:num_tensors]:
        tensors.append(draw(_tensors(path, tensors)))
    kind = alike() if one_in(draw, 8, "alike") else values()
    return tuple(tensors), tuple(ObjectLeaf(path, draw(kind, label="value")) for path in paths[num_tensors:])


@st.composite
def _tensors(draw: st.DrawFn, path: tuple[Part, ...], earlier: list[TensorLeaf]) -> TensorLeaf:
    untied = [number for number, tensor in enumerate(earlier) if tensor.tied_to is None]
    if untied and one_in(draw, 10, "tied"):
        number = draw(st.sampled_from(untied), label="tied to")
        like = earlier[number]
        return TensorLeaf(path, like.shape, like.dtype, like.expanded, like.requires_grad, number)
    shape = draw(st.sampled_from(LARGE_SHAPES) if one_in(draw, 25, "large") else shapes(), label="shape")
    dtype = draw(dtypes(), label="dtype")
    is_expanded = bool(shape) and one_in(draw, 8, "expanded")
    is_parameter = dtype in MAY_REQUIRE_GRAD and one_in(draw, 6, "requires grad")
    return TensorLeaf(path, shape, dtype, is_expanded, is_parameter)
