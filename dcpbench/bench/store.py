"""A run on disk: `results/<machine>/<time>/` with a manifest and the rows.

Each row is made durable as soon as it is finished, as a line of ``rows.jsonl``; at the end all of them become
``rows.parquet``. A run that was interrupted keeps its finished rows, and can be read like any other.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from dcpbench.bench.row import SCHEMA_VERSION, Row
from dcpbench.errors import MalformedFile, UsageError

__all__ = ["Run", "RunWriter", "read_run", "runs_below"]

MANIFEST, LINES, TABLE = "manifest.json", "rows.jsonl", "rows.parquet"
_REMEDY = "Give the folder of a run, as results/<machine>/<time>."
_TYPES: dict[object, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    list[float]: pa.list_(pa.float64()),
}


@dataclass(frozen=True)
class Run:
    """A run that was read.

    Attributes:
        manifest: its environment and options.
        rows: finished ones.
        folder: where it lies.
    """

    manifest: dict[str, Any]
    rows: list[Row]
    folder: Path

    @property
    def name(self) -> str:
        """Machine and time."""
        return f"{self.folder.parent.name}/{self.folder.name}"


class RunWriter:
    """Writes one run.

    Args:
        results: the results folder.
        machine: the folder's name in it.
        manifest: what is to be known of the run; the time and the schema are added.
    """

    def __init__(self, results: Path, machine: str, manifest: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self.folder = results / machine / f"{now:%Y%m%dT%H%M%SZ}-{os.getpid()}"
        self.folder.mkdir(parents=True)
        self._manifest = {"schema_version": SCHEMA_VERSION, "started_at": now.isoformat(timespec="seconds"), **manifest}
        self._rows: list[Row] = []
        self._write_manifest(is_complete=False)

    def add(self, row: Row) -> None:
        """Makes one more row durable."""
        self._rows.append(row)
        line = json.dumps(dataclasses.asdict(row))
        with (self.folder / LINES).open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self, *, is_complete: bool) -> Run:
        """Turns the lines into a Parquet file and returns the run."""
        table = pa.Table.from_pylist([dataclasses.asdict(row) for row in self._rows], schema=_schema())
        temporary = self.folder / f".{TABLE}.tmp"
        try:
            pq.write_table(table, temporary)
            _sync(temporary)
            temporary.replace(self.folder / TABLE)
        finally:
            temporary.unlink(missing_ok=True)
        self._write_manifest(is_complete=is_complete)
        (self.folder / LINES).unlink(missing_ok=True)
        return Run(self._manifest, self._rows, self.folder)

    def _write_manifest(self, *, is_complete: bool) -> None:
        self._manifest["is_complete"] = is_complete
        temporary = self.folder / f".{MANIFEST}.tmp"
        temporary.write_text(json.dumps(self._manifest, indent=1), encoding="utf-8")
        _sync(temporary)
        temporary.replace(self.folder / MANIFEST)


def read_run(path: Path) -> Run:
    """Reads the run at ``path``: its folder, or a file in it.

    Raises:
        UsageError: there is no run, or it is of another schema.
        MalformedFile: a file is truncated or damaged.
    """
    folder = path if path.is_dir() else path.parent
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Expected a benchmark run but {path} is none ({error.strerror}). {_REMEDY}") from error
    except ValueError as error:
        raise MalformedFile(str(folder / MANIFEST), "expected JSON. Restore the file, or give another run.") from error
    found = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if found != SCHEMA_VERSION:
        raise UsageError(
            f"Expected a run of schema {SCHEMA_VERSION} but {folder} has schema {found}. "
            f"Measure again, or read it with the dcpbench that wrote it ({manifest.get('commit') or 'commit unknown'})."
        )
    rows = _read_table(folder / TABLE) if (folder / TABLE).exists() else _read_lines(folder / LINES)
    return Run(manifest, rows, folder)


def runs_below(results: Path) -> list[Path]:
    """Returns the folders of all runs below ``results``, the oldest first."""
    return sorted((path.parent for path in results.glob(f"*/*/{MANIFEST}")), key=lambda path: path.name)


def _read_table(path: Path) -> list[Row]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        text = f"expected a whole Parquet file ({_one_line(error)}). Measure again, or restore the file."
        raise MalformedFile(str(path), text) from error
    names = [field.name for field in dataclasses.fields(Row)]
    if table.column_names != names:
        odd = sorted(set(table.column_names) ^ set(names)) or ["their order"]
        raise MalformedFile(str(path), f"expected the columns of schema {SCHEMA_VERSION} but these differ: {odd[0]}.")
    return [Row(**values) for values in table.to_pylist()]


def _read_lines(path: Path) -> list[Row]:
    """Reads the rows of a run that was cut off; a last line that was cut off itself is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise MalformedFile(f"{path}: line {number}", "expected a row. Take the line out.") from error
    return rows


def _schema() -> pa.Schema:
    hints = get_type_hints(Row)
    return pa.schema([(field.name, _TYPES[_plain(hints[field.name])]) for field in dataclasses.fields(Row)])


def _plain(hint: Any) -> Any:
    """Returns the type without ``| None``."""
    if get_origin(hint) is types.UnionType:
        return next(one for one in get_args(hint) if one is not types.NoneType)
    return hint


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
