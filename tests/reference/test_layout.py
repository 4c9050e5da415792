import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from virtual_ranks import as_dtensor, local_part, mesh_for, shard

from reference.layout import LayoutError, local_boxes, local_runs, tensor_shard


@st.composite
def layouts(draw):
    mesh_shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    size = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    ranks = torch.tensor(draw(st.permutations(range(torch.Size(mesh_shape).numel())))).reshape(mesh_shape)
    dims = st.integers(0, len(size) - 1)
    placement = st.one_of(
        st.just(Replicate()),
        st.builds(Shard, dims),
        st.builds(lambda dim, factor: _StridedShard(dim, split_factor=factor), dims, st.integers(1, 4)),
    )
    return size, ranks, [draw(placement) for _ in mesh_shape]


@settings(deadline=None)
@given(layouts())
def test_boxes_say_which_elements_the_rank_holds(layout):
    size, ranks, placements = layout
    whole = torch.arange(torch.Size(size).numel()).reshape(size)
    held = torch.zeros(size, dtype=torch.int64)
    for rank in range(ranks.numel()):
        value = shard(whole, rank, ranks, placements)
        boxes = local_boxes("w", value)
        covered = 0
        for box in boxes:
            where = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
            assert torch.equal(box.data, whole[where])
            held[where] += 1
            covered += box.data.numel()
        assert covered == value.to_local().numel()
        assert all(box.data.numel() for box in boxes) or whole.numel() == 0
    copies = 1
    for axis, placement in enumerate(placements):
        copies *= ranks.shape[axis] if placement.is_replicate() else 1
    assert bool((held == copies).all())


def test_runs_of_a_strided_shard_are_separate():
    assert local_runs(9, ((4, 0, 2),)) == ((0, 2), (5, 1))
    assert local_runs(8, ((2, 0, 2), (2, 1, None))) == ((4, 2),)
    assert local_runs(3, ((4, 3, None),)) == ()
    assert local_runs(8, ()) == ((0, 8),)


def test_a_box_is_a_view_of_the_local_tensor():
    whole = torch.arange(36).reshape(9, 4)
    value = shard(whole, 0, [0, 1, 2, 3], [_StridedShard(0, split_factor=2)])
    boxes = local_boxes("w", value)
    assert [(tuple(box.offsets), tuple(box.sizes)) for box in boxes] == [((0, 0), (2, 4)), ((5, 0), (1, 4))]
    boxes[1].data.fill_(-1)
    assert value.to_local()[2].tolist() == [-1] * 4


def test_a_rank_outside_the_mesh_holds_nothing():
    assert local_boxes("w", shard(torch.ones(4), 3, [0, 1], [Shard(0)])) == []


def test_an_empty_tensor_is_one_box_on_each_rank():
    for rank in range(3):
        boxes = local_boxes("w", shard(torch.ones(0, 4), rank, [0, 1, 2], [Shard(1)]))
        assert [(tuple(box.offsets), tuple(box.sizes)) for box in boxes] == [((0, 0), (0, 4))]


def test_a_scalar_is_one_box():
    (box,) = local_boxes("w", torch.tensor(3.0))
    assert (box.offsets, box.sizes) == (torch.Size([]), torch.Size([]))
    (box,) = local_boxes("w", shard(torch.tensor(3.0), 0, [0, 1], [Replicate()]))
    assert box.data.item() == 3.0


def test_partial_is_refused_by_name():
    mesh = mesh_for(0, [0, 1])
    value = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
    with pytest.raises(LayoutError, match=r"'layer\.w'.*Partial.*redistribute"):
        local_boxes("layer.w", value)


def test_a_local_tensor_that_contradicts_its_placements_is_refused():
    mesh = mesh_for(0, [0, 1])
    value = as_dtensor(torch.ones(3), torch.ones(10), mesh, [Shard(0)])
    with pytest.raises(LayoutError, match=r"shape \(5,\).*local shape=\(3,\)"):
        local_boxes("w", value)


def test_another_order_of_mesh_axes_is_followed():
    whole = torch.arange(8)
    for rank, (row, column) in enumerate(itertools.product(range(2), range(2))):
        mesh = mesh_for(rank, [[0, 1], [2, 3]])
        # First by axis 1, then by axis 0: the reverse of the default.
        local = whole.chunk(2)[column].chunk(2)[row]
        value = as_dtensor(local.clone(), whole, mesh, [Shard(0), Shard(0)])
        entry = type(value._spec.shard_order[0])
        value._spec.shard_order = (entry(0, (1, 0)),)
        (box,) = local_boxes("w", value)
        assert whole[box.offsets[0] : box.offsets[0] + 2].tolist() == local.tolist()


def test_a_checkpointable_tensor_describes_itself():
    class Halves(torch.Tensor):
        def __create_chunk_list__(self):
            return [ChunkStorageMetadata(torch.Size([i]), torch.Size([1])) for i in (0, 1)]

        def __get_tensor_shard__(self, index):
            return self.as_subclass(torch.Tensor)[index.offset[0] : index.offset[0] + 1]

    value = torch.tensor([5.0, 6.0]).as_subclass(Halves)
    boxes = local_boxes("w", value)
    assert [(box.offsets, box.sizes, box.data) for box in boxes] == [((0,), (1,), None), ((1,), (1,), None)]
    assert [tensor_shard(value, MetadataIndex("w", box.offsets)).tolist() for box in boxes] == [[5.0], [6.0]]


def test_local_part_is_what_torch_scatters():
    whole = torch.arange(9)
    mesh = mesh_for(1, [0, 1, 2, 3])
    assert local_part(whole, mesh, [_StridedShard(0, split_factor=2)]).tolist() == [2, 3, 6]
