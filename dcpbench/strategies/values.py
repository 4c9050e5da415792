"""Strategies for what a leaf may be: dtypes, shapes, Python values, keys."""

from __future__ import annotations

import datetime
import math
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from decimal import Decimal
from pathlib import PurePosixPath

import numpy as np
from hypothesis import strategies as st

from dcpbench import objects, sample_types
from dcpbench.content import DTYPES
from dcpbench.strategies.scope import scope

__all__ = ["alike", "dtypes", "keys", "shapes", "values"]

MAX_LEAF_ELEMENTS = 2048

_SIZES = (5, 7, 1, 2, 3, 4, 6, 8, 11, 13, 16, 0, 17, 23, 31, 64, 5, 7, 9, 10)
"""Sizes of a dim, in the order in which Hypothesis tries them: 5 first, the smallest that no mesh of 2 to 4 divides."""


def dtypes() -> st.SearchStrategy[str]:
    """Returns a strategy for every dtype that torch can store and the backend takes. Shrinks towards float32."""
    return st.sampled_from([dtype for dtype in DTYPES if scope.takes_dtype(dtype)])


def shapes(max_dims: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Returns a strategy for shapes from 0-d to ``max_dims``, with empty, prime and uneven sizes.

    A shape has at most 2048 elements: further dims are cut to what is left. Shrinks towards one dim of 5.
    """
    least = 0 if scope.has("scalar-tensors") else 1
    few_dims = st.sampled_from([n for n in (1, 2, 1, 2, 0, 3, 3, 4) if least <= n <= max_dims])
    sizes = _SIZES if scope.has("empty-tensors") else tuple(size for size in _SIZES if size)
    return few_dims.flatmap(lambda n: st.tuples(*[st.sampled_from(sizes)] * n)).map(_cut)


def _cut(shape: tuple[int, ...]) -> tuple[int, ...]:
    held: list[int] = []
    for size in shape:
        room = MAX_LEAF_ELEMENTS // max(1, math.prod(max(1, s) for s in held))
        held.append(min(size, max(1, room)))
    return tuple(held)


_EXTREMES = (
    *(2**53 + 1, -(2**63) - 1, 2**64, 1, 0, True, False),
    *(math.nan, -math.nan, -0.0, 0.0, 1.0, math.inf, -math.inf, 5e-324),
    *("", "\0", "ключ", "\U0001f600", "1", "None"),
    *(b"", b"\0x", b"a\0b", b"x\0", bytearray(b"a\0b")),
)
"""What formats not made for Python values get wrong: limits of double and int64, kinds of zero and of nothing."""

_TEXTS = ("ключ", "权重", "\U0001f600", "e\u0301", "\0", "\n", "a.b/c")
"""Hypothesis draws mostly Latin letters."""


def values() -> st.SearchStrategy[object]:
    """Returns a strategy for values that are no tensors, encoded by :mod:`dcpbench.objects`.

    No dict stands at the top or within lists: DCP takes those for parts of the state dict. Shrinks towards None.
    """
    extremes = st.sampled_from(_EXTREMES)
    scalars = st.one_of(
        st.none(),
        st.integers(-3, 3),
        st.booleans(),
        st.text(max_size=5),
        st.sampled_from(_TEXTS),
        st.integers(min_value=-(2**80), max_value=2**80),
        st.floats(),
        st.binary(max_size=8),
        st.complex_numbers(),
        st.sampled_from([70_000, 4096]).map(bytes),
    )
    inside_tuples = st.recursive(
        scalars,
        lambda inner: st.one_of(st.dictionaries(st.text(max_size=3), inner, max_size=2), st.lists(inner, max_size=3)),
    )
    plain = st.recursive(
        scalars,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inside_tuples),
            st.frozensets(st.integers(), max_size=3),
            st.sets(st.text(max_size=3), max_size=3),
        ),
        max_leaves=6,
    )
    lists = st.lists(extremes, min_size=1, max_size=4)
    # one_of would weigh each scalar like a whole kind
    kinds = [scalars, extremes, plain, lists, lists.map(tuple), *[_rich_values(scalars)] * 2]
    return st.sampled_from(kinds).flatmap(lambda kind: kind).map(_encode)


_ENCODED: tuple[object, ...] = (
    *({"Size": [2, 3]}, {"Size": []}, {"dtype": "bfloat16"}, {"device": "cpu"}, {"device": "cuda:1"}),
    *({"tuple": [None, {"Tensor": ["uint8", [3], "AQID"]}]}, {"tuple": [{"Tensor": ["float32", [], "AACAPw=="]}]}),
)
"""Values of torch's own types, encoded: an RNG state beside tensors is a tensor within a tuple."""


def _rich_values(scalars: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Returns a strategy for records, dates, numpy's and torch's values, containers with a rule of their own."""
    inner = st.lists(scalars, max_size=2)
    names = st.text(max_size=3)
    return st.one_of(
        st.builds(sample_types.Betas, scalars, inner),
        st.builds(sample_types.Progress, scalars, inner),
        st.sampled_from([*sample_types.Phase, sample_types.Parts.HEAD, sample_types.Parts(3)]),
        st.builds(deque, inner, st.sampled_from([None, 3])),
        st.dictionaries(names, st.integers(), max_size=2).map(lambda held: (defaultdict(int, held),)),
        st.dictionaries(names, scalars, max_size=2).map(lambda held: (OrderedDict(held),)),
        st.sampled_from([range(3), slice(None, 5), range(5, 0, -2)]),
        st.sampled_from(
            [datetime.timedelta(days=-1, microseconds=1), datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)]
        ),
        st.sampled_from([PurePosixPath("a/b"), Decimal("1e-400"), Decimal("-0")]),
        st.sampled_from([np.float32(0.1), np.int64(-1), np.bool_(True), np.float64("nan"), np.str_("x"), np.uint8(7)]),
        st.sampled_from([np.arange(6).reshape(2, 3), np.zeros(0, "f4"), np.array(1.5), np.arange(4.0)[::2]]),
        st.sampled_from(_ENCODED).map(_Encoded),
    )


@dataclass(frozen=True)
class _Encoded:
    """A value that is encoded already, since making it would need torch."""

    held: object


def _encode(value: object) -> object:
    return value.held if isinstance(value, _Encoded) else objects.encode(value)


def alike() -> st.SearchStrategy[object]:
    """Returns a strategy for encoded values that are equal to each other in Python and yet not the same."""
    return st.sampled_from([1, True, 1.0, 0, False, 0.0, -0.0, 1 + 0j]).map(objects.encode)


def keys() -> st.SearchStrategy[str]:
    """Returns a strategy for dict keys, awkward ones too: dots, blanks, digits, slashes, no Latin letters.

    Shrinks towards "a".
    """
    awkward = [
        "0",
        "module.weight",
        "a b",
        "ключ",
        "权重",
        "a/b",
        "..",
        "%d",
        "",
        "__0_0.distcp",
        "\n",
        "\u00e9",
        "e\u0301",
    ]
    return st.one_of(st.sampled_from(["a", "b", "weight", "bias"]), st.sampled_from(awkward), st.text(max_size=6))
