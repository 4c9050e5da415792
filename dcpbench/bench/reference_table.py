"""How the figures of `dcpbench bench reference` are printed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from dcpbench.bench.figures import Figures, Sample, Workload

__all__ = ["planning_lines", "read_lines", "run_lines"]

_MIB = 1 << 20
_COLUMN = 19
_MAX_RESIDENT_SHARE = 0.01


def run_lines(figures: Figures, workload: Workload, place: str) -> Iterator[str]:
    """Yields the table of one workload in one place: a line per action and side."""
    each = workload.tensor_bytes
    size = f"{each >> 20} MiB" if each >= _MIB else f"{each >> 10} KiB"
    cold = f", {_coldness(figures, workload.name)}" if place == "disk" else ""
    yield f"\n{place}: {workload.num_tensors:,} tensors of {size}, {workload.num_bytes // _MIB:,} MiB{cold}"
    titles = ("seconds", "of raw", "data path of raw", "times torch")
    yield f"  {'':<14} {''.join(f'{title:<{_COLUMN}}' for title in titles)}{'planning':<10} peak"
    for action in ("save", "load"):
        for side in ("raw", "torch", "reference"):
            yield f"  {action} {side:<9} {_cells(figures, place, workload.name, side, action)}"


def _coldness(figures: Figures, workload: str) -> str:
    """Returns whether loads came from disk, as the pages that were in memory before them tell."""
    shares = [
        sample.resident_share
        for side in ("raw", "torch", "reference")
        for sample in figures.timed("disk", workload, side, "load")
    ]
    if max(shares) <= _MAX_RESIDENT_SHARE:
        return "loads from disk, not from the page cache"
    return f"loads INVALID: up to {max(shares):.0%} of the files stayed in memory"


def _cells(figures: Figures, place: str, workload: str, side: str, action: str) -> str:
    samples = figures.timed(place, workload, side, action)
    cells = [f"{_median_s(samples):.3f}"]
    if side != "raw":
        cells.append(str(figures.of_raw(place, workload, side, action)))
        cells.append(str(figures.of_raw_data(place, workload, side, action)))
    if side == "reference":
        cells.append(str(figures.times_torch(place, workload, action)))
    cells += [""] * (4 - len(cells))
    planning = f"{statistics.median(s.planning_s for s in samples) * 1e3:.0f} ms" if side != "raw" else ""
    peak = max(sample.peak_bytes for sample in figures.samples[place, workload, side, action])
    return f"{''.join(f'{cell:<{_COLUMN}}' for cell in cells)}{planning:<10} {peak / _MIB:.1f} MiB"


def _median_s(samples: list[Sample]) -> float:
    return statistics.median(sample.seconds for sample in samples)


def read_lines(figures: Figures) -> Iterator[str]:
    """Yields what was read to load a quarter of each tensor."""
    yield "\nbytes read by system calls to load a quarter of each tensor, over a quarter of the bytes"
    runs = {workload.name: workload.quarter_run_bytes for workload in figures.workloads}
    for (workload, side, dim), share in figures.quarters.items():
        yield f"  {workload}, along dim {dim}, {runs[workload][dim]:,} bytes in a row: {side:<9} {share:.3f}"


def planning_lines(figures: Figures) -> Iterator[str]:
    """Yields the times to plan a load, the best of all rounds."""
    yield "\nplanning a load, per tensor"
    for (side, destination, chunks, tensors), plans in figures.plans.items():
        plan_ms, decode_ms = (
            min(times) * 1e3 / tensors for times in zip(*((p.plan_s, p.decode_s) for p in plans), strict=True)
        )
        items = plans[0].num_items // tensors
        yield (
            f"  {chunks:>6} chunks to {destination:<14} {side:<9} {plan_ms:>10.3f} ms for {items:>6} items; "
            f"metadata decoded in {decode_ms:.3f} ms"
        )
