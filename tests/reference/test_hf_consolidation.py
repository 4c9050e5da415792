"""Shards made into whole tensors: from the reference's files and torch's, for Hugging Face's readers and torch's."""

import itertools
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import _consolidate_hf_safetensors as theirs
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from virtual_ranks import check, drive, noise, raw_bytes, save_all, shard

import reference
from reference import CheckpointException, HuggingFaceStorageWriter
from reference import _consolidate_hf_safetensors as ours
from reference.hf_index import INDEX
from reference.metadata import MetadataError
from reference.safetensors_dtypes import NUM_BITS, torch_dtype
from reference.strict_json import SafetensorsError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

DTYPES = sorted((dtype for name in NUM_BITS if (dtype := torch_dtype(name)) is not None), key=str)
LAYOUTS = {
    "rows": (range(3), [Shard(0)]),
    "columns": (range(3), [Shard(1)]),
    "both": ([[0, 1], [2, 3]], [Shard(1), Shard(0)]),
    "strided": (range(2), [_StridedShard(0, split_factor=2)]),
    "replicas": (range(2), [Replicate()]),
}


def whole():
    state = {str(dtype): noise((5, 6), dtype, seed) for seed, dtype in enumerate(DTYPES)}
    return state | {"deep": noise((4, 3, 2, 3), torch.float32, 7), "empty": torch.empty(3, 0)}


def write_shards(folder, state, layout, writer=HuggingFaceStorageWriter, **options):
    ranks, placements = LAYOUTS[layout]
    num_ranks = torch.as_tensor(ranks).numel()
    states = [{fqn: shard(t, rank, ranks, placements) for fqn, t in state.items()} for rank in range(num_ranks)]
    states[-1]["scalar"] = torch.tensor(3.5)
    check(save_all(states, "", writers=lambda _: writer(str(folder), save_distributed=True, **options)))
    return state | {"scalar": torch.tensor(3.5)}


def contents(state):
    return {fqn: (t.dtype, tuple(t.size()), raw_bytes(t)) for fqn, t in state.items()}


def read_all(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(weight_map.values())}
    assert sum(map(len, files.values())) == len(weight_map)
    return {fqn: files[name][fqn] for fqn, name in weight_map.items()}


def mapping_for(state, num_files):
    return {fqn: 1 + i % num_files for i, fqn in enumerate(state)}


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype(tmp_path, layout, num_files):
    state = write_shards(tmp_path / "in", whole(), layout)
    mapping = mapping_for(state, num_files)
    ours.consolidate_safetensors_files(str(tmp_path / "in"), str(tmp_path / "out"), mapping, num_threads=2)
    assert contents(read_all(tmp_path / "out")) == contents(state)
    names = {f"model-{n + 1:05d}-of-{num_files:05d}.safetensors" for n in range(num_files)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {INDEX, *names}
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in state.values())}


@pytest.mark.parametrize("limit", [8, 40, 100])
def test_a_small_buffer_gives_the_same(tmp_path, monkeypatch, limit):
    state = write_shards(tmp_path / "in", whole(), "both")
    monkeypatch.setattr(ours, "_BUFFER_BYTES", limit)
    monkeypatch.setattr(ours, "_MAX_OPEN_FILES", 1)
    ours.consolidate_safetensors_files(str(tmp_path / "in"), str(tmp_path / "out"), mapping_for(state, 1))
    assert contents(read_all(tmp_path / "out")) == contents(state)


def test_no_more_files_are_open_at_once_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "_MAX_OPEN_FILES", 2)
    files = ours._OpenFiles(tmp_path)
    for name in "abcab":
        (tmp_path / name).write_text(name)
        assert bytes(files[name].read(0, 1)).decode() == name
        assert len(files._files) <= 2
    files.close()
    assert not files._files


def test_torchs_shards_and_torchs_consolidation(tmp_path):
    """What torch gets right, both get alike: floats with at least one dim."""
    state = {
        "a": noise((5, 6), torch.float32, 1),
        "b": noise((7,), torch.bfloat16, 2),
        "c": noise((2, 3, 4), torch.float16, 3),
    }
    ranks, placements = LAYOUTS["columns"][0], [Shard(0)]
    states = [{fqn: shard(t, rank, ranks, placements) for fqn, t in state.items()} for rank in range(3)]
    writer = dcp.HuggingFaceStorageWriter
    check(save_all(states, "", writers=lambda _: writer(str(tmp_path / "in"), save_distributed=True)))
    check(save_all(states, "", writers=lambda _: HuggingFaceStorageWriter(tmp_path / "in2", save_distributed=True)))
    mapping = {"a": 1, "b": 2, "c": 2}
    for name, module in (("ours", ours), ("theirs", theirs)):
        for folder in ("in", "in2"):
            (tmp_path / name / folder).mkdir(parents=True)
            module.consolidate_safetensors_files(str(tmp_path / folder), str(tmp_path / name / folder), mapping)
            assert contents(read_all(tmp_path / name / folder)) == contents(state)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_writer_consolidates(tmp_path, threads):
    mapping = mapping_for(whole() | {"scalar": 0, "unused": 0}, 4)
    state = write_shards(
        tmp_path, whole(), "both", enable_consolidation=True, thread_count_consolidation=threads,
        fqn_to_index_mapping=mapping,
    )  # fmt: skip
    assert contents(read_all(tmp_path)) == contents(state)
    assert (tmp_path / "sharded" / INDEX).exists()
    for loader, reader in ((reference, reference.HuggingFaceStorageReader), (dcp, dcp.HuggingFaceStorageReader)):
        loaded = {"deep": torch.zeros(4, 3, 2, 3), "scalar": torch.zeros(())}
        folder = tmp_path if loader is reference else tmp_path / "torch"
        if loader is dcp:  # its reader knows two dtypes less
            readable = {fqn: t for fqn, t in state.items() if not fqn.endswith(("e8m0fnu", "e2m1fn_x2"))}
            folder.mkdir()
            save_file(readable, folder / "x.safetensors")
        loader.load(loaded, storage_reader=reader(str(folder)), no_dist=True)
        assert raw_bytes(loaded["deep"]) == raw_bytes(state["deep"])
        assert loaded["scalar"] == 3.5


def test_a_checkpoint_id_moves_both_folders(tmp_path):
    writer = HuggingFaceStorageWriter(tmp_path / "a", save_distributed=True, enable_consolidation=True)
    reference.save({"x": torch.ones(3)}, checkpoint_id=tmp_path / "b", storage_writer=writer)
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "b" / INDEX).exists()
    assert (tmp_path / "b" / "sharded" / INDEX).exists()


def test_plain_files_are_taken_too(tmp_path):
    state = {"a": noise((3, 2), torch.int32, 1), "b": noise((4,), torch.float32, 2)}
    for fqn, tensor in state.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        save_file({fqn: tensor}, tmp_path / "in" / f"{fqn}.safetensors")
    ours.consolidate_safetensors_files(str(tmp_path / "in"), str(tmp_path / "out"), {"a": 1, "b": 1})
    assert contents(read_all(tmp_path / "out")) == contents(state)


def test_consolidating_into_the_folder_of_the_shards_keeps_them(tmp_path):
    state = write_shards(tmp_path, whole(), "rows")
    shards = sorted(path.name for path in tmp_path.glob("shard-*"))
    ours.consolidate_safetensors_files(str(tmp_path), str(tmp_path), mapping_for(state, 2))
    assert contents(read_all(tmp_path)) == contents(state)
    assert sorted(path.name for path in tmp_path.glob("shard-*")) == shards


def protocols(folder, mapping, world_size, num_threads=1):
    for rank in range(world_size):
        job = ours._Job(folder / "in", folder / "out", mapping, num_threads)
        yield ours._protocol(job, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_files_spread_over_ranks(tmp_path, world_size):
    state = write_shards(tmp_path / "in", whole(), "both")
    for _ in range(2):
        assert drive(list(protocols(tmp_path, mapping_for(state, 3), world_size, 2))) == [None] * world_size
        assert contents(read_all(tmp_path / "out")) == contents(state)
        assert len(list((tmp_path / "out").iterdir())) == 4


def test_one_process_alone_on_every_rank(tmp_path):
    state = write_shards(tmp_path / "in", whole(), "rows")
    ours.consolidate_safetensors_files_on_every_rank(str(tmp_path / "in"), str(tmp_path / "out"), mapping_for(state, 2))
    assert contents(read_all(tmp_path / "out")) == contents(state)


@pytest.mark.parametrize("failing", ["begin", "write", "finish"])
def test_a_failure_reaches_every_rank_and_leaves_the_previous_output(tmp_path, monkeypatch, failing):
    state = write_shards(tmp_path / "in", whole(), "rows")
    mapping = mapping_for(state, 3)
    check(drive(list(protocols(tmp_path, mapping, 3))))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    jobs = list(protocols(tmp_path, mapping, 3))
    calls = []

    def fail(*args):
        calls.append(args)
        if failing != "write" or len(calls) == 2:
            raise OSError(28, "boom")
        return original(*args)

    name = {"begin": "next_generation", "write": "_write_file", "finish": "commit"}[failing]
    original = getattr(ours, name)
    monkeypatch.setattr(ours, name, fail if failing != "finish" else lambda *args, **kwargs: fail())
    outcomes = drive(jobs)
    assert all(isinstance(outcome, CheckpointException) and "boom" in str(outcome) for outcome in outcomes)
    visible = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix != ".pending"}
    assert visible == before


@pytest.mark.parametrize("threads", [1, 3])
def test_a_process_that_fails_leaves_none_of_its_files(tmp_path, monkeypatch, threads):
    mapping = mapping_for(write_shards(tmp_path / "in", whole(), "rows"), 3)
    original, calls = ours._whole, itertools.count()

    def fail_late(*args):
        if next(calls) == len(mapping) - 1:
            raise OSError(28, "boom")
        return original(*args)

    monkeypatch.setattr(ours, "_whole", fail_late)
    with pytest.raises(OSError, match="boom"):
        ours.consolidate_safetensors_files(str(tmp_path / "in"), str(tmp_path / "out"), mapping, threads)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda mapping: mapping.pop("deep"), "'deep' in the files but not in the mapping"),
        (lambda mapping: mapping.update(other=1), "'other' in the mapping but not in the files"),
        (lambda mapping: mapping.update(deep=0), "file indices from 1"),
    ],
)
def test_mappings_that_do_not_fit_are_refused(tmp_path, change, text):
    """Torch drops the tensors that the mapping lacks, and writes an unreadable file for those that it invents."""
    mapping = mapping_for(write_shards(tmp_path / "in", whole(), "rows"), 2)
    change(mapping)
    with pytest.raises((SafetensorsError, ValueError), match=text):
        ours.consolidate_safetensors_files(str(tmp_path / "in"), str(tmp_path / "out"), mapping)
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_refused(tmp_path):
    mapping = mapping_for(write_shards(tmp_path / "in", whole(), "rows"), 2)
    (tmp_path / "in" / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="shard-00002"):
        ours.consolidate_safetensors_files(str(tmp_path / "in"), str(tmp_path / "out"), mapping)
    (tmp_path / "in" / INDEX).unlink()
    with pytest.raises(MetadataError, match="no chunk holds"):
        ours.consolidate_safetensors_files(str(tmp_path / "in"), str(tmp_path / "out"), mapping)


def test_no_threads_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_threads=0"):
        ours.consolidate_safetensors_files(str(tmp_path), str(tmp_path), {}, num_threads=0)
