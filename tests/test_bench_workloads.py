"""Workloads and layouts: published sizes, structure kept, digests that are pinned, content that any rank can make."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dcpbench.bench.filling import fill
from dcpbench.bench.placing import LAYOUTS, digest_of, place
from dcpbench.bench.workloads import NAMES, VERSION, fitted, workload
from dcpbench.errors import UsageError
from dcpbench.geometry import full_region

GIB = 1 << 30
DIGESTS = {
    "llama3-8b": "72af3814041e071e",
    "llama3-70b": "88d6ea3ad24e8e32",
    "llama3-405b": "08d3334d42233977",
    "moe-1t": "8a39f48aef077e27",
    "few-huge": "e1d84dfd3d61f62c",
}


@pytest.mark.parametrize(
    ("name", "gib"), [("llama3-8b", 105), ("llama3-70b", 912), ("llama3-405b", 5290), ("few-huge", 64)]
)
def test_sizes_are_the_published_ones(name, gib):
    assert workload(name).num_bytes / GIB == pytest.approx(gib, rel=0.01)


def test_the_mixture_of_experts_is_of_the_class_of_1e12_parameters():
    tensors = workload("moe-1t").tensors
    parameters = sum(math.prod(tensor.shape) for tensor in tensors if tensor.dtype == "bfloat16")
    assert 1.0e12 < parameters < 1.1e12


def test_a_changed_workload_has_another_version():
    """Old figures cannot be compared with new ones: raise VERSION, and pin the new digests."""
    assert VERSION == 1
    assert {name: workload(name).digest for name in DIGESTS} == DIGESTS


@pytest.mark.parametrize("name", [name for name in NAMES if name != "many-small"])
def test_scale_keeps_the_structure(name):
    full, small = workload(name), fitted(name, 64 << 20)
    assert [(t.name, t.dtype, t.tp_dim, len(t.shape)) for t in small.tensors] == [
        (t.name, t.dtype, t.tp_dim, len(t.shape)) for t in full.tensors
    ]
    assert 0.9 * (64 << 20) < small.num_bytes <= 64 << 20
    by_size = [max(small.tensors, key=lambda t: t.num_bytes).name, max(full.tensors, key=lambda t: t.num_bytes).name]
    assert by_size[0] == by_size[1]


def test_small_tensors_keep_their_size_and_lose_their_number():
    few = fitted("many-small", 8 << 20)
    assert {tensor.num_bytes for tensor in few.tensors} == {16 << 10}
    assert len(few.tensors) == pytest.approx(512, abs=1)


def test_the_views_of_all_ranks_are_the_whole():
    whole = workload("llama3-8b", 0.0001)
    views = [workload(f"llama3-8b@rank-{rank}-of-64", 0.0001) for rank in range(64)]
    for index, tensor in enumerate(whole.tensors):
        if tensor.shape:
            assert sum(view.tensors[index].num_bytes for view in views) == tensor.num_bytes
    assert views[3].name == "llama3-8b@rank-3-of-64"
    assert views[3].digest != views[63].digest


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_element_lies_somewhere(layout, world_size):
    wanted = workload("llama3-8b", 1e-6)
    placed = place(layout, wanted, world_size)
    for index, tensor in enumerate(wanted.tensors[:40]):
        held = {placed.region(index, tensor.shape, rank) for rank in range(world_size)}
        assert sum(region.numel for region in held) == math.prod(tensor.shape)
    assert digest_of(placed) != digest_of(place(layout, wanted, 2 * world_size))


def test_3d_is_strided_where_two_axes_cut_one_dim():
    wanted = workload("llama3-8b", 1e-4)
    (weight,) = [i for i, tensor in enumerate(wanted.tensors) if tensor.name == "model.layers.0.attention.wq.weight"]
    assert [str(p) for p in place("3d", wanted, 8).leaves[weight].placements] == [
        "Replicate()",
        "_StridedShard(0, split_factor=2)",
        "Shard(0)",
    ]


def filled(name, shape, region, dtype=np.uint32):
    out = np.zeros(region.shape, dtype=dtype)
    fill(out, name, shape, region)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_content_does_not_depend_on_the_layout(layout):
    wanted = workload("moe-1t", 1e-6)
    placed = place(layout, wanted, 8)
    for index, tensor in list(enumerate(wanted.tensors))[:60]:
        whole = filled(tensor.name, tensor.shape, full_region(tensor.shape))
        for rank in range(8):
            region = placed.region(index, tensor.shape, rank)
            own = filled(tensor.name, tensor.shape, region)
            picked = whole[np.ix_(*(region.indices(dim) for dim in range(len(tensor.shape))))] if own.ndim else whole
            assert np.array_equal(own, picked)


def test_contents_are_unique_and_differ_by_name():
    one = filled("a", (300, 400), full_region((300, 400)))
    assert len(np.unique(one)) == one.size
    assert not np.array_equal(one, filled("b", (300, 400), full_region((300, 400))))
    assert np.array_equal(filled("a", (300, 400), full_region((300, 400)), np.uint16), one.astype(np.uint16))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: workload("llama4"), "Expected one of llama3-8b, llama3-70b"),
        (lambda: workload("llama3-8b@rank-8-of-8"), "Expected a rank below 8"),
        (lambda: workload("llama3-8b", 2.0), "Expected a scale above 0 and at most 1"),
        (lambda: place("fsdp3", workload("few-huge"), 2), "Expected one of fsdp2, hsdp, tp, 3d"),
        (lambda: place("hsdp", workload("few-huge"), 3), "that 2 divides for layout hsdp"),
    ],
)
def test_what_cannot_be_is_refused(call, says):
    with pytest.raises(UsageError, match=says):
        call()
