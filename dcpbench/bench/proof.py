"""What makes a row believable: its status, and the reason where it is not VALID. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcpbench.bench.samples import CallSample, Seen

__all__ = ["Evidence", "judged"]

_MIN_READ_SHARE = 0.98
"""Of the bytes that a cold load must fetch from the device; what lies within a page may be fetched for another file."""


@dataclass(frozen=True)
class Evidence:
    """What is known of a row beside its times.

    Attributes:
        seen: of the backend.
        raw_loads: every timed raw load of the same rounds.
        state_bytes: of the state, each byte counted once.
        is_cold: loads were to come from the device.
    """

    seen: Seen
    raw_loads: Sequence[CallSample]
    state_bytes: int
    is_cold: bool


def judged(evidence: Evidence) -> tuple[str, str]:
    """Returns FAIL where the backend is wrong, INVALID where a proof is missing, else VALID; and the reason."""
    if evidence.seen.failure:
        return "FAIL", evidence.seen.failure
    if fault := next((load.fault for load in evidence.seen.loads if load.fault), ""):
        return "FAIL", f"wrong content: {fault}"
    reasons = [*_durability(evidence), *(_coldness(evidence) if evidence.is_cold else [])]
    return ("INVALID", reasons[0]) if reasons else ("VALID", "")


def _durability(evidence: Evidence) -> list[str]:
    counts = evidence.seen.counts
    if counts is None:
        return [f"bytes written and fsynced were not counted: {evidence.seen.no_counts_because}"]
    if counts.num_unsynced_files:
        unsynced = counts.written_bytes - counts.synced_bytes
        return [
            f"not durable: {unsynced:,} of {counts.written_bytes:,} bytes written had no fsync behind them "
            f"when save returned, in {counts.num_unsynced_files} files"
        ]
    if counts.written_bytes < evidence.seen.stored_bytes:
        return [
            f"durability cannot be shown: of {evidence.seen.stored_bytes:,} bytes in the files, "
            f"only {counts.written_bytes:,} were written by calls that are counted"
        ]
    return []


def _coldness(evidence: Evidence) -> list[str]:
    needed = _MIN_READ_SHARE * min(evidence.state_bytes, evidence.seen.stored_bytes)
    for load in evidence.seen.loads:
        if load.resident_share > 0:
            return [f"not cold: {load.resident_share:.1%} of the files lay in the page cache before a load"]
        if load.storage_read_bytes < needed:
            if any(raw.storage_read_bytes < needed for raw in evidence.raw_loads):
                return ["not shown to be cold: this file system does not count what is read from its device"]
            return [
                f"not cold: a load fetched {load.storage_read_bytes:,} bytes from the device, of "
                f"{min(evidence.state_bytes, evidence.seen.stored_bytes):,} that it needs; the rest came from a cache"
            ]
    return []
