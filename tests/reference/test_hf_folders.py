"""Folders from anywhere: with and without an index, with files of others, damaged and hostile."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from virtual_ranks import blank_like, noise, raw_bytes

import reference
from reference import CheckpointException, HuggingFaceStorageReader
from reference.hf_index import INDEX
from reference.metadata import MetadataError
from reference.strict_json import SafetensorsError


def tensors(*names):
    return {name: noise((3, 2), torch.float32, ord(name)) for name in names}


def write(folder, name, content, metadata=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(content, folder / name, metadata)


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_shard(folder, name, content, offsets):
    info = {fqn: {"saved_offsets": offset} for fqn, offset in offsets.items()}
    write(folder, name, content, {"DCP_SHARDING_INFO": json.dumps(info)})


def assert_loads(folder, expected, **options):
    loaded = blank_like(expected)
    reference.load(loaded, storage_reader=HuggingFaceStorageReader(folder, **options))
    assert {k: raw_bytes(t) for k, t in loaded.items()} == {k: raw_bytes(t) for k, t in expected.items()}


def assert_refused(folder, text, kind=SafetensorsError, wanted=("a",)):
    loaded = {name: torch.full((3, 2), 7.0) for name in wanted}
    with pytest.raises(CheckpointException) as caught:
        reference.load(loaded, storage_reader=HuggingFaceStorageReader(folder))
    ((error, _),) = caught.value.failures.values()
    assert isinstance(error, kind), error
    assert text in str(error), error
    assert len(str(error).splitlines()) == 1
    assert all((t == 7.0).all() for t in loaded.values())


@pytest.mark.parametrize("thread_count", [1, 4])
def test_folders_without_an_index(tmp_path, thread_count):
    write(tmp_path, "model.safetensors", tensors("a", "b", "c"))
    assert_loads(tmp_path, tensors("a", "c"), thread_count=thread_count)
    write(tmp_path, "adapter.safetensors", tensors("d"))
    assert_loads(tmp_path, tensors("a", "d"), thread_count=thread_count)


def test_other_files_and_folders_are_left_alone(tmp_path):
    write(tmp_path, "model.safetensors", tensors("a"))
    write(tmp_path / "sharded", "x.safetensors", tensors("b"))
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "half.safetensors.pending").write_bytes(b"rubbish")
    metadata = HuggingFaceStorageReader(tmp_path).read_metadata()
    assert list(metadata.state_dict_metadata) == ["a"]


def test_an_index_says_which_files_and_which_of_two_tensors(tmp_path):
    write(tmp_path, "one.safetensors", tensors("a") | {"b": torch.zeros(9)})
    write(tmp_path, "two.safetensors", tensors("b") | {"a": torch.zeros(9)})
    write(tmp_path, "consolidated.safetensors", {"a": torch.zeros(5), "z": torch.zeros(5)})
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert_loads(tmp_path, tensors("a", "b"))
    assert set(HuggingFaceStorageReader(tmp_path).read_metadata().state_dict_metadata) == {"a", "b"}


def test_tensors_that_an_index_forgets_are_found_in_its_files(tmp_path):
    write(tmp_path, "one.safetensors", tensors("a", "b"))
    write_index(tmp_path, {"a": "one.safetensors"})
    assert_loads(tmp_path, tensors("a", "b"))


def test_links_as_in_the_hubs_cache(tmp_path):
    write(tmp_path / "blobs", "0123", tensors("a"))
    snapshot = tmp_path / "snapshots" / "x"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert_loads(snapshot, tensors("a"))


def test_an_index_may_name_files_in_folders_below(tmp_path):
    write(tmp_path / "deep", "one.safetensors", tensors("a"))
    write_index(tmp_path, {"a": "deep/one.safetensors"})
    assert_loads(tmp_path, tensors("a"))


@pytest.mark.parametrize(
    "name",
    [
        "../one.safetensors",
        "/etc/one.safetensors",
        "deep/../../one.safetensors",
        "",
        "one.bin",
        "a\0.safetensors",
        3,
        None,
    ],
)
def test_hostile_paths_in_an_index_are_refused(tmp_path, name):
    write(tmp_path, "one.safetensors", tensors("a"))
    write(tmp_path / "in", "one.safetensors", tensors("a"))
    write_index(tmp_path / "in", {"a": name})
    assert_refused(tmp_path / "in", "in the folder but got")
    (tmp_path / "in" / INDEX).write_text(json.dumps({"shard_files": [name]}))
    assert_refused(tmp_path / "in", "in the folder but got")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "a JSON object"),
        ("[]", "a JSON object"),
        ('{"weight_map": {"a": "one.safetensors"}', "a JSON object"),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "the key 'a' twice"),
        ("{}", "weight_map=None"),
        ('{"weight_map": []}', "weight_map=[]"),
        ('{"shard_files": {}}', "shard_files={}"),
    ],
)
def test_damaged_indices_are_refused(tmp_path, text, fault):
    write(tmp_path, "one.safetensors", tensors("a"))
    (tmp_path / INDEX).write_text(text)
    assert_refused(tmp_path, fault)


def test_an_index_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("reference.hf_index.MAX_HEADER_BYTES", 20)
    write(tmp_path, "one.safetensors", tensors("a"))
    write_index(tmp_path, {"a": "one.safetensors"})
    assert_refused(tmp_path, "at most 20 bytes")


def test_an_index_and_files_that_differ_are_refused(tmp_path):
    write(tmp_path, "one.safetensors", tensors("a"))
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert_refused(tmp_path, "'two.safetensors'", FileNotFoundError)
    write(tmp_path, "two.safetensors", tensors("c"))
    assert_refused(tmp_path, "Expected 'b' in 'two.safetensors'")


def test_a_folder_with_nothing_says_so(tmp_path):
    assert_refused(tmp_path, "Expected 'model.safetensors.index.json' or files", FileNotFoundError)
    (tmp_path / "file").write_bytes(b"")
    for name in ("absent", "file"):
        assert_refused(tmp_path / name, "Expected a folder", FileNotFoundError)


def test_a_damaged_file_is_refused_by_name(tmp_path):
    write(tmp_path, "one.safetensors", tensors("a"))
    raw = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "one.safetensors").write_bytes(raw[:-1])
    assert_refused(tmp_path, "'one.safetensors'")


def test_a_file_that_changes_between_planning_and_reading_is_refused(tmp_path):
    write(tmp_path, "one.safetensors", tensors("a"))
    reader = HuggingFaceStorageReader(tmp_path)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    planner = reference.DefaultLoadPlanner()
    planner.set_up_planner(blank_like(tensors("a")), metadata, True)
    plan = planner.create_local_plan()
    with (tmp_path / "one.safetensors").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(SafetensorsError, match="has changed"):
        reader.prepare_local_plan(plan)


def test_two_checkpoints_in_one_folder_are_refused(tmp_path):
    write(tmp_path, "model.safetensors", tensors("a"))
    write(tmp_path, "consolidated.safetensors", tensors("a"))
    assert_refused(tmp_path, "more than one checkpoint")


def halves():
    whole = tensors("a")["a"]
    return whole[:2].clone(), whole[2:].clone()


def test_shards_without_an_index_as_torch_writes_them(tmp_path):
    first, second = halves()
    write_shard(tmp_path, "shard-1.safetensors", {"a": first, "r": torch.ones(2)}, {"a": [0, 0], "r": [0]})
    write_shard(tmp_path, "shard-2.safetensors", {"a": second}, {"a": [2, 0]})
    assert_loads(tmp_path, tensors("a") | {"r": torch.ones(2)})


@pytest.mark.parametrize(
    ("offsets", "text"),
    [([1, 0], "chunks hold the element"), ([0, 0], "once but got it"), ([3, 0], "no chunk holds the element")],
)
def test_shards_that_do_not_tile_are_refused(tmp_path, offsets, text):
    first, second = halves()
    write_shard(tmp_path, "1.safetensors", {"a": first}, {"a": [0, 0]})
    write_shard(tmp_path, "2.safetensors", {"a": second}, {"a": offsets})
    assert_refused(tmp_path, text, MetadataError)


def test_shards_of_different_kinds_are_refused(tmp_path):
    first, second = halves()
    write_shard(tmp_path, "1.safetensors", {"a": first}, {"a": [0, 0]})
    write_shard(tmp_path, "2.safetensors", {"a": second.double()}, {"a": [2, 0]})
    assert_refused(tmp_path, "Expected parts of 'a' as torch.float32 with 2 dims but got torch.float64")
    write_shard(tmp_path, "2.safetensors", {"a": second.flatten()}, {"a": [2]})
    assert_refused(tmp_path, "with 1 in '2.safetensors'")


@pytest.mark.parametrize(
    "info",
    [
        "{", "[]", "{}", '{"a": 1}', '{"a": {}}', '{"a": {"saved_offsets": [0]}}', '{"a": {"saved_offsets": [0, -1]}}',
        '{"a": {"saved_offsets": [0, 0.0]}}', '{"a": {"saved_offsets": [true, 0]}}', '{"a": {"saved_offsets": "00"}}',
        '{"a": {"saved_offsets": [9223372036854775807, 0]}}', '{"a": {"saved_offsets": [0, 0]}, "a": 1}',
    ],
)  # fmt: skip
def test_hostile_sharding_info_is_refused(tmp_path, info):
    write(tmp_path, "1.safetensors", tensors("a"), {"DCP_SHARDING_INFO": info})
    assert_refused(tmp_path, "DCP_SHARDING_INFO of 1.safetensors")


def test_ranks_without_elements_do_not_matter(tmp_path):
    first, second = halves()
    empty = torch.empty(0, 2)
    for n, (part, row) in enumerate([(empty, 0), (first, 0), (second, 2), (empty, 3), (empty, 3)]):
        write_shard(tmp_path, f"{n}.safetensors", {"a": part}, {"a": [row, 0]})
    assert_loads(tmp_path, tensors("a"))


def test_dtypes_that_torch_lacks_are_refused_by_name(tmp_path):
    header = b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    assert_refused(tmp_path, "'F6_E2M3'")


@pytest.mark.parametrize("reader", [HuggingFaceStorageReader, dcp.HuggingFaceStorageReader])
def test_the_metadata_is_torchs(tmp_path, reader):
    first, second = halves()
    write_shard(tmp_path, "1.safetensors", {"a": first}, {"a": [0, 0]})
    write_shard(tmp_path, "2.safetensors", {"a": second}, {"a": [2, 0]})
    metadata = reader(str(tmp_path)).read_metadata()
    entry = metadata.state_dict_metadata["a"]
    assert isinstance(entry, TensorStorageMetadata)
    assert (entry.size, entry.properties.dtype) == ((3, 2), torch.float32)
    assert {(chunk.offsets, chunk.sizes) for chunk in entry.chunks} == {((0, 0), (2, 2)), ((2, 0), (1, 2))}
    place = metadata.storage_data[MetadataIndex("a", torch.Size((2, 0)))]
    assert (place.relative_path.endswith("2.safetensors"), place.shape, place.dtype) == (True, (1, 2), torch.float32)
    assert metadata.storage_meta.load_id is not None


def test_reads_beyond_the_plan_are_refused(tmp_path):
    write(tmp_path, "one.safetensors", tensors("a"))
    reader = HuggingFaceStorageReader(tmp_path)
    reader.set_up_storage_reader(reader.read_metadata(), True)
    item = reference.ReadItem(
        reference.LoadItemType.TENSOR, MetadataIndex("b"), torch.Size(), MetadataIndex("b"), torch.Size(), torch.Size()
    )
    with pytest.raises(SafetensorsError, match="a place in storage for 'b'"):
        reader.prepare_local_plan(reference.LoadPlan([item]))
