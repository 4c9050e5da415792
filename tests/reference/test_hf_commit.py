"""Overwriting a folder of safetensors: at every moment the old checkpoint, whole, or the new one."""

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Shard
from virtual_ranks import check, noise, raw_bytes, save_all, shard

import reference
from reference import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter, hf_writer
from reference.hf_index import INDEX, PENDING, read_index

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

OPTIONS = {
    "whole": {"fqn_to_index_mapping": {"a": 1, "b": 2}},
    "shards": {"save_distributed": True},
    "consolidated": {
        "save_distributed": True,
        "enable_consolidation": True,
        "fqn_to_index_mapping": {"a": 1, "b": 2},
    },
}


def state(seed):
    return {"a": noise((4, 3), torch.float32, seed), "b": noise((2,), torch.int64, seed)}


def contents(found):
    return {fqn: raw_bytes(t) for fqn, t in found.items()}


def save(seed, path, options):
    if options.get("save_distributed"):
        sharded = {fqn: [shard(t, rank, range(2), [Shard(0)]) for rank in range(2)] for fqn, t in state(seed).items()}
        states = [{fqn: parts[rank] for fqn, parts in sharded.items()} for rank in range(2)]
        check(save_all(states, path, writers=lambda _: HuggingFaceStorageWriter(path, **options)))
    else:
        reference.save(state(seed), storage_writer=HuggingFaceStorageWriter(path, **options))


def seed_in(path, seeds=(1, 2)):
    """Return which of the saved states the folder holds, whole; None if there is no checkpoint yet."""
    loaded = {"a": torch.zeros(4, 3), "b": torch.zeros(2, dtype=torch.int64)}
    if not (path / INDEX).exists():
        with pytest.raises(CheckpointException, match=r"or files named|Expected a folder"):
            reference.load(loaded, storage_reader=HuggingFaceStorageReader(path))
        return None
    reference.load(loaded, storage_reader=HuggingFaceStorageReader(path))
    (found,) = [seed for seed in seeds if contents(state(seed)) == contents(loaded)]
    return found


@pytest.fixture
def killed(tmp_path):
    """Saves into a folder; gives it as it was before each call that changes it or makes it durable."""
    count = itertools.count()

    def save_and_watch(seed, folder, options):
        taken = []

        def watch(patch, owner, name):
            original = getattr(owner, name)

            def watched(*args, **kwargs):
                if folder.exists():
                    taken.append(tmp_path / f"snapshot{next(count)}")
                    shutil.copytree(folder, taken[-1])
                return original(*args, **kwargs)

            patch.setattr(owner, name, watched)

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "open")):
                watch(patch, owner, name)
            save(seed, folder, options)
        return [*taken, folder]

    return save_and_watch


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_save_killed_anywhere_leaves_the_old_or_the_new_checkpoint(tmp_path, killed, options):
    folder = tmp_path / "ckpt"
    found = [seed_in(path) for path in killed(1, folder, options)]
    assert sorted(found, key=lambda seed: seed is not None) == found
    assert set(found) == {None, 1}
    overwriting = killed(2, folder, options)
    found = [seed_in(path) for path in overwriting]
    assert len(found) > 8
    assert sorted(found) == found
    assert set(found) == {1, 2}
    if "enable_consolidation" in options:
        found = [seed_in(path / "sharded") for path in overwriting]
        assert sorted(found) == found


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_another_save_goes_on_from_wherever_one_was_killed(tmp_path, killed, options):
    folder = tmp_path / "ckpt"
    save(1, folder, options)
    for path in killed(2, folder, options)[::3]:
        save(3, path, options)
        assert seed_in(path, (3,)) == 3
        assert {p.name for p in path.iterdir() if p.is_file()} == {INDEX, *read_index(path).files}


def test_who_goes_by_the_index_never_sees_a_mixture(tmp_path, killed):
    folder = tmp_path / "ckpt"
    save(1, folder, OPTIONS["whole"])
    for path in killed(2, folder, OPTIONS["whole"]):
        weight_map = json.loads((path / INDEX).read_text())["weight_map"]
        if all((path / name).exists() for name in weight_map.values()):
            found = {fqn: load_file(path / name)[fqn] for fqn, name in weight_map.items()}
            assert contents(found) in (contents(state(1)), contents(state(2)))


def test_nobody_who_goes_by_names_sees_a_file_before_it_is_committed(tmp_path, killed):
    folder = tmp_path / "ckpt"
    old = [f"shard-{rank:05d}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    new = [f"shard-{rank:05d}-model-g1-00001-of-00001.safetensors" for rank in (1, 2)]
    for seed, is_fresh, files in ((1, True, []), (2, False, old)):
        for path in killed(seed, folder, OPTIONS["shards"]):
            index = read_index(path)
            if index is None or index.files == files:
                assert sorted(p.name for p in path.glob("*.safetensors")) == files
            else:
                assert index.files == (old if is_fresh else new)


def test_data_is_durable_before_the_index_and_the_index_before_anything_goes(tmp_path, monkeypatch):
    save(1, tmp_path, OPTIONS["whole"])
    events = []
    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

    def note(what, path):
        events.append((what, Path(path).name))

    def watched_fsync(handle):
        note("fsync", Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    def watched_replace(self, target):
        note("replace", target)
        return replace(self, target)

    def watched_unlink(self, *args, **kwargs):
        note("unlink", self)
        unlink(self, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    monkeypatch.setattr(Path, "unlink", watched_unlink)
    save(2, tmp_path, OPTIONS["whole"])
    new = [f"model-g1-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert events[:8] == [
        *[("fsync", name + PENDING) for name in new],
        ("fsync", tmp_path.name),
        ("fsync", f"{INDEX}.tmp"),
        ("replace", INDEX),
        ("fsync", tmp_path.name),
        ("fsync", tmp_path.parent.name),
        ("replace", new[0]),
    ]
    assert events[8:10] == [("replace", new[1]), ("fsync", tmp_path.name)]
    assert sorted(events[10:]) == [("unlink", f"model-0000{n}-of-00002.safetensors") for n in (1, 2)]


@pytest.mark.parametrize("thread_count", [1, 2])
def test_a_save_that_fails_leaves_nothing_of_it(tmp_path, monkeypatch, thread_count):
    save(1, tmp_path, OPTIONS["whole"])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    class Failing(reference.DefaultSavePlanner):
        def resolve_data(self, write_item):
            if write_item.index.fqn == "b":
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().resolve_data(write_item)

    writer = HuggingFaceStorageWriter(tmp_path, thread_count=thread_count, **OPTIONS["whole"])
    with pytest.raises(CheckpointException, match="No space left"):
        reference.save(state(2), storage_writer=writer, planner=Failing())
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_file_of_another_save_is_neither_overwritten_nor_removed(tmp_path, monkeypatch):
    """Both saves counted the files in the folder before either wrote one."""
    monkeypatch.setattr(hf_writer, "next_generation", lambda _: 0)
    theirs = tmp_path / f"model-00002-of-00002.safetensors{PENDING}"
    theirs.write_text("theirs")
    with pytest.raises(CheckpointException, match="File exists"):
        save(1, tmp_path, OPTIONS["whole"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {theirs.name: "theirs"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t[:1], "Check the planner's resolve_data"),
        (lambda t: t.to_sparse(), "plain strided tensor"),
        (lambda t: "text", "as a str"),
        (lambda t: t.to(torch.complex128), "dtype=torch.complex128"),
    ],
)
def test_a_planner_that_hands_over_something_else_is_refused(tmp_path, change, text):
    class Changing(reference.DefaultSavePlanner):
        def resolve_data(self, write_item):
            return change(super().resolve_data(write_item))

    with pytest.raises(CheckpointException, match=text):
        reference.save(state(1), storage_writer=HuggingFaceStorageWriter(tmp_path), planner=Changing())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first", OPTIONS)
@pytest.mark.parametrize("second", OPTIONS)
def test_overwriting_replaces_one_kind_by_another(tmp_path, first, second):
    save(1, tmp_path, OPTIONS[first])
    save(2, tmp_path, OPTIONS[second])
    assert seed_in(tmp_path) == 2
    loaded = {"a": torch.zeros(4, 3), "b": torch.zeros(2, dtype=torch.int64)}
    if "consolidated" not in (first, second) or first == second:
        dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
        assert contents(loaded) == contents(state(2))


def test_what_is_not_of_the_replaced_checkpoint_stays(tmp_path):
    names = [
        "adapter.safetensors",
        "model.safetensors",
        "model-1-of-2.safetensors",
        "notes.txt",
        "model-00001-of-00001.bin",
    ]
    for name in names:
        (tmp_path / name).write_text("mine")
    for seed in (1, 2):
        save(seed, tmp_path, OPTIONS["whole"])
    assert all((tmp_path / name).read_text() == "mine" for name in names)


def test_overwriting_a_hub_folder_removes_what_its_index_listed(tmp_path):
    save_file(state(1), tmp_path / "pytorch_model.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    weight_map = dict.fromkeys(state(1), "pytorch_model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    save(2, tmp_path, OPTIONS["whole"])
    assert seed_in(tmp_path) == 2
    assert (tmp_path / "other.safetensors").exists()
    assert not (tmp_path / "pytorch_model.safetensors").exists()


@pytest.mark.parametrize("text", ["{", '{"weight_map": {"a": "../outside.safetensors"}}'])
def test_a_damaged_index_is_replaced_and_nothing_outside_is_touched(tmp_path, text):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "outside.safetensors").write_text("mine")
    (folder / INDEX).write_text(text)
    save(2, folder, OPTIONS["whole"])
    assert seed_in(folder) == 2
    assert (tmp_path / "outside.safetensors").exists()


def test_names_come_back_once_they_are_free_and_never_while_they_are_taken(tmp_path):
    seen = []
    for seed in range(3):
        save(seed, tmp_path, OPTIONS["whole"])
        seen.append({p.name for p in tmp_path.glob("*.safetensors")})
    assert not seen[0] & seen[1]
    assert not seen[1] & seen[2]
