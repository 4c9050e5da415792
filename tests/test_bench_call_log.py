"""What is made of strace's lines: bytes written, bytes made durable, whose files they are."""

from __future__ import annotations

import pytest

from dcpbench.bench.call_log import counts_of
from dcpbench.bench.proof import Evidence, judged
from dcpbench.bench.samples import CallSample, Counts, Seen

FOLDER = "/data/run/checkpoint"


def counted(*lines, pid=7):
    return counts_of("\n".join(f"{pid} {line.format(at=FOLDER)}" for line in lines), FOLDER)


def test_a_file_that_is_synced_is_durable():
    counts = counted(
        'openat(AT_FDCWD</>, "{at}/a.tmp", O_WRONLY|O_CREAT|O_CLOEXEC, 0666) = 5<{at}/a.tmp>',
        'write(5<{at}/a.tmp>, ""..., 100) = 100',
        'pwrite64(5<{at}/a.tmp>, ""..., 50, 100) = 50',
        "fsync(5<{at}/a.tmp>) = 0",
        'rename("{at}/a.tmp", "{at}/a") = 0',
    )
    assert (counts.written_bytes, counts.synced_bytes, counts.num_unsynced_files) == (150, 150, 0)
    assert counts.calls == {"fsync": 1, "openat": 1, "pwrite64": 1, "rename": 1, "write": 1}


@pytest.mark.parametrize(
    ("lines", "synced", "num_unsynced"),
    [
        (['write(5<{at}/a>, ""..., 100) = 100'], 0, 1),
        (["fsync(5<{at}/a>) = 0", 'write(5<{at}/a>, ""..., 100) = 100'], 0, 1),
        (['write(5<{at}/a>, ""..., 100) = 100', "fsync(5<{at}/a>) = -1 EIO (Input/output error)"], 0, 1),
        (['write(5<{at}/a>, ""..., 100) = 100', "fsync(6<{at}/b>) = 0"], 0, 1),
        (['write(5<{at}/a>, ""..., 100) = 100', "fdatasync(9<{at}/a>) = 0"], 100, 0),
        (['write(5<{at}/a>, ""..., 100) = 100', "sync() = 0"], 100, 0),
        (['write(5<{at}/a>, ""..., 100) = 100', 'unlink("{at}/a") = 0'], 0, 0),
        (['write(5<{at}/a>, ""..., 100) = 100', 'rename("{at}/a", "{at}/b") = 0', "fsync(5<{at}/b>) = 0"], 100, 0),
        (['write(5<{at}/a>, ""..., 100) = 100', 'rename("{at}/a", "{at}/b") = 0'], 0, 1),
        (
            [
                'openat(AT_FDCWD</>, "{at}/a", O_WRONLY|O_CREAT|O_DSYNC, 0666) = 5<{at}/a>',
                'write(5<{at}/a>, ""..., 100) = 100',
            ],
            100,
            0,
        ),
    ],
)
def test_durability(lines, synced, num_unsynced):
    counts = counted(*lines)
    assert (counts.written_bytes, counts.synced_bytes, counts.num_unsynced_files) == (100, synced, num_unsynced)


def test_calls_that_others_interrupt_are_put_together():
    log = "\n".join(
        [
            f'7 write(5<{FOLDER}/a>, ""..., 100 <unfinished ...>',
            f'8 write(6<{FOLDER}/b>, ""..., 30) = 30',
            "7 <... write resumed>) = 100",
            f"8 fsync(6<{FOLDER}/b> <unfinished ...>",
            "8 <... fsync resumed>) = 0",
        ]
    )
    counts = counts_of(log, FOLDER)
    assert (counts.written_bytes, counts.synced_bytes, counts.num_unsynced_files) == (130, 30, 1)


def test_other_files_do_not_count():
    counts = counted(
        'write(1<pipe:[33]>, ""..., 9) = 9',
        'write(2</data/run/other>, ""..., 9) = 9',
        'write(3<{at}-not>, ""..., 9) = 9',
    )
    assert counts == Counts()


def load(**more):
    return CallSample(0.0, 1.0, 1.0, **{"storage_read_bytes": 1000, **more})


def evidence(*, raw_loads=None, is_cold=True, **more):
    given = {"loads": [load()], "counts": Counts(written_bytes=1000, synced_bytes=1000), "stored_bytes": 1000}
    return Evidence(Seen(**{**given, **more}), raw_loads or [load()], 900, is_cold)


def test_a_row_with_every_proof_is_valid():
    assert judged(evidence()) == ("VALID", "")
    assert judged(evidence(is_cold=False, loads=[load(resident_share=1.0, storage_read_bytes=0)]))[0] == "VALID"


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        ({"failure": "save raised on rank 1"}, "FAIL", "save raised on rank 1"),
        ({"loads": [load(), load(fault="'w' holds other bytes")]}, "FAIL", "wrong content: 'w' holds other bytes"),
        ({"counts": None, "no_counts_because": "needs strace"}, "INVALID", "not counted: needs strace"),
        ({"counts": Counts(written_bytes=1000, synced_bytes=900, num_unsynced_files=1)}, "INVALID", "100 of 1,000"),
        ({"counts": Counts(written_bytes=10, synced_bytes=10)}, "INVALID", "only 10 were written by calls"),
        ({"loads": [load(resident_share=0.02)]}, "INVALID", "2.0% of the files lay in the page cache"),
        ({"loads": [load(), load(storage_read_bytes=500)]}, "INVALID", "500 bytes from the device, of 900"),
        (
            {"loads": [load(storage_read_bytes=0)], "raw_loads": [load(storage_read_bytes=0)]},
            "INVALID",
            "this file system does not count",
        ),
    ],
)
def test_what_is_not_shown_is_not_valid(more, status, says):
    found, reason = judged(evidence(**more))
    assert found == status
    assert says in reason
