"""What makes a row believable: its status, and the reason where it is not VALID. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcpbench.bench.samples import CallSample, Counts

__all__ = ["Evidence", "judged"]

_MIN_READ_SHARE = 0.98
"""Of the bytes that a cold load must fetch from the device; what lies within a page may be fetched for another file."""


@dataclass(frozen=True)
class Evidence:
    """What is known of a row beside its times.

    Attributes:
        failure: what the backend raised, or how it lost a rank; empty if nothing.
        loads: every timed load.
        raw_loads: every timed raw load of the same rounds.
        counts: of a save under strace; None where there was none.
        no_counts_because: why.
        stored_bytes: of the checkpoint's files.
        state_bytes: of the state, each byte counted once.
        is_cold: loads were to come from the device.
    """

    failure: str
    loads: Sequence[CallSample]
    raw_loads: Sequence[CallSample]
    counts: Counts | None
    no_counts_because: str
    stored_bytes: int
    state_bytes: int
    is_cold: bool


def judged(evidence: Evidence) -> tuple[str, str]:
    """Returns FAIL where the backend is wrong, INVALID where a proof is missing, else VALID; and the reason."""
    if evidence.failure:
        return "FAIL", evidence.failure
    if fault := next((load.fault for load in evidence.loads if load.fault), ""):
        return "FAIL", f"wrong content: {fault}"
    reasons = [*_durability(evidence), *(_coldness(evidence) if evidence.is_cold else [])]
    return ("INVALID", reasons[0]) if reasons else ("VALID", "")


def _durability(evidence: Evidence) -> list[str]:
    counts = evidence.counts
    if counts is None:
        return [f"bytes written and fsynced were not counted: {evidence.no_counts_because}"]
    if counts.num_unsynced_files:
        unsynced = counts.written_bytes - counts.synced_bytes
        return [
            f"not durable: {unsynced:,} of {counts.written_bytes:,} bytes written had no fsync behind them "
            f"when save returned, in {counts.num_unsynced_files} files"
        ]
    if counts.written_bytes < evidence.stored_bytes:
        return [
            f"durability cannot be shown: of {evidence.stored_bytes:,} bytes in the files, "
            f"only {counts.written_bytes:,} were written by calls that are counted"
        ]
    return []


def _coldness(evidence: Evidence) -> list[str]:
    needed = _MIN_READ_SHARE * min(evidence.state_bytes, evidence.stored_bytes)
    for load in evidence.loads:
        if load.resident_share > 0:
            return [f"not cold: {load.resident_share:.1%} of the files lay in the page cache before a load"]
        if load.storage_read_bytes < needed:
            if any(raw.storage_read_bytes < needed for raw in evidence.raw_loads):
                return ["not shown to be cold: this file system does not count what is read from its device"]
            return [
                f"not cold: a load fetched {load.storage_read_bytes:,} bytes from the device, of "
                f"{min(evidence.state_bytes, evidence.stored_bytes):,} that it needs; the rest came from a cache"
            ]
    return []
