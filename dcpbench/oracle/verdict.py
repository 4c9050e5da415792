"""What the oracle says: findings, a verdict, and one exception class per rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dcpbench.case_files import AnyCase
from dcpbench.rules import RULES

__all__ = ["RULE_ERRORS", "Finding", "RuleBrokenError", "Status", "UnknownError", "Verdict"]

Status = Literal["PASS", "FAIL", "UNSUPPORTED", "UNKNOWN"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule, with its evidence.

    Attributes:
        rule: its code.
        headline: what is wrong, where, in one line.
        facts: label and text of each further line, such as ``("expected", "3f8ccccd")``.
        fqn: the leaf concerned, or "" where the finding is about the step as a whole.
        rank: the rank that saw it.
        step: the step in which it was seen.
    """

    rule: str
    headline: str
    facts: tuple[tuple[str, str], ...] = ()
    fqn: str = ""
    rank: int = 0
    step: int = 0

    def text(self, replay: str = "") -> str:
        """Returns the message that a failure prints: what, where, expected, got, setting, reason, replay, rule."""
        rule = RULES[self.rule]
        lines = [*self.facts]
        if replay:
            lines.append(("replay", replay))
        lines.append(("rule", f"docs/rules.md#{rule.code.lower()}: {rule.sentence}"))
        body = "\n".join(f"  {label:<10} {text}" for label, text in lines)
        return f"{rule.code} {rule.name}: {self.headline}\n{body}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of one case on one backend.

    Attributes:
        reason: why it is UNKNOWN or UNSUPPORTED; "" otherwise.
        checked: codes of the rules that the case puts to the test.
        absent: capabilities that the case needs and the backend declares absent; with a PASS they work all the same.
    """

    status: Status
    findings: tuple[Finding, ...] = ()
    reason: str = ""
    checked: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


class RuleBrokenError(AssertionError):
    """A rule is broken. Each rule raises a subclass of its own, so that Hypothesis tells different defects apart.

    Attributes:
        finding: the first finding of the rule.
        case: the case that shows it.
        backend: specification of the backend under test.
        evidence: what the failure's file holds, as JSON values; filled by who raises it.
    """

    evidence: dict[str, Any]

    def __init__(self, finding: Finding, case: AnyCase, backend: str, replay: str) -> None:
        super().__init__(finding.text(replay))
        self.finding = finding
        self.case = case
        self.backend = backend
        self.evidence = {}


class UnknownError(Exception):
    """A case could not be judged: the machine, not the backend, was in the way. Never a pass."""


def _class_name(code: str) -> str:
    return "".join(word.capitalize() for word in (code, *RULES[code].name.split("-"))) + "Error"


RULE_ERRORS: dict[str, type[RuleBrokenError]] = {
    code: type(_class_name(code), (RuleBrokenError,), {"__doc__": RULES[code].sentence, "__module__": __name__})
    for code in RULES
}
"""The exception class of each rule, by code."""
