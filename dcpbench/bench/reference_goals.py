"""The goals for the reference's speed and memory, held against what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dcpbench.bench.figures import Figures, Workload
from dcpbench.bench.goals import Goal, at_least, at_most
from dcpbench.bench.power_law import fit

__all__ = ["goals_of"]

_MIB = 1 << 20
_WORLD_SIZE = 2
_OF_RAW = {("small", "save"): 0.75, ("small", "load"): 0.4, ("large", "save"): 0.95, ("large", "load"): 0.8}
_DATA_OF_RAW = {("small", "save"): 0.9, ("small", "load"): 0.9}
_TIMES_TORCH = {("small", "save"): 2.5, ("small", "load"): 6.0, ("large", "load"): 3.0}
_MIN_PLANNING_RATIO = 20.0
_PAGE_BYTES = 4096


def goals_of(figures: Figures) -> list[Goal]:
    """Returns every goal with the median of what was measured."""
    goals: list[Goal] = []
    for workload in figures.workloads:
        for place in figures.places:
            goals += _speed(figures, workload, place)
    for workload in figures.workloads:
        goals += _memory(figures, workload)
    runs = {workload.name: workload.quarter_run_bytes for workload in figures.workloads}
    for (workload_name, side, dim), share in figures.quarters.items():
        # Below a page, bytes left out are neither fewer on the disk nor fewer system calls.
        if side == "reference" and runs[workload_name][dim] >= _PAGE_BYTES:
            goals.append(
                at_most(f"{workload_name} bytes read for a quarter along dim {dim}", share, 1.1, note="over a quarter")
            )
    return [*goals, *_planning(figures)]


def _speed(figures: Figures, workload: Workload, place: str) -> Iterator[Goal]:
    for action in ("save", "load"):
        key = (workload.name, action)
        at = f"{workload.name} {action}, {place}"
        raw_over_torch = 1 / figures.of_raw(place, workload.name, "torch", action).median
        if key in _OF_RAW:
            value = figures.of_raw(place, workload.name, "reference", action).median
            yield at_least(f"{at}: of raw", value, _OF_RAW[key])
        if key in _DATA_OF_RAW:
            value = figures.of_raw_data(place, workload.name, "reference", action).median
            yield at_least(f"{at}: data path of raw", value, _DATA_OF_RAW[key])
        if key in _TIMES_TORCH:
            limit = _TIMES_TORCH[key]
            note = f"raw itself is {raw_over_torch:.2g} times torch" if raw_over_torch < limit else ""
            yield at_least(
                f"{at}: times torch", figures.times_torch(place, workload.name, action).median, limit, note=note
            )


def _memory(figures: Figures, workload: Workload) -> Iterator[Goal]:
    # The state is whole tensors, so that the metadata has a chunk for each.
    allowed = 16 * _MIB + workload.num_bytes / _WORLD_SIZE / 100 + 4096 * workload.num_tensors
    for action in ("save", "load"):
        peak = figures.peak_bytes(workload.name, "reference", action)
        yield at_most(f"{workload.name} {action}: peak beyond the state", peak / _MIB, allowed / _MIB, "MiB")


def _planning(figures: Figures) -> Iterator[Goal]:
    best = {key: min(planned.plan_s for planned in plans) for key, plans in figures.plans.items()}
    for (side, destination, chunks, tensors), seconds in best.items():
        if side == "torch":
            ratio = seconds / best["reference", destination, chunks, tensors]
            yield at_least(f"planning, {chunks} chunks, {destination}: times torch", ratio, _MIN_PLANNING_RATIO)
    points = {
        chunks: seconds
        for (side, destination, chunks, _), seconds in sorted(best.items(), key=lambda entry: entry[0][2])
        if (side, destination) == ("reference", "as many boxes")
    }
    limit = fit({chunks: chunks * math.log(chunks) for chunks in points}).exponent
    yield at_most(
        "planning: exponent in the number of chunks", fit(points).exponent, limit, "", note="n log n has the limit"
    )
