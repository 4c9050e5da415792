"""What a benchmark beside the raw limit measured: on ranks, and put together in the controller. Plain data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Figures", "Planned", "Sample", "Spread", "Workload", "combined", "spread"]


@dataclass(frozen=True)
class Workload:
    """A state of many equal tensors; each rank holds its share of them whole.

    Attributes:
        name: for the table.
        num_tensors: over all ranks.
        tensor_bytes: of each; a multiple of 4 times ``num_columns``, float32.
        num_columns: of the matrix that each tensor is.
    """

    name: str
    num_tensors: int
    tensor_bytes: int
    num_columns: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.num_tensors * self.tensor_bytes

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of each tensor."""
        return self.tensor_bytes // 4 // self.num_columns, self.num_columns

    @property
    def quarter_run_bytes(self) -> tuple[int, int]:
        """Bytes that lie together in a quarter of a tensor, along dim 0 and along dim 1."""
        return self.tensor_bytes // 4, self.num_columns


@dataclass(frozen=True)
class Sample:
    """One call on one rank, or on all.

    Attributes:
        begin_s, end_s: of the call, on a clock that all ranks of a host share.
        data_begin_s, data_end_s: of the data path within it: from the first byte handed to the storage to the last.
        peak_bytes: by which resident memory rose during the call, at its highest.
        read_bytes: read by system calls during the call.
        resident_share: of the files' pages that were in memory before the call.
    """

    begin_s: float
    end_s: float
    data_begin_s: float
    data_end_s: float
    peak_bytes: int
    read_bytes: int
    resident_share: float

    @property
    def seconds(self) -> float:
        """From the start of the call to its end."""
        return self.end_s - self.begin_s

    @property
    def data_s(self) -> float:
        """Of the data path."""
        return self.data_end_s - self.data_begin_s

    @property
    def planning_s(self) -> float:
        """What is not data path: planning, agreeing, commit."""
        return self.seconds - self.data_s


def combined(samples: Sequence[Sample]) -> Sample:
    """Returns one sample for all ranks: earliest start to latest end, the largest peak, all bytes."""
    return Sample(
        begin_s=min(sample.begin_s for sample in samples),
        end_s=max(sample.end_s for sample in samples),
        data_begin_s=min(sample.data_begin_s for sample in samples),
        data_end_s=max(sample.data_end_s for sample in samples),
        peak_bytes=max(sample.peak_bytes for sample in samples),
        read_bytes=sum(sample.read_bytes for sample in samples),
        resident_share=max(sample.resident_share for sample in samples),
    )


@dataclass(frozen=True)
class Spread:
    """A figure of several rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Returns the median and the extremes of ``values``, of which there is at least one."""
    return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Planned:
    """What planning a load took.

    Attributes:
        decode_s: from the bytes of the metadata file to the metadata.
        plan_s: from there to a plan whose items were all looked at.
        num_items: of the plan.
    """

    decode_s: float
    plan_s: float
    num_items: int


@dataclass
class Figures:
    """All that one run measured.

    Attributes:
        workloads: what was saved and loaded.
        places: where, by name.
        crc32: what computes the reference's checksums.
        samples: (place, workload, side, action) -> one per round, over all ranks; the first is for memory alone.
        quarters: (workload, side, dim) -> bytes read by system calls over bytes asked for.
        plans: (side, destination, number of chunks, number of tensors) -> one per round.
    """

    workloads: list[Workload]
    places: list[str]
    crc32: str
    samples: dict[tuple[str, str, str, str], list[Sample]] = field(default_factory=dict)
    quarters: dict[tuple[str, str, int], float] = field(default_factory=dict)
    plans: dict[tuple[str, str, int, int], list[Planned]] = field(default_factory=dict)

    def timed(self, place: str, workload: str, side: str, action: str) -> list[Sample]:
        """Returns the samples whose times count."""
        return self.samples[place, workload, side, action][1:]

    def of_raw(self, place: str, workload: str, side: str, action: str) -> Spread:
        """Returns the share of the raw limit that a side reaches, round by round."""
        return self._ratio((place, workload, action), "raw", side, lambda sample: sample.seconds)

    def of_raw_data(self, place: str, workload: str, side: str, action: str) -> Spread:
        """Returns the same of the data path alone."""
        return self._ratio((place, workload, action), "raw", side, lambda sample: sample.data_s)

    def times_torch(self, place: str, workload: str, action: str) -> Spread:
        """Returns how many times faster than torch the reference is, round by round."""
        return self._ratio((place, workload, action), "torch", "reference", lambda sample: sample.seconds)

    def peak_bytes(self, workload: str, side: str, action: str) -> int:
        """Returns the highest peak beyond the state on any rank, in any place and round."""
        return max(
            sample.peak_bytes
            for (_, own, of, what), samples in self.samples.items()
            if (own, of, what) == (workload, side, action)
            for sample in samples
        )

    def _ratio(self, where: tuple[str, str, str], over: str, side: str, seconds: Callable[[Sample], float]) -> Spread:
        place, workload, action = where
        pairs = zip(self.timed(place, workload, over, action), self.timed(place, workload, side, action), strict=True)
        return spread([seconds(one) / seconds(other) for one, other in pairs])
