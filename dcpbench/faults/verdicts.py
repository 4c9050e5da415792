"""Runs in the controller: what the findings of a fault run do to a test, and the file that a failure leaves."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dcpbench import codec
from dcpbench.case import Case
from dcpbench.errors import MalformedFile, UsageError
from dcpbench.faults.known import KnownFault, Sorted, load_known_faults, sort_findings
from dcpbench.oracle.verdict import RULE_ERRORS, Finding
from dcpbench.rules import RULES
from dcpbench.suite_session import SuiteSession

__all__ = ["FaultRun", "check_run", "read_image", "tree_as_json"]

_RULES_OF = {
    "crash": ("R801", "R802", "R803", "R804", "R805"),
    "live": ("R502", "R503", "R504", "R801", "R802", "R803", "R805", "R806", "R807"),
    "corruption": ("R805", "R808"),
    "hostile": ("R901", "R902", "R903", "R904"),
}
"""The rules that each kind of run puts to the test."""


@dataclass(frozen=True)
class FaultRun:
    """What one run found.

    Attributes:
        name: of the run, such as ``crash/overwrite``.
        backend: specification of the backend under test.
        case: whose saves and loads it was about.
        findings: each with the storage that shows it, or with None.
        is_complete: it tried all that there was to try, so that an entry that explains nothing is stale.
        unknown: why nothing can be said, or "".
    """

    name: str
    backend: str
    case: Case
    findings: Sequence[tuple[Mapping[str, bytes | None] | None, Finding]] = field(default_factory=list)
    is_complete: bool = True
    unknown: str = ""


def check_run(session: SuiteSession, run: FaultRun) -> None:
    """Counts a run; raises if it has a finding that no known defect explains, or lacks one that is expected.

    Raises:
        RuleBrokenError: the subclass of the first such finding's rule.
        AssertionError: a known defect did not show.
    """
    __tracebackhide__ = True
    absent = session.backends.absent(run.backend)
    held = [finding for _, finding in run.findings if RULES[finding.rule].capability not in absent]
    own = load_known_faults(session.defect_files[run.backend], run.backend)
    outcome = sort_findings(own, run.name, held)
    inherited = _inherited(session, run, outcome.new)
    outcome = replace(outcome, new=inherited.new)
    for name, count in (*outcome.known.items(), *inherited.known.items()):
        if count:
            session.known[run.backend if name in outcome.known else "torch", name] += count
    status = "UNKNOWN" if run.unknown else "FAIL" if outcome.new else "KNOWN" if held else "PASS"
    session.counts[session.test, run.backend, status] += 1
    if not run.unknown:
        _tally(session, run, {found.rule for found in outcome.new}, _rules_of(own, outcome), inherited.rules)
    if run.unknown:
        session.unknown.append(f"{run.name}: {run.unknown}")
    if outcome.new:
        finding = outcome.new[0]
        tree = next(tree for tree, one in run.findings if one is finding)
        file = session.failure_file(run.case)
        error = RULE_ERRORS[finding.rule](
            finding, run.case, run.backend, f"dcpbench faults replay {file} --backend {run.backend}"
        )
        error.evidence = {
            "case": codec.to_json(run.case),
            "backend": run.backend,
            "run": run.name,
            "findings": codec.to_json(outcome.new),
            "image": None if tree is None else tree_as_json(tree),
        }
        raise error
    assert not (run.is_complete and outcome.stale and not run.unknown), (
        f"The known defect {outcome.stale[0]!r} of {run.backend} is stale: {run.name} no longer shows it. "
        f"If the backend was mended, remove the run from the entry in {session.defect_files[run.backend]}."
    )


@dataclass(frozen=True)
class _Inherited:
    """Of the findings that are new to the backend's own list: what torch's list explains, and what it does not."""

    new: tuple[Finding, ...]
    known: dict[str, int]
    rules: set[str]


def _inherited(session: SuiteSession, run: FaultRun, new: Sequence[Finding]) -> _Inherited:
    """Returns which findings a backend has from the storage and the planners of torch that it is built on."""
    if not set(session.torch_parts.get(run.backend, ())) & {"planner", "storage"}:
        return _Inherited(tuple(new), {}, set())
    of_torch = load_known_faults(session.defect_files["torch"], "torch")
    outcome = sort_findings(of_torch, run.name, new)
    return _Inherited(outcome.new, outcome.known, _rules_of(of_torch, outcome))


def _rules_of(known: Sequence[KnownFault], outcome: Sorted) -> set[str]:
    return {rule for entry in known if outcome.known.get(entry.id) for rule in entry.rules}


def _tally(session: SuiteSession, run: FaultRun, failed: set[str], known: set[str], inherited: set[str]) -> None:
    """Counts for each rule how the run went."""
    absent = session.backends.absent(run.backend)
    shown = {finding.rule for _, finding in run.findings}
    for rule in {*_RULES_OF[run.name.partition("/")[0]], *shown}:
        capability = RULES[rule].capability
        if capability in absent:
            how = "unsupported"
            if run.is_complete and capability in session.backends.declared(run.backend):
                session.absences[run.backend, capability, rule not in shown] += 1
        elif rule in failed:
            how = "fail"
        elif rule in shown & known:
            how = "known"
        else:
            how = "inherited" if rule in shown & inherited else "pass"
        session.tally[rule, run.backend, how] += 1


def tree_as_json(tree: Mapping[str, bytes | None]) -> dict[str, str | None]:
    """Returns a tree with its contents in base64."""
    return {path: None if content is None else base64.b64encode(content).decode() for path, content in tree.items()}


def read_image(path: Path) -> tuple[Case, str, dict[str, bytes | None]]:
    """Returns the case, the backend and the storage of a file that a failure left.

    Raises:
        UsageError: the file cannot be read, or holds no storage.
    """
    case = Case.load(path)
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    image = held.get("image")
    if not isinstance(image, dict):
        raise UsageError(
            f"Expected a file with an image of a storage but {path} has none. Try: dcpbench replay {path}."
        )
    try:
        tree = {name: None if text is None else base64.b64decode(text) for name, text in image.items()}
    except (TypeError, ValueError) as error:
        raise MalformedFile(f"{path}: image", f"expected base64 but {error}.") from error
    return case, str(held.get("backend", "torch")), tree
