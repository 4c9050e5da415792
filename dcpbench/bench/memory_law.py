"""Memory laws: does the peak of a save depend on what a rank holds, or on the whole? Fitted over a sweep.

    peak = a + b x local bytes + c x global bytes

A backend whose c is not near zero cannot save a state that no single machine holds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcpbench.bench.group import Group, Rounds, measure_group
from dcpbench.bench.workloads import fitted
from dcpbench.ranks.pool import RankPool

__all__ = ["Law", "MemoryPoint", "fit", "measure_laws"]

_MIB = 1 << 20
_SIZES_MIB = (8, 16, 32, 64)
_WORLD_SIZES = (1, 2, 4)
_SLACK_BYTES = 2 * _MIB


@dataclass(frozen=True)
class MemoryPoint:
    """One measured peak, in bytes: of ``world_size`` ranks, the one with the highest."""

    world_size: int
    local_bytes: int
    global_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Law:
    """What was fitted.

    Attributes:
        base_bytes, per_local, per_global: a, b and c.
        outliers: points further away than 2 MiB and 5 % of their peak.
    """

    base_bytes: float
    per_local: float
    per_global: float
    outliers: tuple[MemoryPoint, ...]

    @property
    def is_local(self) -> bool:
        """Reads as: the size of the whole adds less than 2 % of it to the peak."""
        return abs(self.per_global) < 0.02


def fit(points: Sequence[MemoryPoint]) -> Law:
    """Returns the law by least squares; points must differ in local and in global bytes."""
    columns = np.array([[1.0, point.local_bytes, point.global_bytes] for point in points])
    peaks = np.array([float(point.peak_bytes) for point in points])
    scale = np.array([1.0, _MIB, _MIB])  # columns of one order of magnitude
    found, *_ = np.linalg.lstsq(columns / scale, peaks, rcond=None)
    away = np.abs(columns / scale @ found - peaks)
    outliers = tuple(
        point
        for point, distance in zip(points, away, strict=True)
        if distance > max(_SLACK_BYTES, 0.05 * point.peak_bytes)
    )
    base, per_local, per_global = (found / scale).tolist()
    return Law(base, per_local, per_global, outliers)


def measure_laws(backends: tuple[str, ...], storage: Path) -> Iterator[str]:
    """Yields the law of a save and of a load by each backend, as lines."""
    points: dict[tuple[str, str], list[MemoryPoint]] = {}
    rounds = Rounds(timed=1, is_cold=False, with_async=False, with_counts=False)
    with (
        tempfile.TemporaryDirectory(prefix="dcpbench-", dir=storage) as folder,
        RankPool(max(_WORLD_SIZES)) as pool,
    ):
        for world_size in _WORLD_SIZES:
            for size in _SIZES_MIB:
                group = Group(fitted("few-huge", size * _MIB), "fsdp2", world_size, world_size, backends)
                for row in measure_group(pool, group, rounds, Path(folder), lambda _: None):
                    if row.save_peak_bytes is None or row.load_peak_bytes is None:
                        yield f"{row.backend}: {row.reason}"
                        continue
                    for action, peak in (("save", row.save_peak_bytes), ("load", row.load_peak_bytes)):
                        point = MemoryPoint(world_size, row.local_bytes, row.state_bytes, peak)
                        points.setdefault((row.backend, action), []).append(point)
    for (backend, action), own in points.items():
        yield from _lines(backend, action, fit(own))


def _lines(backend: str, action: str, law: Law) -> Iterator[str]:
    kind = "independent of the global size" if law.is_local else "GROWS WITH THE GLOBAL SIZE"
    yield (
        f"{backend} {action}: peak = {law.base_bytes / _MIB:.1f} MiB + {law.per_local:.3f} x local "
        f"+ {law.per_global:.3f} x global: {kind}"
    )
    for point in law.outliers:
        yield (
            f"  outlier: {point.peak_bytes / _MIB:.1f} MiB with {point.local_bytes / _MIB:.0f} of "
            f"{point.global_bytes / _MIB:.0f} MiB on each of {point.world_size} ranks"
        )
