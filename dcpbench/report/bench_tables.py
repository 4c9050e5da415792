"""Benchmark rows as text: a table for the terminal, Markdown for a job summary, CSV."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dcpbench.bench.row import Row
from dcpbench.bench.store import Run

__all__ = ["COLUMNS", "Column", "as_csv", "as_markdown", "frame_of", "setting_of", "terminal_line", "terminal_title"]

_MIB = 1 << 20


@dataclass(frozen=True)
class Column:
    """A column of the tables that people read.

    Attributes:
        title: with the unit.
        value: what it is sorted by; None where there is none.
        text: how a value is shown.
    """

    title: str
    value: Callable[[Row], Any]
    text: Callable[[Any], str] = str
    is_number: bool = True


def _fixed(digits: int, factor: float = 1.0) -> Callable[[Any], str]:
    return lambda value: f"{value * factor:,.{digits}f}"


def _over(name: str, divisor: float) -> Callable[[Row], Any]:
    def value(row: Row) -> Any:
        found = getattr(row, name)
        return None if found is None else found / divisor

    return value


def _field(name: str) -> Callable[[Row], Any]:
    return lambda row: getattr(row, name)


def _median(name: str) -> Callable[[Row], Any]:
    return lambda row: float(pd.Series(getattr(row, name)).median()) if getattr(row, name) else None


def _ranks(row: Row) -> str:
    same = row.world_size == row.load_world_size
    return str(row.world_size) if same else f"{row.world_size} to {row.load_world_size}"


COLUMNS = (
    Column("workload", _field("workload"), is_number=False),
    Column("layout", _field("layout"), is_number=False),
    Column("ranks", _ranks, is_number=False),
    Column("backend", _field("backend"), is_number=False),
    Column("status", _field("status"), is_number=False),
    Column("state MiB", _over("state_bytes", _MIB), _fixed(0)),
    Column("save s", _field("median_save_s"), _fixed(3)),
    Column("save GiB/s", _field("save_gib_per_s"), _fixed(3)),
    Column("save of raw", _field("save_of_raw"), lambda value: f"{value:.0%}"),
    Column("load s", _field("median_load_s"), _fixed(3)),
    Column("load GiB/s", _field("load_gib_per_s"), _fixed(3)),
    Column("load of raw", _field("load_of_raw"), lambda value: f"{value:.0%}"),
    Column("blocking s", _median("async_blocking_s"), _fixed(3)),
    Column("durable s", _median("async_durable_s"), _fixed(3)),
    Column("interference", _field("interference"), lambda value: f"{value:.0%}"),
    Column("save peak MiB", _over("save_peak_bytes", _MIB), _fixed(1)),
    Column("load peak MiB", _over("load_peak_bytes", _MIB), _fixed(1)),
    Column("save CPU s", _field("save_cpu_s"), _fixed(2)),
    Column("files", _field("num_files"), _fixed(0)),
    Column("amplification", _field("write_amplification"), _fixed(3)),
    Column("goodput", _field("goodput"), lambda value: f"{value:.4%}"),
)

_TERMINAL = (
    *("workload", "layout", "ranks", "backend", "save s", "save of raw", "load s", "load of raw"),
    *("blocking s", "durable s", "save peak MiB", "load peak MiB", "status"),
)
_WIDTHS = {"workload": 26, "layout": 6, "ranks": 6, "backend": 12}


def terminal_title() -> str:
    """Returns the line above :func:`terminal_line`."""
    return _line([(column, column.title) for column in _shown()])


def terminal_line(row: Row) -> str:
    """Returns one row, with the reason behind it where it is not VALID."""
    line = _line([(column, shown(column, row)) for column in _shown()])
    return f"{line}: {row.reason}" if row.reason else line


def shown(column: Column, row: Row) -> str:
    """Returns a cell; ``-`` where nothing was measured."""
    value = column.value(row)
    return "-" if value is None else column.text(value)


def as_markdown(run: Run, more: Sequence[str] = ()) -> str:
    """Returns the run for a job summary; ``more`` are further lines."""
    lines = [f"# dcpbench: {run.name}", "", f"{setting_of(run)}.", ""]
    lines.append(f"| {' | '.join(column.title for column in COLUMNS)} |")
    lines.append("|" + "".join(" ---: |" if column.is_number else " --- |" for column in COLUMNS))
    lines += [f"| {' | '.join(shown(column, row) for column in COLUMNS)} |" for row in run.rows]
    reasons = [f"- **{r.status}** {r.backend}, {r.workload}, {r.layout}: {r.reason}" for r in run.rows if r.reason]
    if reasons:
        lines += ["", "## Not valid", "", *reasons]
    return "\n".join([*lines, *more]) + "\n"


def as_csv(run: Run) -> str:
    """Returns every column of every row; lists are joined by spaces."""
    frame = frame_of(run)
    for name in frame.columns:
        if frame[name].map(lambda value: isinstance(value, list)).any():
            frame[name] = frame[name].map(lambda value: " ".join(map(str, value)))
    return str(frame.to_csv(index=False))


def frame_of(run: Run) -> pd.DataFrame:
    """Returns the rows as a frame, with the columns of :class:`Row` also where there are none."""
    names = [field.name for field in dataclasses.fields(Row)]
    return pd.DataFrame([dataclasses.asdict(row) for row in run.rows], columns=names)


def setting_of(run: Run) -> str:
    """Returns machine, versions and options in one sentence without its full stop."""
    manifest, machine = run.manifest, run.manifest["machine"]
    found = [
        f"{machine['cpu']}, {machine['num_cores']} cores, {machine['memory_gib']} GiB, {manifest['file_system']}",
        f"torch {manifest['versions'].get('torch', '?')}",
        f"dcpbench {manifest['dcpbench']} {manifest['commit']}".rstrip(),
        f"{manifest['options']['rounds']['timed']} rounds, {manifest['started_at']}",
        *([] if manifest["is_complete"] else [f"cut off after {len(run.rows)} of {manifest['num_rows_planned']} rows"]),
    ]
    return "; ".join(found)


def _shown() -> list[Column]:
    by_title = {column.title: column for column in COLUMNS}
    return [by_title[title] for title in _TERMINAL]


def _line(cells: list[tuple[Column, str]]) -> str:
    parts = []
    for column, text in cells:
        width = _WIDTHS.get(column.title, len(column.title))
        parts.append(f"{text:>{width}}" if column.is_number else f"{text:<{width}}")
    return "  ".join(parts).rstrip()
