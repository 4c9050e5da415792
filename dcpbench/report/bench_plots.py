"""The plots of a benchmark report: which figures go into which. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dcpbench.bench.row import Row
from dcpbench.bench.store import Run
from dcpbench.report import svg

__all__ = ["PARTS", "Plot", "colours_of", "history", "memory", "scaling", "split", "throughput"]

_GIB, _MIB = 1 << 30, 1 << 20
_PALETTE = ("#3b78e7", "#d9730d", "#7a7f87", "#12988a", "#a652bb", "#c23b5e", "#7c8a1f", "#5a5fd0")
PARTS = (("planning", "#5a5fd0"), ("data path", "#12988a"), ("commit", "#d9730d"))
"""The parts of a save and their colours."""


@dataclass(frozen=True)
class Plot:
    """A plot with the line above it."""

    title: str
    image: str


def colours_of(backends: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each backend."""
    return {name: _PALETTE[number % len(_PALETTE)] for number, name in enumerate(dict.fromkeys(backends))}


def throughput(rows: Sequence[Row], colours: Mapping[str, str]) -> Iterator[Plot]:
    """Yields a plot per workload and layout and action: GiB/s of each backend, from its slowest to its best round."""
    for name, group in _groups(rows).items():
        for action in ("save", "load"):
            bars = [
                _bar(row, sorted(s)) for row in group if (s := getattr(row, f"{action}_s")) and row.status != "FAIL"
            ]
            raw: list[float] = next(
                (getattr(r, f"raw_{_RAW[action]}_s") for r in group if getattr(r, f"raw_{_RAW[action]}_s")), []
            )
            limit = f", raw {_rate(group[0], sorted(raw)[len(raw) // 2]):.3g}" if raw else ""
            if bars:
                title = f"{action}, GiB/s{limit}: {name}"
                yield Plot(title, svg.bars(bars, colours, title))


def split(rows: Sequence[Row]) -> Iterator[Plot]:
    """Yields a plot per workload and layout: what a save spends its time on, by backend."""
    for name, group in _groups(rows).items():
        parts = {
            row.backend: (row.save_planning_s, row.save_data_s, row.save_commit_s)
            for row in group
            if row.median_save_s is not None
        }
        if parts:
            yield Plot(name, svg.stacks(parts, [colour for _, colour in PARTS], f"split of a save, {name}", "s"))


def memory(rows: Sequence[Row], colours: Mapping[str, str]) -> Iterator[Plot]:
    """Yields a plot per action: peak beyond the state against what a rank holds."""
    for action in ("save", "load"):
        points = [
            svg.Point(
                row.local_bytes / _MIB,
                peak / _MIB,
                row.backend,
                f"{row.backend}, {row.workload}, {row.layout}: {peak / _MIB:.1f} MiB",
            )
            for row in rows
            if (peak := getattr(row, f"{action}_peak_bytes")) is not None
        ]
        if points:
            yield Plot(action, svg.scatter(points, colours, f"peak of a {action}", ("MiB held", "MiB peak")))


def scaling(rows: Sequence[Row], colours: Mapping[str, str]) -> Iterator[Plot]:
    """Yields a plot per workload and layout that was measured with several numbers of ranks."""
    for name in dict.fromkeys((row.workload, row.layout) for row in rows):
        own = [row for row in rows if (row.workload, row.layout) == name and row.save_gib_per_s is not None]
        if len({row.world_size for row in own}) > 1:
            points = [
                svg.Point(row.world_size, row.save_gib_per_s or 0.0, row.backend, f"{row.backend}: {row.world_size}")
                for row in own
            ]
            title = f"{name[0]}, {name[1]}"
            yield Plot(title, svg.lines(points, colours, f"scaling of {title}", ("ranks", "save GiB/s")))


def history(runs: Sequence[Run], colours: Mapping[str, str]) -> Iterator[Plot]:
    """Yields a plot per action: the share of the raw limit from run to run, over all workloads as geometric mean."""
    for action in ("save", "load"):
        points = []
        for number, run in enumerate(runs, 1):
            for backend in colours:
                shares = [
                    share
                    for row in run.rows
                    if row.backend == backend and row.status == "VALID" and (share := getattr(row, f"{action}_of_raw"))
                ]
                if shares:
                    mean = math.exp(sum(map(math.log, shares)) / len(shares))
                    points.append(svg.Point(number, 100 * mean, backend, f"{backend}, {run.name}: {mean:.1%}"))
        if points:
            yield Plot(action, svg.lines(points, colours, f"history of {action}", ("run", "% of raw")))


def _bar(row: Row, seconds: Sequence[float]) -> svg.Bar:
    """Returns the bar of a row; ``seconds`` ascend."""
    value = _rate(row, seconds[len(seconds) // 2])
    is_valid = row.status == "VALID"
    text = f"{value:.3g}" if is_valid else f"{value:.3g} invalid"
    low, high = _rate(row, seconds[-1]), _rate(row, seconds[0])
    return svg.Bar(row.backend, row.backend, value, low, high, text, is_pale=not is_valid)


_RAW = {"save": "write", "load": "read"}


def _rate(row: Row, seconds: float) -> float:
    return row.state_bytes / seconds / _GIB


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        ranks = (
            str(row.world_size)
            if row.world_size == row.load_world_size
            else (f"{row.world_size} to {row.load_world_size}")
        )
        groups.setdefault(f"{row.workload}, {row.layout}, ranks {ranks}", []).append(row)
    return groups
