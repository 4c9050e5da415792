"""Two runs of the benchmark, compared row by row: what got slower, larger, or does more than before. Pure.

Runs of different nights share no disturbance, so that times are compared as shares of the raw limit of the same round;
within one run, backends are compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dcpbench.bench.row import Row, key_of
from dcpbench.bench.stats import Comparison, Verdict, compare_paired, compare_unpaired, holm, verdict_of
from dcpbench.bench.store import Run
from dcpbench.errors import UsageError

__all__ = ["Change", "Compared", "compare_backends", "compare_runs", "exit_code", "lines_of"]

_COUNTERS = ("stored_bytes", "written_bytes", "num_files", "num_storage_calls", "num_sync_calls", "num_collectives")
_PEAKS = ("save_peak_bytes", "load_peak_bytes")
_PEAK_SLACK_BYTES = 2 << 20
_TIMES = (("save", "save_s", "raw_write_s"), ("load", "load_s", "raw_read_s"))


@dataclass(frozen=True)
class Compared:
    """One time of one row on two sides.

    Attributes:
        where: backend, workload and layout.
        action: ``save`` or ``load``.
        comparison: of the second side with the first.
        p: of its test, corrected for the number of comparisons.
    """

    where: str
    action: str
    comparison: Comparison
    p: float
    verdict: Verdict


@dataclass(frozen=True)
class Change:
    """Something that does not depend on the clock and is not as it was."""

    where: str
    text: str
    is_worse: bool


def compare_runs(
    first: Run, second: Run, *, alpha: float = 0.01, margin: float = 0.03
) -> tuple[list[Compared], list[Change]]:
    """Returns what the times and the counters of ``second`` say beside ``first``.

    Raises:
        UsageError: they are of different machines, file systems or workloads.
    """
    _refuse(first, second)
    earlier = {key_of(row): row for row in first.rows}
    pairs = [(earlier[key_of(row)], row) for row in second.rows if key_of(row) in earlier]
    times = [
        (_where(new), action, compare_unpaired(_of_raw(old, own, raw), _of_raw(new, own, raw), alpha=alpha))
        for old, new in pairs
        if old.status == new.status == "VALID"
        for action, own, raw in _TIMES
    ]
    return _judged(times, alpha, margin), [change for old, new in pairs for change in _changes(old, new)]


def compare_backends(run: Run, first: str, second: str, *, alpha: float = 0.01, margin: float = 0.03) -> list[Compared]:
    """Returns what the rounds of one run say of two of its backends, which were measured in turns.

    Raises:
        UsageError: the run has no rows of one of them.
    """
    for backend in (first, second):
        if not any(row.backend == backend for row in run.rows):
            known = ", ".join(sorted({row.backend for row in run.rows}))
            raise UsageError(f"Expected a backend of {run.name} but got {backend!r}. Give one of {known}.")
    earlier = {key_of(row)[1:]: row for row in run.rows if row.backend == first}
    times = [
        (_where(new), action, compare_paired(getattr(old, own), getattr(new, own), alpha=alpha))
        for new in run.rows
        if new.backend == second and (old := earlier.get(key_of(new)[1:])) is not None
        if old.status == new.status == "VALID"
        for action, own, _ in _TIMES
    ]
    return _judged(times, alpha, margin)


def exit_code(compared: Sequence[Compared], changes: Sequence[Change], *, is_strict: bool) -> Literal[0, 1, 3]:
    """Returns 1 if anything is slower or worse, 3 if that cannot be told and must be, else 0."""
    if any(one.verdict == "slower" for one in compared) or any(change.is_worse for change in changes):
        return 1
    return 3 if is_strict and any(one.verdict == "cannot tell" for one in compared) else 0


def lines_of(compared: Sequence[Compared], changes: Sequence[Change]) -> Iterator[str]:
    """Yields a table for the terminal."""
    width = max((len(one.where) for one in compared), default=0)
    yield f"{'':<{width}}  {'':<5} {'ratio of times':<25} {'p':>8}  {'detectable':>10}  verdict"
    for one in compared:
        seen = one.comparison
        ratio = f"{seen.ratio:.3f} ({seen.low:.3f} .. {seen.high:.3f})"
        found = f"{seen.detectable - 1:.1%}"
        yield f"{one.where:<{width}}  {one.action:<5} {ratio:<25} {one.p:>8.2g}  {found:>10}  {one.verdict}"
    for change in changes:
        yield f"{change.where}: {change.text}{' (worse)' if change.is_worse else ''}"


def _refuse(first: Run, second: Run) -> None:
    one, other = (run.manifest.get("machine", {}).get("id") for run in (first, second))
    if one != other:
        raise UsageError(f"Expected two runs of one machine but got {one} and {other}. Compare runs of the same one.")
    one, other = (run.manifest.get("file_system") for run in (first, second))
    if one != other:
        raise UsageError(f"Expected one kind of file system but got {one} and {other}. Give the same --storage.")
    for name, known in first.manifest.get("workloads", {}).items():
        found = second.manifest.get("workloads", {}).get(name)
        if found is not None and found["digest"] != known["digest"]:
            raise UsageError(
                f"Expected the same workload {name} but its digests are {known['digest']} and {found['digest']}. "
                "Give the same --size or --scale."
            )
    if not {key_of(row) for row in first.rows} & {key_of(row) for row in second.rows}:
        raise UsageError("Expected runs with rows in common but there are none. Measure the same cases.")


def _judged(times: list[tuple[str, str, Comparison]], alpha: float, margin: float) -> list[Compared]:
    corrected = holm([comparison.p for *_, comparison in times])
    return [
        Compared(where, action, comparison, p, verdict_of(comparison, p, alpha=alpha, margin=margin))
        for (where, action, comparison), p in zip(times, corrected, strict=True)
    ]


def _of_raw(row: Row, own: str, raw: str) -> list[float]:
    return [one / limit for one, limit in zip(getattr(row, own), getattr(row, raw), strict=True)]


def _changes(old: Row, new: Row) -> Iterator[Change]:
    if old.status == "VALID" and new.status != "VALID":
        yield Change(_where(new), f"was VALID, is {new.status}: {new.reason}", True)
        return
    for name in _COUNTERS:
        before, after = getattr(old, name), getattr(new, name)
        if before != after and before is not None and after is not None:
            yield Change(_where(new), f"{name} was {before:,}, is {after:,}", after > before)
    for name in _PEAKS:
        before, after = getattr(old, name), getattr(new, name)
        if before is not None and after is not None and abs(after - before) > max(_PEAK_SLACK_BYTES, before // 20):
            yield Change(_where(new), f"{name} was {before >> 20:,} MiB, is {after >> 20:,} MiB", after > before)


def _where(row: Row) -> str:
    loaded = "" if row.load_world_size == row.world_size else f" to {row.load_world_size}"
    return f"{row.backend} {row.workload} {row.layout} x{row.world_size}{loaded}"
