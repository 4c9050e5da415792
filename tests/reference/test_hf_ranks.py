"""Shards from many ranks, in one process: written and read by the reference and torch, under other layouts."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from virtual_ranks import blank_like, check, load_all, noise, raw_bytes, save_all, shard

import reference
from reference import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from reference.hf_index import INDEX, read_index
from reference.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from reference.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from reference.strict_json import SafetensorsError

LAYOUTS = {
    "rows": (range(3), [Shard(0)]),
    "columns": (range(4), [Shard(1)]),
    "replicas": (range(2), [Replicate()]),
    "both": ([[0, 1], [2, 3]], [Shard(1), Shard(0)]),
    "hybrid": ([[0, 1], [2, 3]], [Replicate(), Shard(0)]),
    "strided": (range(2), [_StridedShard(0, split_factor=2)]),
    "more ranks than rows": (range(6), [Shard(0)]),
}


def whole(dtype=torch.bfloat16):
    return {"w": noise((5, 6), dtype, 1), "deep": {"v": noise((4, 2, 3), torch.int64, 2), "e": torch.empty(0, 2)}}


def as_held(state, rank, layout):
    ranks, placements = LAYOUTS[layout]
    return {
        key: as_held(value, rank, layout) if isinstance(value, dict) else shard(value, rank, ranks, placements)
        for key, value in state.items()
    }


def world_size(layout):
    return torch.as_tensor(LAYOUTS[layout][0]).numel()


def save(state, path, layout, with_="reference", **options):
    states = [as_held(state, rank, layout) for rank in range(world_size(layout))]
    kind = {"reference": HuggingFaceStorageWriter, "torch": dcp.HuggingFaceStorageWriter}[with_]
    check(save_all(states, path, writers=lambda rank: kind(str(path), save_distributed=True, **options)))


def assert_loads(state, path, layout, with_="reference", **options):
    expected = [as_held(state, rank, layout) for rank in range(world_size(layout))]
    loaded = [blank_like(held) for held in expected]
    kind = {"reference": HuggingFaceStorageReader, "torch": dcp.HuggingFaceStorageReader}[with_]
    check(load_all(loaded, path, readers=lambda rank: kind(str(path), **options)))
    for got, wanted in zip(loaded, expected, strict=True):
        assert raw_bytes(got["w"]) == raw_bytes(wanted["w"])
        assert raw_bytes(got["deep"]["v"]) == raw_bytes(wanted["deep"]["v"])


@pytest.mark.parametrize("pair", [("reference", "reference"), ("reference", "torch"), ("torch", "reference")])
@pytest.mark.parametrize("save_layout", [name for name in LAYOUTS if name != "strided"])
def test_resharding(tmp_path, save_layout, pair):
    save(whole(), tmp_path, save_layout, pair[0])
    for load_layout in LAYOUTS:
        assert_loads(whole(), tmp_path, load_layout, pair[1], thread_count=2)


@pytest.mark.parametrize("load_with", ["reference", "torch"])
def test_several_chunks_of_one_tensor_on_a_rank_go_to_files_of_their_own(tmp_path, load_with):
    """In one file an FQN can stand only once; torch's writer keeps the last of them."""
    save(whole(), tmp_path, "strided")
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert "shard-00001-model-00001-of-00001-part-00002.safetensors" in names
    for layout in LAYOUTS:
        assert_loads(whole(), tmp_path, layout, load_with)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.complex64, torch.uint16, torch.float64])
def test_dtypes_in_shards(tmp_path, dtype):
    save(whole(dtype), tmp_path, "both")
    assert_loads(whole(dtype), tmp_path, "rows")
    assert_loads(whole(dtype), tmp_path, "columns", "torch")


def test_four_bit_floats_in_shards(tmp_path):
    save(whole(torch.float4_e2m1fn_x2), tmp_path, "columns", enable_consolidation=True)
    assert_loads(whole(torch.float4_e2m1fn_x2), tmp_path / "sharded", "rows")
    assert_loads(whole(torch.float4_e2m1fn_x2), tmp_path, "both")


@pytest.mark.parametrize("with_", ["reference", "torch"])
def test_files_are_named_as_torchs(tmp_path, with_):
    mapping = {"w": 1, "deep.v": 2, "deep.e": 2}
    save(whole(), tmp_path, "rows", with_, fqn_to_index_mapping=mapping)
    expected = {f"shard-{rank:05d}-model-{file:05d}-of-00002.safetensors" for rank in (1, 2, 3) for file in (1, 2)}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == expected
    if with_ == "reference":
        assert set(read_index(tmp_path).shard_files) == expected
    assert_loads(whole(), tmp_path, "columns", "torch" if with_ == "reference" else "reference")


def test_each_shard_says_where_it_belongs_as_torchs_do(tmp_path):
    found = []
    for with_ in ("reference", "torch"):
        save(whole(), tmp_path / with_, "columns", with_)
        headers = {}
        for path in (tmp_path / with_).glob("*.safetensors"):
            raw = path.read_bytes()
            headers[path.name] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            metadata = headers[path.name]["__metadata__"]
            metadata["DCP_SHARDING_INFO"] = json.loads(metadata["DCP_SHARDING_INFO"])
        found.append(headers)
    assert found[0] == found[1]


def test_replicas_are_written_once_and_objects_are_refused(tmp_path):
    save(whole(), tmp_path / "a", "replicas")
    found = [fqn for path in (tmp_path / "a").glob("*.safetensors") for fqn in load_file(path)]
    assert sorted(found) == ["deep.e", "deep.v", "w"]
    states = [{"w": torch.zeros(1), "step": 3} for _ in range(2)]
    outcomes = save_all(states, "", writers=lambda _: HuggingFaceStorageWriter(tmp_path / "b", save_distributed=True))
    assert all("'step', an object" in str(outcome) for outcome in outcomes)


def test_tensors_that_only_some_ranks_hold(tmp_path):
    states = [{f"layer{rank}": noise((3,), torch.float32, rank)} for rank in range(3)] + [{}]
    check(save_all(states, "", writers=lambda _: HuggingFaceStorageWriter(tmp_path, save_distributed=True)))
    loaded = {f"layer{rank}": torch.zeros(3) for rank in range(3)}
    reference.load(loaded, storage_reader=HuggingFaceStorageReader(tmp_path))
    assert [raw_bytes(loaded[f"layer{r}"]) for r in range(3)] == [raw_bytes(states[r][f"layer{r}"]) for r in range(3)]


def test_a_missing_shard_is_told_from_a_smaller_tensor(tmp_path):
    save(whole(), tmp_path, "rows")
    (tmp_path / "shard-00003-model-00001-of-00001.safetensors").unlink()
    for layout in ("rows", "columns"):
        with pytest.raises(CheckpointException, match="shard-00003"):
            assert_loads(whole(), tmp_path, layout)


def written_whole(states, path, **options):
    return save_all(states, path, writers=lambda _: HuggingFaceStorageWriter(path, **options))


def test_whole_tensors_from_one_rank_of_many(tmp_path):
    state = {"w": noise((3,), torch.float32, 1)}
    check(written_whole([state, {}, {}], tmp_path))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    assert raw_bytes(load_file(tmp_path / "model-00001-of-00001.safetensors")["w"]) == raw_bytes(state["w"])


def test_two_ranks_with_one_file_are_refused(tmp_path):
    """Torch lets them write over each other: what one of them wrote is lost."""
    states = [{f"w{i}": torch.ones(4) for i in range(4)} for _ in range(2)]
    outcomes = written_whole(states, tmp_path)
    assert all("one rank for each file" in str(outcome) for outcome in outcomes)
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_with_a_file_each_are_fine(tmp_path):
    states = [{f"w{rank}": noise((4,), torch.float32, rank)} for rank in range(2)]
    check(written_whole(states, tmp_path, fqn_to_index_mapping={"w0": 1, "w1": 2}))
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == {f"w{n}": f"model-0000{n + 1}-of-00002.safetensors" for n in range(2)}
    loaded = {"w0": torch.zeros(4), "w1": torch.zeros(4)}
    reference.load(loaded, storage_reader=HuggingFaceStorageReader(tmp_path))
    assert all(raw_bytes(loaded[f"w{n}"]) == raw_bytes(states[n][f"w{n}"]) for n in range(2))


def test_parts_of_tensors_without_save_distributed_are_refused(tmp_path):
    states = [as_held(whole(), rank, "rows") for rank in range(3)]
    outcomes = written_whole(states, tmp_path)
    assert all("save_distributed=True" in str(outcome) for outcome in outcomes)
    assert list(tmp_path.iterdir()) == []


def test_parts_of_a_tensor_on_one_rank_without_save_distributed_are_refused(tmp_path):
    properties, size = TensorProperties(dtype=torch.float32), torch.Size((4,))
    items = [
        WriteItem(
            MetadataIndex("w", offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(ChunkStorageMetadata(offsets, torch.Size((2,))), properties, size),
        )
        for offsets in (torch.Size((0,)), torch.Size((2,)))
    ]
    with pytest.raises(SafetensorsError, match="Expected whole tensors"):
        HuggingFaceStorageWriter(tmp_path).prepare_global_plan([SavePlan(items)])


def test_a_shard_alone_is_refused_since_no_file_records_the_whole_shape(tmp_path):
    state = as_held(whole(), 0, "rows")
    with pytest.raises(CheckpointException, match="no chunk holds the element"):
        reference.save(state, storage_writer=HuggingFaceStorageWriter(tmp_path, save_distributed=True), no_dist=True)
    assert list(tmp_path.iterdir()) == []
