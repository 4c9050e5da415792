"""Writes the files of a benchmark report beside a run."""

from __future__ import annotations

from pathlib import Path

from dcpbench.bench.store import Run, read_run, runs_below
from dcpbench.errors import UsageError, expected
from dcpbench.report.bench_page import as_html
from dcpbench.report.bench_tables import as_csv, as_markdown

__all__ = ["write_report"]


def write_report(run: Run, out: Path, history: Path | None = None) -> Path:
    """Writes ``report.html``, ``report.md`` and ``report.csv`` into ``out`` and returns the page's path.

    Args:
        run: what to report.
        out: a folder; it is made if need be.
        history: a results folder; its runs of the same machine are plotted too, those of other schemas left out.

    Raises:
        UsageError: the folder cannot be written.
    """
    page = as_html(run, [] if history is None else _earlier(run, history))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in (("report.html", page), ("report.md", as_markdown(run)), ("report.csv", as_csv(run))):
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise expected("a folder that can be written", "--out", str(out), f"{error.strerror}: give another.") from error
    return out / "report.html"


def _earlier(run: Run, history: Path) -> list[Run]:
    earlier = []
    for folder in runs_below(history):
        if folder.parent.name != run.folder.parent.name:
            continue
        try:
            earlier.append(read_run(folder))
        except UsageError:
            continue  # of another schema, or damaged: a history has gaps
    return earlier
