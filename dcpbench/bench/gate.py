"""Counters as gates: what small saves do in system calls, bytes, collectives and copies, beside what they are to do.

None of it depends on the clock, so that a change of any of it is a change of the code, and CI may fail on it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from dcpbench.bench.group import Group, Rounds, measure_group
from dcpbench.bench.row import Row
from dcpbench.bench.workloads import workload
from dcpbench.errors import DcpbenchError, MalformedFile
from dcpbench.ranks.pool import RankPool

__all__ = ["CASES", "differences", "measure_counters", "read_counters", "write_counters"]

CASES = (("many-small", 0.0005, "fsdp2"), ("few-huge", 1e-6, "hsdp"))
"""Workload, scale and layout; two ranks each, torch and the reference."""

_COUNTERS = (
    *("stored_bytes", "written_bytes", "synced_bytes", "num_files"),
    *("num_storage_calls", "num_sync_calls", "num_collectives", "num_copies"),
)

_PATH_LENGTH, _PATH_DEPTH = 200, 16
"""Characters and parts of the path that checkpoints are saved below: some backends store it, whole or in parts."""

Counters = dict[str, dict[str, int]]


def measure_counters(backends: tuple[str, ...] = ("torch", "reference")) -> Counters:
    """Returns the counters of a save by each backend in each case.

    Raises:
        DcpbenchError: a backend failed, or calls cannot be counted here.
    """
    rounds = Rounds(timed=1, is_cold=False, with_async=False)
    found: Counters = {}
    with tempfile.TemporaryDirectory(prefix="dcpbench-") as storage, RankPool(2) as pool:
        for name, scale, layout in CASES:
            group = Group(workload(name, scale), layout, 2, 2, backends)
            for row in measure_group(pool, group, rounds, _like_everywhere(Path(storage)), lambda _: None):
                found[f"{row.backend} {name} {layout}"] = _counters_of(row)
    return found


def differences(wanted: Mapping[str, Mapping[str, int]], found: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Returns a line for each counter that is not as it is to be; none where all are."""
    return list(_differences(wanted, found))


def read_counters(path: Path) -> Counters:
    """Reads what :func:`write_counters` wrote.

    Raises:
        MalformedFile: it is no such file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(case): {str(k): int(v) for k, v in counts.items()} for case, counts in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise MalformedFile(str(path), "expected counters. Make it with: dcpbench bench counters --write.") from error


def write_counters(found: Counters, path: Path) -> None:
    """Writes counters to a JSON file."""
    path.write_text(f"{json.dumps(found, indent=1, sort_keys=True)}\n", encoding="utf-8")


def _like_everywhere(folder: Path) -> Path:
    """Returns a folder below this one whose path is as long and as deep on each machine."""
    while len(folder.parts) < _PATH_DEPTH - 1:
        folder /= str(len(folder.parts))  # no two alike: a pickle stores those once
    num_left = _PATH_LENGTH - len(str(folder)) - 1
    if len(folder.parts) != _PATH_DEPTH - 1 or num_left < 1:
        raise DcpbenchError(f"Expected a shorter path for temporary files but got {folder}. Set TMPDIR, to /tmp say.")
    folder /= "x" * num_left
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _counters_of(row: Row) -> dict[str, int]:
    if row.num_storage_calls is None:  # a save that is not durable has counters too
        raise DcpbenchError(f"Counters of {row.backend} cannot be taken: {row.reason}")
    return {name: getattr(row, name) for name in _COUNTERS}


def _differences(wanted: Mapping[str, Mapping[str, int]], found: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for case in sorted({*wanted, *found}):
        if case not in found or case not in wanted:
            yield f"{case}: {'not measured' if case in wanted else 'not expected'}"
            continue
        for name, number in wanted[case].items():
            if found[case].get(name) != number:
                yield f"{case}: {name} is {found[case].get(name):,}, expected {number:,}"
