"""`Row`: what the search on one backend gave; a file of rows that grows as they are made, and the table of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dcpbench import codec
from dcpbench.bench.record import write_frame
from dcpbench.errors import MalformedFile, UsageError

__all__ = ["GOALS", "Row", "RowFile", "summary", "table_line", "write_parquet"]

Status = Literal["caught", "missed", "unfinished", "unknown", "clean", "flagged"]

GOALS = (
    "every mutant caught, 90 % of them within 60 s, shrunk to 2 ranks and 2 leaves in the median, nothing odd flagged"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One search.

    Attributes:
        name: of the backend in its bank.
        kind: "mutant" or "odd".
        half: of the bank, for a mutant; "" for an odd backend.
        status: a mutant is caught, or missed by all cases of the profile, or the search is unfinished as its time ran
            out; an odd backend is clean or flagged, or unknown where cases could not be judged.
        expected: the rules any of which catches the mutant.
        rule, test: what caught the mutant, or flagged the odd backend; "" for nothing.
        cases, seconds: what it took; of a mutant that is missed, and of an odd backend, what was tried.
        others: rules that were broken before the right one.
        ranks, leaves: size of the shrunk case; 0 where there is none, as for a finding about storage.
        shrinking_s: how long that took.
        case: the id of the shrunk case.
        seed, profile, world_size: of the search.
        text: the first line of what the failure says, or why it is unknown.
        defect: the mutant's, in a sentence.
    """

    name: str
    kind: Literal["mutant", "odd"]
    half: str
    status: Status
    expected: tuple[str, ...] = ()
    rule: str = ""
    test: str = ""
    cases: int = 0
    seconds: float = 0.0
    others: tuple[str, ...] = ()
    ranks: int = 0
    leaves: int = 0
    shrinking_s: float = 0.0
    case: str = ""
    seed: int = 0
    profile: str = ""
    world_size: int = 0
    text: str = ""
    defect: str = ""


@dataclass
class RowFile:
    """Rows in a file, a line of JSON each, which is there as soon as the row is made."""

    path: Path
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> RowFile:
        """Returns the rows of a file, none if it is not there.

        Raises:
            UsageError: it cannot be read, or a line is no row.
        """
        if not path.exists():
            return cls(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"Expected a file of rows but {path} cannot be read: {error}. Give another.") from error
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                data = json.loads(line)
            except ValueError as error:
                raise MalformedFile(f"{path}:{number}", f"expected JSON but {error}.") from error
            rows.append(codec.from_json(Row, data, f"{path}:{number}"))
        return cls(path, rows)

    def add(self, row: Row) -> None:
        """Appends a row to the list and to the file."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(codec.to_json(row)) + "\n")

    def has(self, name: str, seed: int) -> bool:
        """Reads as: this search was made."""
        return any((row.name, row.seed) == (name, seed) for row in self.rows)


def table_line(row: Row) -> str:
    """Returns a row as a line for the terminal."""
    size = f"{row.ranks} x {row.leaves}" if row.ranks else "-"
    what = f"{row.rule or '-':<5} {row.cases:>5} {row.seconds:>7.1f} {size:>6}"
    more = f"after {' '.join(row.others)}" if row.others else ""
    how = row.test.removeprefix("test_") or row.text
    return f"{row.status:<8} {row.name:<32} {row.half or f'seed {row.seed}':<9} {what}  {how} {more}".rstrip()


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the figures of a part of the rows: what the goals are about."""
    mutants = [row for row in rows if row.kind == "mutant"]
    caught = [row for row in mutants if row.status == "caught"]
    sized = [row for row in caught if row.ranks]
    odd = [row for row in rows if row.kind == "odd"]
    return {
        "mutants": len(mutants),
        "caught": len(caught),
        "within_60_s": sum(row.seconds <= 60 for row in caught),
        "median_s": statistics.median(row.seconds for row in caught) if caught else 0.0,
        "median_cases": statistics.median(row.cases for row in caught) if caught else 0.0,
        "shrunk": len(sized),
        "median_ranks": statistics.median(row.ranks for row in sized) if sized else 0.0,
        "median_leaves": statistics.median(row.leaves for row in sized) if sized else 0.0,
        "odd_runs": len(odd),
        "flagged": sum(row.status != "clean" for row in odd),
    }


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    """Writes the rows as a Parquet file, whole or not at all."""
    import pandas as pd

    held = [{**asdict(row), "expected": " ".join(row.expected), "others": " ".join(row.others)} for row in rows]
    write_frame(pd.DataFrame(held), path)
