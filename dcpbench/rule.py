"""`Rule`: one sentence of the catalogue (:mod:`dcpbench.rules`)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Rule"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One sentence that holds for every correct backend.

    Attributes:
        code: ``R`` and three digits; the first digit is the family.
        name: two or three words, hyphenated.
        family: a key of :data:`dcpbench.rules.FAMILIES`.
        sentence: what the backend must do.
        source: the document that says so.
        mutant: the wrong backend in ``tests/mutants`` that the rule catches.
        capability: without it the rule is not held against a backend; a name of :mod:`dcpbench.capabilities`, or "".
        implies: rules that may be broken as a consequence, so that they are looked at after this one.
    """

    code: str
    name: str
    family: str
    sentence: str
    source: str
    mutant: str
    capability: str = ""
    implies: tuple[str, ...] = ()
