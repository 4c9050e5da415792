"""From strace's text to operations: paths, positions, calls in two parts, who heard of whom."""

import pytest

from dcpbench.errors import MalformedFile
from dcpbench.faults.operations import (
    Close,
    Link,
    MakeFolder,
    OpenFile,
    RemoveFolder,
    Rename,
    Sync,
    SyncAll,
    Truncate,
    Unlink,
    Unsupported,
    Write,
)
from dcpbench.faults.strace_log import parse

ROOT = "/s"


def x(text):
    """Text as strace writes it with -xx."""
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def q(text):
    return f'"{x(text)}"'


def fd(number, path):
    return f"{number}<{x(path)}>"


def operations(*lines, ranks=None):
    found = parse("\n".join(lines), ROOT, ranks or {7: 0, 8: 1})
    return [(type(op), op.path, op.rank) for op in found], found


def opened(path, flags="O_WRONLY|O_CREAT", number=3, thread=7):
    return f"{thread} openat(AT_FDCWD<{x('/')}>, {q(path)}, {flags}, 0666) = {fd(number, path)}"


def test_a_file_from_its_making_to_its_name():
    kinds, found = operations(
        f"7 mkdir({q('/s/c')}, 0777) = 0",
        opened("/s/c/a.tmp", "O_WRONLY|O_CREAT|O_TRUNC|O_CLOEXEC"),
        f"7 write({fd(3, '/s/c/a.tmp')}, {q('hello')}, 5) = 5",
        f"7 write({fd(3, '/s/c/a.tmp')}, {q('!!!')}, 3) = 2",
        f"7 pwrite64({fd(3, '/s/c/a.tmp')}, {q('H')}, 1, 0) = 1",
        f"7 fsync({fd(3, '/s/c/a.tmp')}) = 0",
        f"7 close({fd(3, '/s/c/a.tmp')}) = 0",
        f"7 rename({q('/s/c/a.tmp')}, {q('/s/c/a')}) = 0",
        f"7 fsync({fd(4, '/s/c')}) = 0",
    )
    assert kinds == [
        (MakeFolder, "c", 0),
        (OpenFile, "c/a.tmp", 0),
        (Write, "c/a.tmp", 0),
        (Write, "c/a.tmp", 0),
        (Write, "c/a.tmp", 0),
        (Sync, "c/a.tmp", 0),
        (Close, "c/a.tmp", 0),
        (Rename, "c/a.tmp", 0),
        (Sync, "c", 0),
    ]
    assert found[1].truncates
    assert [(op.offset, op.data) for op in found if isinstance(op, Write)] == [(0, b"hello"), (5, b"!!"), (0, b"H")]
    assert found[-2].target == "c/a"


def test_positions_follow_seeks_reads_and_duplicates():
    path = "/s/a"
    _, found = operations(
        opened(path, "O_RDWR|O_CREAT"),
        f"7 lseek({fd(3, path)}, 10, SEEK_SET) = 10",
        f"7 read({fd(3, path)}, {q('xy')}, 2) = 2",
        f"7 write({fd(3, path)}, {q('a')}, 1) = 1",
        f"7 dup({fd(3, path)}) = {fd(9, path)}",
        f"7 writev({fd(9, path)}, [{{iov_base={q('bc')}, iov_len=2}}, {{iov_base={q('d')}, iov_len=1}}], 2) = 3",
        f"7 write({fd(3, path)}, {q('e')}, 1) = 1",
    )
    assert [(op.offset, op.data) for op in found if isinstance(op, Write)] == [(12, b"a"), (13, b"bcd"), (16, b"e")]


def test_appended_and_synced_writes():
    _, found = operations(
        opened("/s/a", "O_WRONLY|O_APPEND"),
        f"7 write({fd(3, '/s/a')}, {q('a')}, 1) = 1",
        opened("/s/b", "O_WRONLY|O_CREAT|O_DSYNC"),
        f"7 write({fd(3, '/s/b')}, {q('b')}, 1) = 1",
    )
    assert [(op.offset, op.is_synced) for op in found if isinstance(op, Write)] == [(None, False), (0, True)]


def test_names_given_below_a_folder():
    folder = fd(5, "/s/c")
    kinds, _ = operations(
        f"7 mkdirat({folder}, {q('d')}, 0777) = 0",
        f"7 unlinkat({folder}, {q('d')}, AT_REMOVEDIR) = 0",
        f"7 unlinkat({folder}, {q('x')}, 0) = 0",
        f"7 renameat2({folder}, {q('x')}, {folder}, {q('y')}, RENAME_NOREPLACE) = 0",
        f"7 linkat({folder}, {q('x')}, {folder}, {q('z')}, 0) = 0",
        f"7 unlink({q('/s/c/../c/q')}) = 0",
        f"7 ftruncate({fd(3, '/s/c/x')}, 5) = 0",
        "7 sync() = 0",
    )
    assert kinds == [
        (MakeFolder, "c/d", 0),
        (RemoveFolder, "c/d", 0),
        (Unlink, "c/x", 0),
        (Rename, "c/x", 0),
        (Link, "c/x", 0),
        (Unlink, "c/q", 0),
        (Truncate, "c/x", 0),
        (SyncAll, "", 0),
    ]


def test_what_failed_or_lies_elsewhere_or_has_no_name_is_left_out():
    kinds, _ = operations(
        f"7 unlink({q('/s/a')}) = -1 ENOENT (No such file or directory)",
        opened("/elsewhere/a"),
        f"7 write({fd(3, '/elsewhere/a')}, {q('a')}, 1) = 1",
        f"7 mkdir({q('/sibling')}, 0777) = 0",
        opened("/s/a", "O_RDONLY"),
        f"7 fsync({fd(3, '/s/gone')}(deleted)) = 0",
        "7 +++ exited with 0 +++",
        f"8 read({fd(6, 'socket:[1]')},  <detached ...>",
    )
    assert kinds == []


def test_a_call_in_two_parts_counts_when_it_ends():
    kinds, found = operations(
        f"7 fsync({fd(3, '/s/a')} <unfinished ...>",
        f"8 unlink({q('/s/b')}) = 0",
        "7 <... fsync resumed>)              = 0",
    )
    assert kinds == [(Unlink, "b", 1), (Sync, "a", 0)]
    assert (found[1].begin, found[1].end) == (0, 2)


def test_threads_that_are_new_belong_to_their_rank():
    kinds, _ = operations(
        f"21 unlink({q('/s/b')}) = 0",
        "8 clone3({flags=CLONE_VM|CLONE_THREAD, exit_signal=0} => {parent_tid=[21]}, 88) = 21",
    )
    assert kinds == [(Unlink, "b", 1)]


def test_what_ranks_say_to_each_other():
    _, found = operations(
        f"7 unlink({q('/s/a')}) = 0",
        f"7 sendto({fd(5, 'socket:[1]')}, {q('x')}, 1, 0, NULL, 0) = 1",
        f"8 recvfrom({fd(5, 'socket:[2]')}, {q('x')}, 1, 0, NULL, NULL) = 1",
        f"8 unlink({q('/s/b')}) = 0",
    )
    first, second = found
    assert first.told == 1
    assert second.heard == 2
    assert first.heard == -1
    assert second.told > 10**9


@pytest.mark.parametrize(
    "line",
    [
        f"7 mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_SHARED, {fd(3, '/s/a')}, 0) = 0x7f0000000000",
        "7 io_uring_setup(8, {}) = 5",
        f"7 copy_file_range({fd(3, '/t/a')}, NULL, {fd(4, '/s/a')}, NULL, 5, 0) = 5",
        f"7 symlink({q('/t')}, {q('/s/a')}) = 0",
        f"7 rename({q('/t/a')}, {q('/s/a')}) = 0",
        f"7 renameat2({fd(5, '/s')}, {q('a')}, {fd(5, '/s')}, {q('b')}, RENAME_EXCHANGE) = 0",
        opened("/s", "O_RDWR|O_TMPFILE"),
    ],
)
def test_what_is_not_modelled_is_said(line):
    kinds, _ = operations(line)
    assert [kind for kind, _, _ in kinds] == [Unsupported]


def test_cut_data_is_no_data():
    with pytest.raises(MalformedFile, match="cut"):
        operations(opened("/s/a"), f"7 write({fd(3, '/s/a')}, {q('ab')}..., 5) = 5")
    with pytest.raises(MalformedFile, match="expected a call"):
        operations("7 what is this")
