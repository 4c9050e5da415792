"""From samples to the figures of a row. Pure."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dcpbench.bench.goodput import goodput
from dcpbench.bench.row import Row
from dcpbench.bench.samples import CallSample, Seen

__all__ = ["Measured", "row_of"]

_GIB = 1 << 30


@dataclass(frozen=True)
class Measured:
    """What one backend was measured to do.

    Attributes:
        seen: of it.
        raw: of the raw limit, in the same rounds.
        digests: of what each rank that loads holds, verified after every load.
        save_local_bytes, load_local_bytes: the least that a rank holds.
        mtbf_s: mean time between failures.
    """

    seen: Seen
    raw: Seen
    digests: Sequence[str]
    save_local_bytes: int
    load_local_bytes: int
    mtbf_s: float


def row_of(row: Row, measured: Measured) -> Row:
    """Returns ``row`` with all figures; one that FAILs keeps what was measured before, without any throughput."""
    row = replace(row, **_samples(measured))
    if row.status == "FAIL" or not measured.seen.saves:
        return row
    return replace(row, **_times(row, measured), **_memory(measured), **_counts(row, measured), **_background(measured))


def _samples(measured: Measured) -> dict[str, Any]:
    num_rounds = min(len(measured.seen.saves), len(measured.seen.loads))
    before = [one for one in (measured.seen.warm_up, measured.seen.memory) if one is not None]
    return {
        "num_warmups": len(before),
        "warmup_save_s": [save.seconds for save, _ in before],
        "warmup_load_s": [load.seconds for _, load in before],
        "save_s": [sample.seconds for sample in measured.seen.saves],
        "load_s": [sample.seconds for sample in measured.seen.loads],
        "raw_write_s": [sample.seconds for sample in measured.raw.saves[:num_rounds]],
        "raw_read_s": [sample.seconds for sample in measured.raw.loads[:num_rounds]],
        "async_blocking_s": [sample.blocking_s for sample in measured.seen.backgrounds],
        "async_durable_s": [sample.durable_s for sample in measured.seen.backgrounds],
    }


def _times(row: Row, measured: Measured) -> dict[str, Any]:
    save_s, load_s = statistics.median(row.save_s), statistics.median(row.load_s)
    save_split, load_split = _split(measured.seen.saves), _split(measured.seen.loads)
    return {
        "content_digest": hashlib.blake2b("".join(measured.digests).encode(), digest_size=16).hexdigest(),
        "median_save_s": save_s,
        "median_load_s": load_s,
        "save_gib_per_s": row.state_bytes / save_s / _GIB,
        "load_gib_per_s": row.state_bytes / load_s / _GIB,
        "rank_save_gib_per_s": _slowest(measured.save_local_bytes, measured.seen.saves),
        "rank_load_gib_per_s": _slowest(measured.load_local_bytes, measured.seen.loads),
        "save_of_raw": _of_raw(row.raw_write_s, row.save_s),
        "load_of_raw": _of_raw(row.raw_read_s, row.load_s),
        "save_planning_s": save_split[0],
        "save_data_s": save_split[1],
        "save_commit_s": save_split[2],
        "load_planning_s": load_split[0],
        "load_data_s": load_split[1],
        "save_cpu_s": statistics.median(sample.cpu_s for sample in measured.seen.saves),
        "load_cpu_s": statistics.median(sample.cpu_s for sample in measured.seen.loads),
        "resident_share": max(sample.resident_share for sample in measured.seen.loads),
        "storage_read_bytes": min(sample.storage_read_bytes for sample in measured.seen.loads),
    }


def _slowest(local_bytes: int, samples: Sequence[CallSample]) -> float:
    return local_bytes / statistics.median(sample.slowest_s for sample in samples) / _GIB


def _of_raw(raw: Sequence[float], own: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(raw, own, strict=True))


def _split(samples: Sequence[CallSample]) -> tuple[float | None, float | None, float | None]:
    seen = [sample.split for sample in samples if sample.split is not None]
    if not seen:
        return None, None, None
    before, within, after = (statistics.median(part) for part in zip(*seen, strict=True))
    return before, within, after


def _memory(measured: Measured) -> dict[str, Any]:
    if measured.seen.memory is None:
        return {}
    save, load = measured.seen.memory
    return {
        "save_peak_bytes": save.peak_bytes,
        "load_peak_bytes": load.peak_bytes,
        "save_device_peak_bytes": save.device_peak_bytes,
        "load_device_peak_bytes": load.device_peak_bytes,
    }


def _counts(row: Row, measured: Measured) -> dict[str, Any]:
    counts = measured.seen.counts
    stored = {"stored_bytes": measured.seen.stored_bytes, "num_files": measured.seen.num_files}
    if counts is None:
        return stored
    return {
        **stored,
        "written_bytes": counts.written_bytes,
        "synced_bytes": counts.synced_bytes,
        "write_amplification": counts.written_bytes / row.state_bytes,
        "num_storage_calls": sum(counts.calls.values()),
        "num_sync_calls": sum(number for name, number in counts.calls.items() if "sync" in name),
        "num_collectives": sum(counts.collectives.values()),
        "num_copies": counts.num_copies,
    }


def _background(measured: Measured) -> dict[str, Any]:
    load_s = statistics.median(sample.seconds for sample in measured.seen.loads)
    save_s = statistics.median(sample.seconds for sample in measured.seen.saves)
    blocking_s = durable_s = save_s
    interference = 0.0
    if measured.seen.backgrounds:
        blocking_s = statistics.median(sample.blocking_s for sample in measured.seen.backgrounds)
        durable_s = statistics.median(sample.durable_s for sample in measured.seen.backgrounds)
        interference = statistics.median(sample.interference for sample in measured.seen.backgrounds)
    return {
        "interference": interference if measured.seen.backgrounds else None,
        "goodput": goodput(blocking_s, durable_s, interference, load_s, measured.mtbf_s),
        "mtbf_s": measured.mtbf_s,
    }
