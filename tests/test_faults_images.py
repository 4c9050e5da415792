"""Images after a crash, by hand-written traces: what each kind of crash may leave, and what the law says of it."""

import pytest

from dcpbench.faults.crash_images import cuts_of, images_of
from dcpbench.faults.operations import (
    Close,
    MakeFolder,
    OpenFile,
    Rename,
    Sync,
    SyncAll,
    Truncate,
    Unlink,
    Unsupported,
    Write,
)
from dcpbench.faults.storage_model import history_of, tree_with


def write(path, data=b"new", offset=0, **more):
    return Write(path=path, data=data, offset=offset, **more)


def contents(trace, first, kinds, path, *, after_return=None):
    """What the images may hold at a path: bytes, or "gone"."""
    images = images_of(history_of(trace, first), kinds)
    if after_return is not None:
        images = [image for image in images if image.is_after_return == after_return]
    return {image.tree.get(path, "gone") for image in images}


def final(trace, first):
    history = history_of(trace, first)
    assert not history.unsupported
    return tree_with(history, history.effects)


def test_a_trace_is_followed_to_its_end():
    trace = [
        MakeFolder(path="c"),
        OpenFile(path="c/t"),
        write("c/t", b"12345"),
        write("c/t", b"67", None),
        write("c/t", b"x", 1),
        Truncate(path="c/t", size=6),
        Rename(path="c/t", target="c/a"),
        Unlink(path="old"),
        OpenFile(path="e", truncates=True),
    ]
    assert final(trace, {"old": b"o", "e": b"full"}) == {"c": None, "c/a": b"1x3456", "e": b""}


def test_folders_keep_what_is_in_them_when_they_are_renamed():
    trace = [OpenFile(path="t/a"), write("t/a"), Rename(path="t", target="final")]
    assert final(trace, {"t": None}) == {"final": None, "final/a": b"new"}


def test_a_kill_leaves_prefixes_and_a_torn_write():
    trace = [OpenFile(path="a", truncates=True), write("a", b"1234")]
    assert contents(trace, {"a": b"old"}, ["kill"], "a") == {b"old", b"", b"12", b"1234"}


def test_a_large_write_is_killed_page_by_page():
    data = b"a" * 4096 + b"b" * 4096
    found = contents([OpenFile(path="a"), write("a", data)], {}, ["kill"], "a")
    assert {len(content) for content in found - {"gone"}} == {0, 2048, 4096, 6144, 8192}


def test_without_fsync_posix_keeps_any_part():
    trace = [OpenFile(path="a"), write("a", b"1234")]
    assert contents(trace, {}, ["posix"], "a", after_return=True) == {"gone", b"", b"12", b"1234", bytes(4)}


def test_an_fsync_of_the_file_keeps_bytes_and_not_the_name():
    trace = [OpenFile(path="a"), write("a"), Sync(path="a")]
    assert contents(trace, {}, ["posix"], "a", after_return=True) == {"gone", b"new"}
    assert contents([*trace, Sync(path="")], {}, ["posix"], "a", after_return=True) == {b"new"}
    assert contents([*trace, SyncAll()], {}, ["posix"], "a", after_return=True) == {b"new"}


def test_a_folder_that_is_lost_takes_its_files_along():
    trace = [MakeFolder(path="c"), OpenFile(path="c/a"), write("c/a"), Sync(path="c/a"), Sync(path="c")]
    assert contents(trace, {}, ["posix"], "c/a", after_return=True) == {"gone", b"new"}
    assert contents([*trace, Sync(path="")], {}, ["posix"], "c/a", after_return=True) == {b"new"}


def test_a_rename_that_overtakes_its_bytes():
    trace = [OpenFile(path="t"), write("t"), Rename(path="t", target="a")]
    assert b"" in contents(trace, {"a": b"old"}, ["posix"], "a")
    assert contents(trace, {"a": b"old"}, ["ext4"], "a") == {b"old", b"new"}  # auto_da_alloc
    assert b"" in contents(trace, {}, ["ext4"], "a")  # nothing is replaced, so that nothing waits
    synced = [*trace[:2], Sync(path="t"), trace[2]]
    assert contents(synced, {"a": b"old"}, ["posix"], "a") == {b"old", b"new"}


def test_an_fsync_before_the_bytes_are_written_keeps_nothing():
    trace = [OpenFile(path="t"), Sync(path="t"), write("t"), Rename(path="t", target="a")]
    assert b"" in contents(trace, {}, ["posix"], "a", after_return=True)
    assert b"" in contents(trace, {}, ["ext4"], "a", after_return=True)


def test_ext4_keeps_the_order_of_names():
    trace = [OpenFile(path="one"), OpenFile(path="two")]
    images = images_of(history_of(trace, {}), ["ext4"])
    assert {frozenset(image.tree) for image in images} == {frozenset(), frozenset({"one"}), frozenset({"one", "two"})}
    images = images_of(history_of(trace, {}), ["posix"])
    assert frozenset({"two"}) in {frozenset(image.tree) for image in images}


def test_an_fsync_takes_all_earlier_names_along_on_ext4():
    trace = [OpenFile(path="one"), OpenFile(path="two"), write("two"), Sync(path="two")]
    assert contents(trace, {}, ["ext4"], "one", after_return=True) == {b""}
    assert "gone" in contents(trace, {}, ["posix"], "one", after_return=True)


def test_a_file_emptied_and_closed_is_flushed_before_later_names_on_ext4():
    trace = [OpenFile(path="a", truncates=True), write("a"), Close(path="a"), OpenFile(path="b")]
    images = images_of(history_of(trace, {"a": b"old"}), ["ext4"])
    assert {image.tree["a"] for image in images if "b" in image.tree} == {b"new"}
    assert b"" in {image.tree["a"] for image in images}


def test_bytes_that_replace_others_come_in_any_order_on_ext4():
    trace = [write("a", b"1", 0), write("a", b"2", 1)]
    assert contents([OpenFile(path="a"), *trace], {"a": b"xx"}, ["ext4"], "a") == {b"xx", b"1x", b"x2", b"12"}


def test_ranks_that_have_not_heard_of_each_other_may_be_anywhere():
    def trace(**told):
        return [OpenFile(path="a", rank=0, begin=0, end=1, **told), OpenFile(path="b", rank=1, begin=2, end=3, heard=2)]

    assert set(cuts_of(history_of(trace(told=9), {}))) == {frozenset(c) for c in [(), (0,), (1,), (0, 1)]}
    assert set(cuts_of(history_of(trace(told=1), {}))) == {frozenset(c) for c in [(), (0,), (0, 1)]}


def test_a_folder_is_made_before_what_is_in_it_whoever_made_it():
    trace = [
        MakeFolder(path="c", rank=0, begin=0, end=1, told=99),
        OpenFile(path="c/a", rank=1, begin=2, end=3, heard=-1),
    ]
    assert frozenset({1}) not in cuts_of(history_of(trace, {}))


def test_a_sync_of_one_rank_covers_only_what_must_have_been_done():
    def trace(told):
        return [
            OpenFile(path="c/a", rank=1, begin=0, end=1, told=told),
            Sync(path="c", rank=0, begin=2, end=3, heard=2),
        ]

    assert "gone" in contents(trace(99), {"c": None}, ["posix"], "c/a", after_return=True)
    assert contents(trace(1), {"c": None}, ["posix"], "c/a", after_return=True) == {b""}


def test_each_image_comes_once_with_the_weakest_crash():
    trace = [OpenFile(path="t"), write("t"), Rename(path="t", target="a"), Sync(path="")]
    images = images_of(history_of(trace, {"a": b"old"}))
    keys = [(image.digest, image.is_after_return) for image in images]
    assert len(set(keys)) == len(keys)
    whole = next(image for image in images if image.is_after_return and image.tree.get("a") == b"new")
    assert (whole.crash, whole.lost) == ("kill", ())
    empty = next(image for image in images if image.tree.get("a") == b"")
    assert (empty.crash, empty.lost) == ("posix", (1,))


@pytest.mark.parametrize(
    "operation", [Unsupported(path="a", text="mmap"), write("nowhere"), Rename(path="x", target="y")]
)
def test_what_cannot_be_followed_is_said(operation):
    assert history_of([operation], {}).unsupported
