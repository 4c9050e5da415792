import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.boxes import BoxIndex, intersect, is_in_bounds
from reference.tiling import find_tiling_fault, tiles


@dataclass(frozen=True)
class Box:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@st.composite
def boxes_in(draw, size, max_count=6):
    count = draw(st.integers(0, max_count))
    found = []
    for _ in range(count):
        offsets = tuple(draw(st.integers(0, extent)) for extent in size)
        found.append(Box(offsets, tuple(draw(st.integers(0, e - o)) for o, e in zip(offsets, size, strict=True))))
    return found


SIZES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def tilings(draw):
    """Cut a box again and again: always an exact tiling."""
    size = draw(st.lists(st.integers(1, 6), max_size=3).map(tuple))
    found = [Box((0,) * len(size), size)]
    for _ in range(draw(st.integers(0, 6)) if size else 0):
        box = found.pop(draw(st.integers(0, len(found) - 1)))
        dim = draw(st.integers(0, len(size) - 1))
        at = draw(st.integers(0, box.sizes[dim]))
        left = Box(box.offsets, tuple(at if d == dim else n for d, n in enumerate(box.sizes)))
        right = Box(
            tuple(o + at if d == dim else o for d, o in enumerate(box.offsets)),
            tuple(n - at if d == dim else n for d, n in enumerate(box.sizes)),
        )
        found += [left, right]
    return size, draw(st.permutations(found))


def cells(box):
    return set(itertools.product(*(range(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))))


@settings(deadline=None)
@given(tilings())
def test_a_cut_up_box_has_no_fault(tiling):
    size, boxes = tiling
    assert find_tiling_fault(boxes, size) is None
    assert find_tiling_fault(boxes, size, must_cover=False) is None


@settings(deadline=None)
@given(st.data())
def test_faults_are_found_exactly_where_brute_force_finds_them(data):
    size = data.draw(SIZES)
    boxes = data.draw(boxes_in(size))
    counts = dict.fromkeys(itertools.product(*map(range, size)), 0)
    for box in boxes:
        for cell in cells(box):
            counts[cell] += 1
    fault = find_tiling_fault(boxes, size)
    if all(count == 1 for count in counts.values()):
        assert fault is None
    else:
        assert fault is not None
        assert counts[fault.index] == len(fault.positions) != 1
        assert all(fault.index in cells(boxes[i]) for i in fault.positions)
    overlap = find_tiling_fault(boxes, size, must_cover=False)
    if max(counts.values(), default=0) <= 1:
        assert overlap is None
    else:
        assert counts[overlap.index] >= 2
        assert all(overlap.index in cells(boxes[i]) for i in overlap.positions)


@settings(deadline=None)
@given(st.data())
def test_the_index_finds_what_comparing_all_finds(data):
    size = data.draw(SIZES)
    boxes = data.draw(boxes_in(size, max_count=30))
    wanted = data.draw(boxes_in(size))
    index = BoxIndex(boxes)
    for query in wanted:
        expected = {i: cells(box) & cells(query) for i, box in enumerate(boxes) if cells(box) & cells(query)}
        found = index.overlapping(query.offsets, query.sizes)
        assert [i for i, _, _ in found] == sorted(expected)
        for i, offsets, sizes in found:
            assert cells(Box(tuple(offsets), tuple(sizes))) == expected[i]


def test_intersect_of_neighbours_is_none():
    assert intersect((0,), (2,), (2,), (2,)) is None
    assert intersect((), (), (), ()) == ([], [])


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        (Box((0,), (4,)), (4,), True),
        (Box((4,), (0,)), (4,), True),
        (Box((1,), (4,)), (4,), False),
        (Box((-1,), (1,)), (4,), False),
        (Box((0, 0), (1, 1)), (4,), False),
        (Box((), ()), (), True),
    ],
)
def test_bounds(box, size, expected):
    assert is_in_bounds(box, size) is expected


def test_a_large_tiling_is_checked_without_comparing_pairs():
    side = 150
    grid = [Box((i, j), (1, 1)) for i in range(side) for j in range(side)]
    assert find_tiling_fault(grid, (side, side)) is None
    fault = find_tiling_fault([box for box in grid if box.offsets != (77, 3)], (side, side))
    assert (fault.index, fault.positions) == ((77, 3), [])
    index = BoxIndex(grid)
    for _ in range(5):
        assert math.prod((side, side)) == len(index.overlapping((0, 0), (side, side)))


def scattered(count, num_dims, seed):
    """Boxes of all sizes, some empty, a few as large as everything."""
    numbers = random.Random(seed)
    extent = 1000
    found = []
    for _ in range(count):
        longest = numbers.choice([1, 5, 50, extent])
        offsets = tuple(numbers.randrange(extent) for _ in range(num_dims))
        found.append(Box(offsets, tuple(numbers.randint(0, longest) for _ in range(num_dims))))
    return found


@pytest.mark.parametrize("num_dims", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [17, 1500])
@pytest.mark.parametrize("max_candidates", [1, 1000, 1 << 16])
def test_many_boxes_are_found_by_their_order(monkeypatch, max_candidates, count, num_dims):
    boxes = scattered(count, num_dims, seed=count)
    index = BoxIndex(boxes)
    for query in scattered(25, num_dims, seed=-count):
        expected = []
        for position, box in enumerate(boxes):
            common = intersect(box.offsets, box.sizes, query.offsets, query.sizes)
            if common is not None:
                expected.append((position, *common))
        assert index.overlapping(query.offsets, query.sizes) == expected
    queries = scattered(40, num_dims, seed=-count)
    lows, highs = as_arrays(queries)
    monkeypatch.setattr("reference.boxes._MAX_CANDIDATES", max_candidates)
    rows, positions, begins, ends = (array.tolist() for array in index.pairs(lows, highs))
    expected = []
    for row, query in enumerate(queries):
        for position, begin, extent in index.overlapping(query.offsets, query.sizes):
            expected.append((row, position, begin, [a + b for a, b in zip(begin, extent, strict=True)]))
    assert list(zip(rows, positions, begins, ends, strict=True)) == expected


def test_boxes_of_different_ranks_are_refused():
    boxes = [Box((i, 0), (1, 1)) for i in range(20)] + [Box((1,), (1,)), Box((1, 2, 3), (1, 1, 1))]
    with pytest.raises(ValueError, match="Expected boxes of 2 dims"):
        BoxIndex(boxes).overlapping((0, 0), (5, 5))
    with pytest.raises(ValueError, match="Expected boxes of 1 dims"):
        BoxIndex(boxes[:20]).overlapping((0,), (5,))


def as_arrays(boxes):
    lows = np.array([box.offsets for box in boxes], np.int64).reshape(len(boxes), -1)
    return lows, lows + np.array([box.sizes for box in boxes], np.int64).reshape(len(boxes), -1)


@settings(deadline=None)
@given(tilings(), st.data())
def test_tiles_agrees_with_the_evidence(tiling, data):
    size, boxes = tiling
    boxes = [box for box in boxes if 0 not in box.sizes]
    if not boxes or 0 in size:
        return
    assert tiles(*as_arrays(boxes), size)
    spoilt = list(boxes)
    position = data.draw(st.integers(0, len(boxes) - 1))
    match data.draw(st.sampled_from(["drop", "double"])):
        case "drop":
            del spoilt[position]
        case "double":
            spoilt.append(spoilt[position])
    if spoilt:
        assert not tiles(*as_arrays(spoilt), size)


def test_numbers_too_large_to_tell_are_left_to_the_evidence():
    huge = 2**40
    halves = [Box((0, 0), (huge // 2, huge)), Box((huge // 2, 0), (huge // 2, huge))]
    assert tiles(*as_arrays(halves), (huge, huge))
    quarters = [Box((i * huge // 2, j * huge // 2), (huge // 2, huge // 2)) for i in (0, 1) for j in (0, 1)]
    assert not tiles(*as_arrays(quarters), (huge, huge))
    assert find_tiling_fault(quarters * 1, (huge, huge)) is None
