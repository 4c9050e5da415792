"""`Row`: everything that one benchmark says of one backend, one workload and one layout. Plain data.

`results/README.md` names each column with its unit; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["SCHEMA_VERSION", "Row", "key_of"]

SCHEMA_VERSION = 2
"""Of benchmark rows. Raise it whenever a column comes, goes or changes its meaning."""


@dataclass(frozen=True)
class Row:
    """A row. Times are from the earliest start to the latest end over all ranks; lists hold one figure per round.

    A figure that was not measured is None, or an empty list.
    """

    backend: str
    workload: str
    workload_version: int
    workload_digest: str
    scale: float
    layout: str
    layout_digest: str
    world_size: int
    load_layout: str
    load_layout_digest: str
    load_world_size: int
    device: str
    is_cold: bool
    num_tensors: int
    state_bytes: int
    local_bytes: int
    status: str
    reason: str
    content_digest: str = ""
    num_warmups: int = 0
    warmup_save_s: list[float] = field(default_factory=list)
    warmup_load_s: list[float] = field(default_factory=list)
    save_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)
    raw_write_s: list[float] = field(default_factory=list)
    raw_read_s: list[float] = field(default_factory=list)
    async_blocking_s: list[float] = field(default_factory=list)
    async_durable_s: list[float] = field(default_factory=list)
    median_save_s: float | None = None
    median_load_s: float | None = None
    save_gib_per_s: float | None = None
    load_gib_per_s: float | None = None
    rank_save_gib_per_s: float | None = None
    rank_load_gib_per_s: float | None = None
    save_of_raw: float | None = None
    load_of_raw: float | None = None
    save_planning_s: float | None = None
    save_data_s: float | None = None
    save_commit_s: float | None = None
    load_planning_s: float | None = None
    load_data_s: float | None = None
    save_cpu_s: float | None = None
    load_cpu_s: float | None = None
    save_peak_bytes: int | None = None
    load_peak_bytes: int | None = None
    save_device_peak_bytes: int | None = None
    load_device_peak_bytes: int | None = None
    stored_bytes: int | None = None
    num_files: int | None = None
    written_bytes: int | None = None
    synced_bytes: int | None = None
    write_amplification: float | None = None
    num_storage_calls: int | None = None
    num_sync_calls: int | None = None
    num_collectives: int | None = None
    num_copies: int | None = None
    resident_share: float | None = None
    storage_read_bytes: int | None = None
    interference: float | None = None
    goodput: float | None = None
    mtbf_s: float | None = None


def key_of(row: Row) -> tuple[str, ...]:
    """Returns what two rows must share to be comparable, apart from the machine."""
    return (
        row.backend,
        row.workload,
        row.workload_digest,
        row.layout_digest,
        row.load_layout_digest,
        row.device,
        "cold" if row.is_cold else "warm",
    )
