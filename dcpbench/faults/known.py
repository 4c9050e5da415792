"""Known defects under faults: tables ``[[fault]]`` of ``suites/known_defects/<backend>.toml``, strictly.

An entry explains findings of the runs that it names. Each of those runs is deterministic and is made every time: when
one of them shows nothing of the entry, the defect was mended there and the entry is stale.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dcpbench import codec
from dcpbench.errors import UsageError
from dcpbench.known_defects import SEVERITIES
from dcpbench.oracle.verdict import Finding
from dcpbench.rules import RULES

__all__ = ["KnownFault", "Sorted", "load_known_faults", "sort_findings"]


@dataclass(frozen=True, slots=True)
class KnownFault:
    """One known defect of a backend under faults.

    Attributes:
        id: short name, unique in its file.
        rules: codes that its findings have.
        runs: the runs that show it, such as ``crash/overwrite``; each must.
        sentence: what goes wrong.
        severity: one of :data:`dcpbench.known_defects.SEVERITIES`.
        reference: the place in the backend's source or documentation that shows it.
        text: what the finding's own lines must contain, where rule and run alone would hide too much.
        backend: whose defect it is; from the name of the file.
    """

    id: str
    rules: tuple[str, ...]
    runs: tuple[str, ...]
    sentence: str
    severity: str
    reference: str
    text: str = ""
    backend: str = ""

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"expected a severity of {', '.join(SEVERITIES)} but got {self.severity!r}.")
        if unknown := [code for code in self.rules if code not in RULES]:
            raise ValueError(f"expected codes of docs/rules.md but got {unknown[0]!r}.")

    def explains(self, run: str, finding: Finding) -> bool:
        """Reads as: the finding of a run is this defect."""
        return run in self.runs and finding.rule in self.rules and self.text in finding.text()


@dataclass(frozen=True)
class Sorted:
    """The findings of a run.

    Attributes:
        new: those that no entry explains.
        known: how many each entry explains, by its id.
        stale: ids of entries that name the run and explain nothing of it.
    """

    new: tuple[Finding, ...]
    known: dict[str, int]
    stale: tuple[str, ...]


def load_known_faults(path: Path, backend: str) -> tuple[KnownFault, ...]:
    """Returns the ``[[fault]]`` tables of a known-defects file; of a file that does not exist, none.

    Raises:
        UsageError: the file cannot be read, or is malformed.
    """
    if not path.exists():
        return ()
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("fault", [])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"Expected a known-defects file but {path} cannot be read: {error}. Mend it.") from error
    found = [codec.from_json(KnownFault, table, f"{path}: fault[{number}]") for number, table in enumerate(tables)]
    return tuple(replace(entry, backend=backend) for entry in found)


def sort_findings(known: Sequence[KnownFault], run: str, findings: Sequence[Finding]) -> Sorted:
    """Returns which findings of a run are new, which known, and which entries have nothing left to explain."""
    counts = {entry.id: 0 for entry in known if run in entry.runs}
    new = []
    for finding in findings:
        entry = next((one for one in known if one.explains(run, finding)), None)
        if entry is None:
            new.append(finding)
        else:
            counts[entry.id] += 1
    return Sorted(tuple(new), counts, tuple(name for name, count in counts.items() if not count))
