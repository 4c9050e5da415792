"""Save with N ranks, load with M, in another layout; by the reference alone, and with torch on either side."""

import tempfile
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from test_items import DTYPES
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from virtual_ranks import blank, blank_like, check, load_all, noise, raw_bytes, save_all, shard

import reference
from reference import DefaultLoadPlanner, DefaultSavePlanner

SHARDABLE = [dtype for dtype in DTYPES if not str(dtype).startswith("torch.bits")]

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")


@st.composite
def placements_for(draw, size, num_axes):
    dims = st.integers(0, len(size) - 1)
    kinds = [st.just(Replicate())]
    if size:
        kinds += [
            st.builds(Shard, dims),
            st.builds(lambda dim, factor: _StridedShard(dim, split_factor=factor), dims, st.integers(1, 3)),
        ]
    return [draw(st.one_of(kinds)) for _ in range(num_axes)]


@st.composite
def resharding(draw):
    size = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    sides = []
    for _ in range(2):
        mesh_shape = draw(st.sampled_from([(1,), (2,), (3,), (2, 2), (1, 3), (2, 1, 2)]))
        ranks = torch.tensor(draw(st.permutations(range(torch.Size(mesh_shape).numel())))).reshape(mesh_shape)
        sides.append((ranks, draw(placements_for(size, len(mesh_shape)))))
    return size, draw(st.sampled_from(SHARDABLE)), *sides


def sharded(whole, ranks, placements):
    return [{"w": shard(whole, rank, ranks, placements)} for rank in range(ranks.numel())]


@settings(deadline=None, max_examples=150)
@given(case=resharding(), check_crc=st.sampled_from(["always", "whole"]))
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_resharding_keeps_every_byte(case, check_crc):
    size, dtype, before, after = case
    whole = noise(size, dtype, seed=1)
    with tempfile.TemporaryDirectory() as path:
        check(save_all(sharded(whole, *before), path))
        wanted = sharded(whole, *after)
        loaded = [blank_like(state) for state in wanted]
        readers = lambda rank: reference.FileSystemReader(path, check_crc=check_crc)  # noqa: E731
        check(load_all(loaded, path, readers=readers))
        for mine, expected in zip(loaded, wanted, strict=True):
            assert raw_bytes(mine["w"]) == raw_bytes(expected["w"])
        alone = {"w": blank(size, dtype)}
        quietly(dcp.load, alone, checkpoint_id=path)
        assert raw_bytes(alone["w"]) == raw_bytes(whole)


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(), (0,), (5,), (4, 3), (0, 3)], ids=str)
def test_either_side_loads_what_the_other_saved(tmp_path, dtype, size):
    whole = noise(size, dtype)
    pairs = [(reference.save, dcp.load), (reference.save, reference.load)]
    if not str(dtype).startswith("torch.bits"):  # torch cannot tell their element size
        pairs.append((dcp.save, reference.load))
    for save_function, load_function in pairs:
        quietly(save_function, {"w": whole, "o": "x"}, checkpoint_id=tmp_path)
        loaded = {"w": blank(size, dtype), "o": None}
        quietly(load_function, loaded, checkpoint_id=tmp_path)
        assert raw_bytes(loaded["w"]) == raw_bytes(whole)
        assert loaded["o"] == "x"


@pytest.mark.parametrize(
    ("ranks", "placements"),
    [
        ([0, 1], [Shard(0)]),
        ([1, 0], [Shard(1)]),
        ([0, 1], [Replicate()]),
        ([[0, 1], [2, 3]], [_StridedShard(0, split_factor=2), Shard(0)]),
    ],
)
def test_we_load_what_torchs_planner_and_storage_save(tmp_path, ranks, placements):
    whole = noise((11, 5), torch.bfloat16)
    states = sharded(whole, torch.tensor(ranks), placements)
    quietly(
        lambda: check(
            save_all(
                states,
                tmp_path,
                planners=lambda _: dcp.DefaultSavePlanner(),
                writers=lambda _: dcp.FileSystemWriter(tmp_path),
            )
        )
    )
    for ranks, other in ((torch.arange(3), [Shard(0)]), (torch.arange(1), [Replicate()])):
        wanted = sharded(whole, ranks, other)
        loaded = [blank_like(state) for state in wanted]
        check(load_all(loaded, tmp_path))
        for mine, expected in zip(loaded, wanted, strict=True):
            assert raw_bytes(mine["w"]) == raw_bytes(expected["w"])


@pytest.mark.parametrize("parts", ["planner", "storage"])
def test_torchs_parts_work_under_our_engine(tmp_path, parts):
    whole = noise((6, 4), torch.float32)
    states = [{"w": shard(whole, rank, range(3), [Shard(0)]), "o": {"p": 1}} for rank in range(3)]
    save_options = {
        "planner": {"planners": lambda _: dcp.DefaultSavePlanner()},
        "storage": {"writers": lambda _: dcp.FileSystemWriter(tmp_path)},
    }[parts]
    load_options = {
        "planner": {"planners": lambda _: dcp.DefaultLoadPlanner()},
        "storage": {"readers": lambda _: dcp.FileSystemReader(tmp_path)},
    }[parts]
    quietly(lambda: check(save_all(states, tmp_path, **save_options)))
    loaded = [blank_like(state) for state in states]
    quietly(lambda: check(load_all(loaded, tmp_path, **load_options)))
    for mine, expected in zip(loaded, states, strict=True):
        assert raw_bytes(mine["w"]) == raw_bytes(expected["w"])
        assert mine["o"] == {"p": 1}


def test_our_parts_work_under_torchs_engine(tmp_path):
    value = {"w": noise((6, 4), torch.float32), "o": {"p": [1, 2]}}
    quietly(dcp.save, value, planner=DefaultSavePlanner(), storage_writer=reference.FileSystemWriter(tmp_path))
    loaded = blank_like(value)
    quietly(dcp.load, loaded, planner=DefaultLoadPlanner(), storage_reader=reference.FileSystemReader(tmp_path))
    assert raw_bytes(loaded["w"]) == raw_bytes(value["w"])
    assert loaded["o"] == {"p": [1, 2]}


def strided_forms():
    base = torch.arange(24.0).reshape(4, 6)
    complex_base = torch.view_as_complex(base.reshape(4, 3, 2).clone())
    return {
        "transposed": base.t(),
        "sliced": base[1:3, ::2],
        "expanded": base[:1].expand(5, 6),
        "conj": complex_base.conj(),
        "neg": complex_base.conj().imag,
        "channels_last": torch.arange(96.0).reshape(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(base[:, 2]),
        "zero_dim_view": base[1, 1],
    }


@pytest.mark.parametrize("save_function", [reference.save, dcp.save])
@pytest.mark.parametrize("load_function", [reference.load, dcp.load])
def test_views_are_saved_as_what_they_show(tmp_path, save_function, load_function):
    state = strided_forms()
    quietly(save_function, state, checkpoint_id=tmp_path)
    loaded = {key: torch.zeros(value.size(), dtype=value.dtype) for key, value in state.items()}
    quietly(load_function, loaded, checkpoint_id=tmp_path)
    for key, value in state.items():
        assert raw_bytes(loaded[key]) == raw_bytes(value), key


def test_a_view_of_a_large_tensor_is_small_on_disk(tmp_path):
    reference.save({"w": torch.zeros(1_000_000)[:2]}, checkpoint_id=tmp_path)
    assert (tmp_path / "__0_0.distcp").stat().st_size < 4096
