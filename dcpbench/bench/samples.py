"""What one measured call gave: on one rank, and put together over all ranks. Plain data, standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["AsyncSample", "CallSample", "Counts", "Seen", "Taken", "async_over_ranks", "over_ranks"]


@dataclass(frozen=True)
class Taken:
    """What a rank holds of a state: its bytes, the number of its tensors that are not empty, their digest."""

    local_bytes: int
    num_tensors: int
    digest: str


@dataclass(frozen=True)
class CallSample:
    """One save or load.

    Attributes:
        begin_s, end_s: of the call, on a clock that all ranks of a host share.
        slowest_s: what the call took on the rank on which it took longest.
        data_begin_s, data_end_s: of the storage's ``write_data`` or ``read_data``; 0.0 where there is none to see.
        cpu_s: user and system time, of all threads.
        peak_bytes: by which resident memory rose, at its highest.
        device_peak_bytes: the same of the device.
        storage_read_bytes: fetched from the device below the page cache, as the kernel counts.
        resident_share: of the pages of the checkpoint that were in memory before the call.
        fault: what is wrong with what was loaded; empty if nothing.
    """

    begin_s: float
    end_s: float
    slowest_s: float
    data_begin_s: float = 0.0
    data_end_s: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    device_peak_bytes: int = 0
    storage_read_bytes: int = 0
    resident_share: float = 0.0
    fault: str = ""

    @property
    def seconds(self) -> float:
        """From the earliest start to the latest end."""
        return self.end_s - self.begin_s

    @property
    def split(self) -> tuple[float, float, float] | None:
        """Seconds before the data path, in it, and after it; None where it cannot be seen."""
        if not self.data_end_s:
            return None
        return self.data_begin_s - self.begin_s, self.data_end_s - self.data_begin_s, self.end_s - self.data_end_s


@dataclass(frozen=True)
class AsyncSample:
    """One save in the background, with a training loop beside it.

    Attributes:
        begin_s, end_s: from the call to where the checkpoint is there on this rank.
        blocking_s: until the call returned.
        steps_per_s, steps_per_s_alone: of the loop, during the save and before it.
    """

    begin_s: float
    end_s: float
    blocking_s: float
    steps_per_s: float
    steps_per_s_alone: float

    @property
    def durable_s(self) -> float:
        """Until all ranks have the checkpoint."""
        return self.end_s - self.begin_s

    @property
    def interference(self) -> float:
        """The share of the training steps that the save costs while it runs."""
        return max(0.0, 1.0 - self.steps_per_s / self.steps_per_s_alone) if self.steps_per_s_alone else 0.0


@dataclass(frozen=True)
class Counts:
    """What one save and one load did, in counts that do not depend on the clock; of all ranks together.

    Attributes:
        calls: system calls on files of the checkpoint during the save, by name.
        written_bytes: by those calls.
        synced_bytes: of them, those that a later fsync of the same file made durable.
        num_unsynced_files: files of the checkpoint with bytes that no fsync followed.
        collectives: of the save, by name.
        num_copies: tensor copies in the save's own threads, as the dispatcher sees them.
    """

    calls: dict[str, int] = field(default_factory=dict)
    written_bytes: int = 0
    synced_bytes: int = 0
    num_unsynced_files: int = 0
    collectives: dict[str, int] = field(default_factory=dict)
    num_copies: int = 0


@dataclass
class Seen:
    """What was measured of one side so far; the lists hold one sample per round.

    Attributes:
        warm_up, memory: save and load of the rounds before the timed ones.
        counts: of a save under strace; None where there was none.
        no_counts_because: why.
        stored_bytes, num_files: of the checkpoint.
        failure: what the backend raised, or how it lost a rank; empty if nothing.
    """

    warm_up: tuple[CallSample, CallSample] | None = None
    memory: tuple[CallSample, CallSample] | None = None
    saves: list[CallSample] = field(default_factory=list)
    loads: list[CallSample] = field(default_factory=list)
    backgrounds: list[AsyncSample] = field(default_factory=list)
    counts: Counts | None = None
    no_counts_because: str = "it was not asked for"
    stored_bytes: int = 0
    num_files: int = 0
    failure: str = ""


def over_ranks(samples: Sequence[CallSample]) -> CallSample:
    """Returns one sample for all ranks: earliest start to latest end, the largest peak, all CPU time and bytes."""
    return CallSample(
        begin_s=min(sample.begin_s for sample in samples),
        end_s=max(sample.end_s for sample in samples),
        slowest_s=max(sample.seconds for sample in samples),
        data_begin_s=min(sample.data_begin_s for sample in samples),
        data_end_s=max(sample.data_end_s for sample in samples) if all(s.data_end_s for s in samples) else 0.0,
        cpu_s=sum(sample.cpu_s for sample in samples),
        peak_bytes=max(sample.peak_bytes for sample in samples),
        device_peak_bytes=max(sample.device_peak_bytes for sample in samples),
        storage_read_bytes=sum(sample.storage_read_bytes for sample in samples),
        resident_share=max(sample.resident_share for sample in samples),
        fault=next((sample.fault for sample in samples if sample.fault), ""),
    )


def async_over_ranks(samples: Sequence[AsyncSample]) -> AsyncSample:
    """Returns one sample for all ranks: the longest blocking, the latest end, the slowest training loop."""
    slowest = max(samples, key=lambda sample: sample.interference)
    return AsyncSample(
        begin_s=min(sample.begin_s for sample in samples),
        end_s=max(sample.end_s for sample in samples),
        blocking_s=max(sample.blocking_s for sample in samples),
        steps_per_s=slowest.steps_per_s,
        steps_per_s_alone=slowest.steps_per_s_alone,
    )
