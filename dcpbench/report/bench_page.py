"""A benchmark run as one HTML page that needs nothing from elsewhere: plots, a table to sort and filter, the proofs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from dcpbench.bench.row import Row
from dcpbench.bench.store import Run
from dcpbench.report import bench_plots
from dcpbench.report.bench_plots import PARTS, Plot
from dcpbench.report.bench_style import SCRIPT, STYLE
from dcpbench.report.bench_tables import COLUMNS, Column, setting_of, shown
from dcpbench.report.comparison import compare_backends

__all__ = ["as_html"]


def as_html(run: Run, earlier: Sequence[Run] = ()) -> str:
    """Returns the page.

    Args:
        run: what it is about.
        earlier: runs of the same machine to draw the history from; the run itself may be among them.
    """
    runs = [*(one for one in earlier if one.folder.name < run.folder.name), run]
    body = "\n".join(_body(run, runs))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>dcpbench {escape(run.name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _body(run: Run, runs: Sequence[Run]) -> Iterator[str]:
    colours = bench_plots.colours_of([row.backend for one in reversed(runs) for row in one.rows])
    yield f"<h1>Checkpoint benchmark</h1>\n<p class='about'>{escape(setting_of(run))}.</p>"
    yield from _summary(run)
    yield _legend(((name, colour) for name, colour in colours.items()))
    yield from _plots(
        "Throughput",
        "Bars are medians; lines go from the slowest to the fastest round. A pale bar belongs to a row that is "
        "INVALID. The raw limit is what plain system calls "
        "reach with the same bytes, ranks and place in the same run.",
        bench_plots.throughput(run.rows, colours),
    )
    yield from _plots(
        "Where a save spends its time",
        "Until the storage is handed the first item, while it writes, and from there to the return.",
        bench_plots.split(run.rows),
        _legend(PARTS),
    )
    yield from _plots(
        "Memory",
        "Highest rise of a rank's resident memory during the call, against what the rank holds.",
        bench_plots.memory(run.rows, colours),
    )
    yield from _plots(
        "Scaling", "Throughput of a save against the number of ranks.", bench_plots.scaling(run.rows, colours)
    )
    if len(runs) > 1:
        yield from _plots(
            "History",
            f"Share of the raw limit over {len(runs)} runs, the latest at the right: geometric mean of valid rows.",
            bench_plots.history(runs, colours),
        )
    yield from _table(run.rows)
    yield from _proofs(run.rows)
    yield f"<h2>Made with</h2>\n<pre>{escape(json.dumps(run.manifest, indent=1))}</pre>"


def _summary(run: Run) -> Iterator[str]:
    counts = {status: sum(row.status == status for row in run.rows) for status in ("VALID", "INVALID", "FAIL")}
    yield "<p class='counts'>" + " ".join(
        f"<span class='badge {status}'>{number} {status}</span>" for status, number in counts.items() if number
    )
    yield "</p>"
    backends = list(dict.fromkeys(row.backend for row in run.rows))
    lines = []
    for other in backends[1:]:
        compared = compare_backends(run, other, backends[0])
        for action in ("save", "load"):
            own = [one for one in compared if one.action == action]
            ratios = sorted(one.comparison.ratio for one in own)
            if ratios:
                verdicts = ", ".join(f"{v} in {sum(o.verdict == v for o in own)}" for v in _VERDICTS)
                lines.append(
                    f"<li>{action}: <b>{escape(backends[0])}</b> takes {ratios[0]:.2f} to {ratios[-1]:.2f} times "
                    f"as long as <b>{escape(other)}</b> over {len(own)} cases ({verdicts})</li>"
                )
    yield f"<ul>{''.join(lines)}</ul>" if lines else ""


_VERDICTS = ("faster", "slower", "same", "cannot tell")


def _plots(title: str, about: str, plots: Iterable[Plot], legend: str = "") -> Iterator[str]:
    figures = [f"<figure><figcaption>{escape(plot.title)}</figcaption>{plot.image}</figure>" for plot in plots]
    if figures:
        yield f"<h2>{title}</h2>\n<p class='about'>{escape(about)}</p>\n{legend}"
        yield f"<div class='plots'>{''.join(figures)}</div>"


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    items = (f"<li><i style='background:{colour}'></i>{escape(name)}</li>" for name, colour in entries)
    return f"<ul class='legend'>{''.join(items)}</ul>"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield "<h2 id='rows'>All rows</h2>\n<p class='filters'><label>Filter <input id='filter' type='search' "
    yield "placeholder='torch fsdp2'></label> <span id='count' role='status'></span></p>"
    heads = "".join(
        f"<th aria-sort='none'><button type='button'>{escape(column.title)}</button></th>" for column in COLUMNS
    )
    yield f"<div class='wide'><table id='table'><thead><tr>{heads}<th>proof</th></tr></thead><tbody>"
    for number, row in enumerate(rows):
        cells = "".join(_cell(column, row) for column in COLUMNS)
        yield f"<tr>{cells}<td><a href='#proof-{number}'>proof</a></td></tr>"
    yield "</tbody></table></div>"


def _cell(column: Column, row: Row) -> str:
    value, text = column.value(row), escape(shown(column, row))
    key = "" if value is None else f" data-v='{escape(str(value), quote=True)}'"
    if column.title == "status":
        return f"<td{key}><span class='badge {text}' title='{escape(row.reason, quote=True)}'>{text}</span></td>"
    return f"<td{key}{' class=number' if column.is_number else ''}>{text}</td>"


def _proofs(rows: Sequence[Row]) -> Iterator[str]:
    yield "<h2>Proofs</h2>\n<p class='about'>What stands behind each row, with every sample.</p>"
    for number, row in enumerate(rows):
        title = f"{row.backend}, {row.workload}, {row.layout}: {row.status}"
        reason = f"<p><b>{escape(row.reason)}</b></p>" if row.reason else ""
        entries = "".join(
            f"<dt>{name}</dt><dd>{escape(_plain(value))}</dd>"
            for name, value in dataclasses.asdict(row).items()
            if value not in (None, [], "")
        )
        yield (f"<details id='proof-{number}'><summary>{escape(title)}</summary>{reason}<dl>{entries}</dl></details>")


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(f"{one:.4g}" for one in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
