"""Known defects: lists of findings that are expected, strictly.

A file ``<backend>.toml`` holds ``[[defect]]`` tables. A finding that an entry explains is counted and not raised, so
that the search goes on for others. Each entry names a reproducer, a case file beside the list, which runs every time
and must still fail by the same rule; when it passes, the defect was mended and the entry is stale.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dcpbench import codec
from dcpbench.backends.parts import PARTS, parts_of
from dcpbench.case_files import AnyCase
from dcpbench.errors import MalformedFile, UsageError
from dcpbench.facts import FACTS, facts_of
from dcpbench.oracle.verdict import Finding
from dcpbench.rules import RULES

__all__ = ["DEFECT_PARTS", "SEVERITIES", "Defect", "avoided", "defects_of", "explains", "load_defects"]

SEVERITIES = ("silent wrong data", "data loss", "hang", "crash", "unclear error", "security", "resource")

DEFECT_PARTS = (*PARTS, "state_dict")
"""What a defect may be in: the parts of a backend, and the functions for the state of models and optimizers."""


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
        part: what of the backend is wrong, one of :data:`DEFECT_PARTS`; other backends may be built on it. Empty
            where no part is to blame alone.
        text: what the finding's own lines must contain, where rule and facts alone would hide too much.
        is_avoided: a search leaves out cases that it would strike, since each of them hangs; its reproducer shows it.
    """

    id: str
    backend: str
    rules: tuple[str, ...]
    when: tuple[str, ...]
    sentence: str
    severity: str
    reference: str
    reproducer: str
    part: str = ""
    text: str = ""
    is_avoided: bool = False

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"expected a severity of {', '.join(SEVERITIES)} but got {self.severity!r}.")
        if self.part and self.part not in DEFECT_PARTS:
            raise ValueError(f"expected a part of {', '.join(DEFECT_PARTS)} but got {self.part!r}.")
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


def explains(defects: Sequence[Defect], case: AnyCase, finding: Finding) -> Defect | None:
    """Returns the entry that explains ``finding``, or None if it is new."""
    for defect in defects:
        if finding.rule not in defect.rules or defect.text not in finding.text():
            continue
        if any(facts.issuperset(defect.when) for facts in facts_of(case, finding)):
            return defect
    return None


def avoided(defects: Sequence[Defect], case: AnyCase) -> Defect | None:
    """Returns the entry for which a search leaves ``case`` out, or None if it is to be run."""
    for defect in defects:
        for step in range(len(case.steps)) if defect.is_avoided else ():
            if any(facts.issuperset(defect.when) for facts in facts_of(case, Finding(defect.rules[0], "", step=step))):
                return defect
    return None


def defects_of(
    specification: str, lists: Mapping[str, Sequence[Defect]], torch_parts: Mapping[str, Sequence[str]]
) -> list[Defect]:
    """Returns the known defects that a backend may show: its own, and those of the parts of torch that it is built on.

    Args:
        specification: the backend, or one put together from parts.
        lists: known defects by backend.
        torch_parts: for a backend that is built on torch's DCP, which parts of that it runs.
    """
    sources = parts_of(specification)
    if sources is None:
        inherited = torch_parts.get(specification, ())
        return [*lists.get(specification, ()), *(d for d in lists.get("torch", ()) if d.part in inherited)]
    return [
        defect
        for name in dict.fromkeys(sources.values())
        for defect in defects_of(name, lists, torch_parts)
        if sources.get("engine" if defect.part == "state_dict" else defect.part, name) == name
    ]
