"""The table at the end of a run, and the file beside it. Runs in the controller."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from dcpbench.bench.record import Record, as_frame, write_frame
from dcpbench.suite_session import SuiteSession

__all__ = ["summary_lines", "write_records"]


def summary_lines(suite: SuiteSession) -> Iterator[str]:
    """Yields the lines of the summary: cases by test and backend, speed and memory, known defects."""
    frame = as_frame(Record(**row) for row in suite.rows)
    yield from _table(suite, frame).to_string(index=False, justify="right").splitlines()
    for (backend, name), number in sorted(suite.known.items()):
        defect = next((d for d in suite.defects.get(backend, ()) if d.id == name), None)
        sentence = f": {defect.sentence}" if defect else ""
        yield f"known defect of {backend}, seen {number} times: {name}{sentence}"
    for backend, name in suite.unmatched():
        yield f"known defect of {backend} that no case of this run met: {name}; draw more cases, or narrow its facts"
    num_cases, num_explained = sum(suite.counts.values()), sum(suite.known.values())
    yield f"{num_cases} cases judged; {len(suite.known)} known defects seen, {num_explained} findings explained by them"
    if suite.first_verdict_s is not None:
        yield f"first verdict after {suite.first_verdict_s:.1f} s"


def _table(suite: SuiteSession, frame: pd.DataFrame) -> pd.DataFrame:
    """Returns a row per test and backend. Times are medians over round trips of the slowest rank."""
    rows = []
    pairs = sorted({(test, backend) for test, backend, _ in suite.counts})
    shown = frame.assign(
        backend=frame["save_backend"].where(
            frame["save_backend"] == frame["load_backend"], frame["save_backend"] + " to " + frame["load_backend"]
        )
    )
    for test, backend in pairs:
        by_status = {s: n for (t, b, s), n in suite.counts.items() if (t, b) == (test, backend)}
        trips = shown[(shown["test"] == test) & (shown["backend"] == backend)]
        rows.append(
            {
                "test": test.removeprefix("test_"),
                "backend": backend,
                "cases": sum(by_status.values()),
                "pass": by_status.get("PASS", 0),
                "known": by_status.get("KNOWN", 0),
                "fail": by_status.get("FAIL", 0),
                "unknown": by_status.get("UNKNOWN", 0),
                "n/a": by_status.get("UNSUPPORTED", 0),
                "save ms": _median(trips["save_s"], 1e3),
                "load ms": _median(trips["load_s"], 1e3),
                "peak MiB": "-"
                if trips.empty
                else f"{trips[['save_peak_bytes', 'load_peak_bytes']].max().max() / 2**20:.1f}",
            }
        )
    return pd.DataFrame(rows)


def _median(column: pd.Series, factor: float) -> str:
    return "-" if column.empty else f"{column.median() * factor:.1f}"


def write_records(suite: SuiteSession) -> Path:
    """Writes the records of a run to a Parquet file of its own under the results folder and returns its path."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    path = suite.settings.results / f"suites-{stamp}-{os.getpid()}.parquet"
    write_frame(as_frame(Record(**row) for row in suite.rows), path)
    return path
