import errno
import threading

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from virtual_ranks import blank_like, check, load_all, noise, raw_bytes, save_all, shard

import reference
from reference import CheckpointException, FileSystemReader, FileSystemWriter, write_items
from reference.metadata import MetadataError, dump_metadata, load_metadata


def state(seed=0):
    return {"w": noise((8, 3), torch.float32, seed), "step": seed, "nested": {"b": noise((5,), torch.int64, seed)}}


def assert_holds(path, expected, **options):
    loaded = blank_like(expected)
    reference.load(loaded, storage_reader=FileSystemReader(path, **options))
    assert loaded["step"] == expected["step"]
    assert raw_bytes(loaded["w"]) == raw_bytes(expected["w"])
    assert raw_bytes(loaded["nested"]["b"]) == raw_bytes(expected["nested"]["b"])


def data_files(path):
    return sorted(p.name for p in path.iterdir() if p.suffix == ".distcp")


def test_a_fresh_folder_gets_torchs_names(tmp_path):
    path = tmp_path / "new" / "deep"
    reference.save(state(), checkpoint_id=path)
    assert sorted(p.name for p in path.iterdir()) == [".metadata", "__0_0.distcp"]


@pytest.mark.parametrize("options", [{"thread_count": 3}, {"single_file_per_rank": False}, {"sync_files": False}])
def test_writer_options_change_files_and_not_content(tmp_path, options):
    reference.save(state(1), storage_writer=FileSystemWriter(tmp_path, **options))
    assert_holds(tmp_path, state(1))
    if "sync_files" not in options:
        assert len(data_files(tmp_path)) == 3


def test_overwriting_uses_fresh_names_and_removes_the_old_files(tmp_path):
    seen = set()
    for seed in range(3):
        reference.save(state(seed), checkpoint_id=tmp_path)
        assert_holds(tmp_path, state(seed))
        (name,) = data_files(tmp_path)
        assert name not in seen
        seen.add(name)


def test_overwrite_false_refuses(tmp_path):
    reference.save(state(1), checkpoint_id=tmp_path)
    with pytest.raises(CheckpointException, match="overwrite=False"):
        reference.save(state(2), storage_writer=FileSystemWriter(tmp_path, overwrite=False))
    assert_holds(tmp_path, state(1))


@pytest.mark.parametrize("thread_count", [1, 3])
def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch, thread_count):
    reference.save(state(1), checkpoint_id=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    lock, count = threading.Lock(), [0]
    original = write_items._ItemWriter.write

    def failing(writer, item, data):
        with lock:
            count[0] += 1
            if count[0] == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return original(writer, item, data)

    monkeypatch.setattr(write_items._ItemWriter, "write", failing)
    with pytest.raises(CheckpointException, match="No space left"):
        reference.save(state(2), storage_writer=FileSystemWriter(tmp_path, thread_count=thread_count))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert_holds(tmp_path, state(1))


def test_a_save_that_fails_to_commit_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    reference.save(state(1), checkpoint_id=tmp_path)

    def failing(*args, **kwargs):
        raise OSError(errno.EIO, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", failing)
        with pytest.raises(CheckpointException, match="I/O error"):
            reference.save(state(2), checkpoint_id=tmp_path)
    assert_holds(tmp_path, state(1))
    reference.save(state(3), checkpoint_id=tmp_path)
    assert_holds(tmp_path, state(3))
    assert len(data_files(tmp_path)) == 1


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.distcp").write_text("mine")
    for seed in range(2):
        reference.save(state(seed), checkpoint_id=tmp_path)
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "model.distcp").exists()


def test_ranks_that_save_alone_keep_their_own_metadata(tmp_path):
    states = [state(rank) for rank in range(2)]
    for _ in range(2):
        outcomes = check(save_all(states, tmp_path, use_collectives=False))
        assert [outcome is not None for outcome in outcomes] == [True, True]
    assert {".metadata", "__0.metadata", "__1.metadata"} & {p.name for p in tmp_path.iterdir()} == {
        "__0.metadata",
        "__1.metadata",
    }
    assert len(data_files(tmp_path)) == 2
    loaded = [blank_like(s) for s in states]
    check(load_all(loaded, tmp_path))
    for rank in range(2):
        assert raw_bytes(loaded[rank]["w"]) == raw_bytes(states[rank]["w"])


def test_a_folder_without_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointException, match="Expected a checkpoint but got none"):
        reference.load(state(), checkpoint_id=tmp_path)


def rewrite_metadata(path, change):
    metadata = load_metadata((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(dump_metadata(metadata))


@pytest.mark.parametrize("where", ["../outside", "/etc/hostname", "a/../../b", ""])
def test_paths_that_leave_the_folder_are_refused(tmp_path, where):
    reference.save(state(), checkpoint_id=tmp_path)

    def change(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = where

    rewrite_metadata(tmp_path, change)
    with pytest.raises(CheckpointException, match="inside the checkpoint's folder"):
        reference.load(state(), checkpoint_id=tmp_path)


@pytest.mark.parametrize("harm", ["gone", "short"])
def test_missing_or_short_files_are_found_before_anything_changes(tmp_path, harm):
    reference.save(state(1), checkpoint_id=tmp_path)
    target = tmp_path / "__0_0.distcp"
    if harm == "gone":
        target.unlink()
    else:
        target.write_bytes(target.read_bytes()[:-100])
    loaded = state(2)
    with pytest.raises(CheckpointException, match=r"__0_0\.distcp"):
        reference.load(loaded, checkpoint_id=tmp_path)
    assert raw_bytes(loaded["w"]) == raw_bytes(state(2)["w"])


@pytest.mark.parametrize("fqn", ["w", "step", "nested.b"])
def test_a_changed_payload_byte_is_found_and_named(tmp_path, fqn):
    metadata = reference.save(state(1), checkpoint_id=tmp_path)
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == fqn]
    raw = bytearray((tmp_path / "__0_0.distcp").read_bytes())
    raw[info.offset + (67 if fqn == "step" else 705)] ^= 0x40
    (tmp_path / "__0_0.distcp").write_bytes(raw)
    with pytest.raises(CheckpointException, match=f"'{fqn}'.*__0_0"):
        reference.load(blank_like(state()), checkpoint_id=tmp_path)


def test_crc_checks_can_be_turned_off(tmp_path):
    metadata = reference.save({"w": torch.zeros(4, dtype=torch.uint8)}, checkpoint_id=tmp_path)
    (info,) = metadata.storage_data.values()
    raw = bytearray((tmp_path / info.relative_path).read_bytes())
    raw[info.offset + 704] = 7
    (tmp_path / info.relative_path).write_bytes(raw)
    loaded = {"w": torch.ones(4, dtype=torch.uint8)}
    reference.load(loaded, storage_reader=FileSystemReader(tmp_path, check_crc="never"))
    assert loaded["w"].tolist() == [7, 0, 0, 0]


@pytest.mark.parametrize("check_crc", ["always", "whole", "never"])
@pytest.mark.parametrize("size", [(6, 5), (7, 3, 40000), (2, 300, 300)])
@pytest.mark.parametrize("placements", [[Shard(0)], [Shard(1)], [Replicate()]], ids=str)
def test_partial_reads_give_the_same_bytes(tmp_path, check_crc, size, placements):
    whole = noise(size, torch.int16)
    reference.save({"w": whole}, storage_writer=FileSystemWriter(tmp_path, sync_files=False))
    for rank in range(3):
        expected = shard(whole, rank, range(3), placements)
        loaded = {"w": blank_like(expected)}
        reader = FileSystemReader(tmp_path, check_crc=check_crc)
        reference.load(loaded, storage_reader=reader, no_dist=True)
        assert raw_bytes(loaded["w"]) == raw_bytes(expected)


@pytest.mark.parametrize("check_crc", ["always", "whole"])
def test_destinations_of_other_strides_and_dtypes_are_filled(tmp_path, check_crc):
    whole = torch.arange(60.0).reshape(6, 10)
    reference.save({"w": whole}, checkpoint_id=tmp_path)
    reader = FileSystemReader(tmp_path, check_crc=check_crc)
    transposed = {"w": torch.zeros(10, 6).t()}
    reference.load(transposed, storage_reader=reader)
    assert torch.equal(transposed["w"], whole)
    converted = {"w": torch.zeros(6, 10, dtype=torch.float64)}
    with pytest.warns(UserWarning, match=r"'w' was saved as torch\.float32 and is loaded as torch\.float64"):
        reference.load(converted, storage_reader=reader)
    assert torch.equal(converted["w"], whole.double())


def test_a_damaged_checkpoint_does_not_fall_back_to_an_older_one_beside_it(tmp_path):
    reference.save(state(1), checkpoint_id=tmp_path, use_collectives=False)
    reference.save(state(2), checkpoint_id=tmp_path)
    (tmp_path / ".metadata").write_bytes(b"junk")
    with pytest.raises(CheckpointException, match="metadata pickle"):
        reference.load(state(), checkpoint_id=tmp_path)


def test_reset_gives_a_new_id_and_place(tmp_path):
    writer = FileSystemWriter(tmp_path / "a")
    first = writer.save_id
    writer.reset(tmp_path / "b")
    assert (writer.save_id != first, writer.checkpoint_id) == (True, tmp_path / "b")
    assert not FileSystemWriter.validate_checkpoint_id("s3://bucket/x")
    assert FileSystemReader.validate_checkpoint_id(tmp_path / "x")


def test_metadata_names_what_was_never_written(tmp_path, monkeypatch):
    monkeypatch.setattr("reference.filesystem_writer.write_file", lambda *args, **kwargs: [])
    with pytest.raises(CheckpointException, match="has no storage data"):
        reference.save(state(), checkpoint_id=tmp_path)
    assert not (tmp_path / ".metadata").exists()
    assert issubclass(MetadataError, ValueError)
