"""The oracle's geometry, against torch's own splitting of real tensors and against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dcpbench.case import Layout, LeafLayout, Part, TensorLeaf
from dcpbench.geometry import Box, full_region, tiling_fault
from dcpbench.strategies import layouts, shapes


@st.composite
def placed_tensors(draw):
    leaf = TensorLeaf((Part("key", "a"),), draw(shapes()))
    return leaf, draw(layouts([leaf], draw(st.integers(1, 8))))


def torch_shard(shape, layout: Layout, leaf: LeafLayout, rank: int) -> torch.Tensor | None:
    """What torch's own placements leave of the numbers 0, 1, 2, … on a rank."""
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    coordinate = layout.mesh.coordinate(rank)
    if leaf.placements is None:
        return tensor
    if coordinate is None:
        return None
    for at, size, cut in zip(coordinate, layout.mesh.sizes, leaf.placements, strict=True):
        if cut.dim is not None:
            placement = (
                Shard(cut.dim) if cut.split_factor == 1 else _StridedShard(cut.dim, split_factor=cut.split_factor)
            )
            tensor = placement._split_tensor(tensor, size, with_padding=False)[0][at]
    return tensor


@settings(max_examples=300)
@given(placed=placed_tensors())
def test_regions_are_what_torch_splits(placed):
    leaf, layout = placed
    for rank in range(layout.world_size):
        region = layout.region(0, leaf.shape, rank)
        want = torch_shard(leaf.shape, layout, layout.leaves[0], rank)
        assert (region is None) == (want is None)
        if region is None:
            continue
        assert region.shape == tuple(want.shape)
        whole = np.arange(math.prod(leaf.shape)).reshape(leaf.shape)
        got = whole[np.ix_(*(region.indices(d) for d in range(len(leaf.shape))))] if leaf.shape else whole
        assert got.tolist() == want.tolist()
        assert sum(box.numel for box in region.boxes()) == region.numel


@pytest.mark.parametrize(
    ("shape", "boxes", "kind"),
    [
        ((4, 4), [Box((0, 0), (2, 4)), Box((2, 0), (2, 4))], None),
        ((4, 4), [Box((0, 0), (2, 4)), Box((2, 1), (2, 3))], "gap"),
        ((4, 4), [Box((0, 0), (3, 4)), Box((2, 0), (2, 4))], "overlap"),
        ((4, 4), [Box((0, 0), (4, 5))], "out-of-bounds"),
        ((4, 4), [Box((0,), (4,))], "out-of-bounds"),
        ((4, 4), [Box((0, 0), (4, 4)), Box((4, 0), (0, 4))], None),
        ((), [Box((), ())], None),
        ((), [], "gap"),
        ((), [Box((), ()), Box((), ())], "overlap"),
        ((0, 3), [], None),
        ((3,), [], "gap"),
    ],
)
def test_tiling_faults(shape, boxes, kind):
    fault = tiling_fault(shape, boxes)
    assert (fault.kind if fault else None) == kind


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    corners=st.lists(st.tuples(*[st.integers(0, 4)] * 2, *[st.integers(0, 3)] * 2), max_size=4),
)
def test_tiling_faults_against_counting(shape, corners):
    boxes = [Box((a, b), (c, d)) for a, b, c, d in corners]
    fault = tiling_fault(shape, boxes)
    count = {index: sum(box.contains(index) for box in boxes) for index in itertools.product(*map(range, shape))}
    if fault is None:
        assert all(box.fits(shape) for box in boxes)
        assert set(count.values()) <= {1}
    elif fault.kind == "gap":
        (box,) = fault.boxes
        assert count[box.offsets] == 0
    elif fault.kind == "overlap":
        assert max(count.values()) > 1
    else:
        assert not fault.boxes[0].fits(shape)


def test_a_region_finds_its_boxes_and_indices():
    region = full_region((3, 4))
    assert region.global_index((2, 1)) == (2, 1)
    assert region.box_of((2, 1)) == Box((0, 0), (3, 4))
    with pytest.raises(ValueError, match="Expected an index of the region"):
        region.box_of((3, 0))
