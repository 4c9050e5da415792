import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.slabs import runs_of, slabs

SIZES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def positions(size, offsets, sizes):
    """The places of a region's elements in the row-major order of the whole tensor."""
    strides = [math.prod(size[dim + 1 :]) for dim in range(len(size))]
    indices = itertools.product(*(range(o, o + n) for o, n in zip(offsets, sizes, strict=True)))
    return [sum(i * s for i, s in zip(index, strides, strict=True)) for index in indices]


@settings(deadline=None)
@given(SIZES, st.integers(1, 40))
def test_slabs_lie_one_after_the_other(size, max_elements):
    seen = []
    for offsets, sizes in slabs(size, max_elements):
        assert 1 <= math.prod(sizes) <= max_elements
        seen += positions(size, offsets, sizes)
    assert seen == list(range(math.prod(size)))


@settings(deadline=None)
@given(st.data())
def test_runs_are_what_a_region_covers(data):
    size = data.draw(SIZES.filter(lambda size: 0 not in size))
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in size)
    lengths = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(size, offsets, strict=True))
    runs = runs_of(size, offsets, lengths, 2)
    outer = itertools.product(*map(range, lengths[: runs.num_outer]))
    starts = [runs.first + sum(i * s for i, s in zip(index, runs.strides, strict=False)) for index in outer]
    covered = [at // 2 + i for at in starts for i in range(runs.run_bytes // 2)]
    assert covered == positions(size, offsets, lengths)
    if len(starts) > 1 and lengths[runs.num_outer - 1] > 1:
        assert runs.gap_bytes == starts[1] - starts[0] - runs.run_bytes


@pytest.mark.parametrize(
    ("size", "offsets", "lengths", "num_outer"),
    [
        ((), (), (), 0),
        ((8, 8), (2, 0), (3, 8), 0),
        ((8, 8), (2, 3), (1, 5), 0),
        ((8, 8), (2, 3), (2, 5), 1),
        ((4, 8, 8), (1, 0, 0), (3, 8, 8), 0),
        ((4, 8, 8), (0, 2, 0), (4, 2, 8), 1),
    ],
)
def test_as_few_runs_as_there_are(size, offsets, lengths, num_outer):
    assert runs_of(size, offsets, lengths, 4).num_outer == num_outer
