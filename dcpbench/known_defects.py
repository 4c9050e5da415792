"""Known defects: lists of findings that are expected, strictly.

A file ``<backend>.toml`` holds ``[[defect]]`` tables. A finding that an entry explains is counted and not raised, so
that the search goes on for others. Each entry names a reproducer, a case file beside the list, which runs every time
and must still fail by the same rule; when it passes, the defect was mended and the entry is stale.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dcpbench import codec
from dcpbench.case import Case
from dcpbench.errors import MalformedFile, UsageError
from dcpbench.facts import FACTS, facts_of
from dcpbench.oracle.verdict import Finding
from dcpbench.rules import RULES

__all__ = ["SEVERITIES", "Defect", "explains", "load_defects"]

SEVERITIES = ("silent wrong data", "data loss", "hang", "crash", "unclear error", "security", "resource")


@dataclass(frozen=True, slots=True)
class Defect:
    """One known defect of a backend.

    Attributes:
        id: short name, unique in its file.
        backend: whose defect it is.
        rules: codes that its findings have.
        when: facts, all of which hold for the leaf concerned (:data:`dcpbench.facts.FACTS`).
        sentence: what goes wrong.
        severity: one of :data:`SEVERITIES`.
        reference: the place in the backend's source or documentation that shows it.
        reproducer: path of a case file; the list names it relative to itself.
        text: what the finding's own lines must contain, where rule and facts alone would hide too much.
    """

    id: str
    backend: str
    rules: tuple[str, ...]
    when: tuple[str, ...]
    sentence: str
    severity: str
    reference: str
    reproducer: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"expected a severity of {', '.join(SEVERITIES)} but got {self.severity!r}.")
        if unknown := [code for code in self.rules if code not in RULES]:
            raise ValueError(f"expected codes of docs/rules.md but got {unknown[0]!r}.")
        plain = {fact.split("<")[0] for fact in FACTS}
        if unknown := [fact for fact in self.when if fact not in plain and f"{fact.split(':')[0]}:" not in plain]:
            raise ValueError(f"expected facts such as {', '.join(list(FACTS)[:3])} but got {unknown[0]!r}.")


def load_defects(path: Path, backend: str) -> tuple[Defect, ...]:
    """Returns the entries of a known-defects file; of a file that does not exist, none.

    Raises:
        UsageError: the file cannot be read, is malformed, or names a reproducer that is not there.
    """
    if not path.exists():
        return ()
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("defect", [])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"Expected a known-defects file but {path} cannot be read: {error}. Mend it.") from error
    found = []
    for number, table in enumerate(tables):
        where = f"{path}: defect[{number}]"
        defect = codec.from_json(Defect, {**table, "backend": backend}, where)
        case_file = path.parent / defect.reproducer
        if not case_file.is_file():
            raise MalformedFile(
                where, f"expected the case file {defect.reproducer!r} beside the list but it is missing."
            )
        found.append(replace(defect, reproducer=str(case_file)))
    return tuple(found)


def explains(defects: Sequence[Defect], case: Case, finding: Finding) -> Defect | None:
    """Returns the entry that explains ``finding``, or None if it is new."""
    for defect in defects:
        if finding.rule not in defect.rules or defect.text not in finding.text():
            continue
        if any(facts.issuperset(defect.when) for facts in facts_of(case, finding)):
            return defect
    return None
