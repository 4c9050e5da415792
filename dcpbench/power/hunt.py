"""One search: the tests of the suites on one backend until a rule is broken, then the shrinking of the case."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis

from dcpbench.case import Case
from dcpbench.case_files import AnyCase
from dcpbench.errors import DcpbenchError
from dcpbench.oracle.verdict import RuleBrokenError, UnknownError
from dcpbench.power.suite_tests import Slice, SuiteTest
from dcpbench.protocol_case import ProtocolCase
from dcpbench.suite_session import SuiteSession

__all__ = ["Hunt", "size_of"]


class _Caught(Exception):
    """A case breaks one of the rules that are looked for."""


class _Enough(BaseException):
    """The time for shrinking is over. Hypothesis lets it through, since it is no Exception."""


@dataclass
class Hunt:
    """Runs slices of tests on a backend until one breaks a rule that is looked for.

    Attributes:
        wanted: codes of the rules; with none, any rule is looked for.
        shrink_s: how long a case that was found may be shrunk.
        max_s: when the search gives up, looked at between cases.
        tell: takes a line of progress.
        caught_by: the rule that was broken; "" as long as none was.
        test: the one that showed it.
        num_cases, seconds: how much it took.
        others: rules that were broken before, and are not looked for.
        case: the shrunk one; None for a finding about storage, which has none that shrinks.
        text: what the failure says.
        unknown: why the first case that could not be judged could not.
        is_out_of_time: the search was given up before all cases were run.
    """

    session: SuiteSession
    backend: str
    wanted: frozenset[str]
    shrink_s: float = 20.0
    max_s: float = 600.0
    tell: Callable[[str], None] = lambda _: None
    caught_by: str = ""
    test: str = ""
    num_cases: int = 0
    seconds: float = 0.0
    shrinking_s: float = 0.0
    others: set[str] = field(default_factory=set)
    case: AnyCase | None = None
    text: str = ""
    unknown: str = ""
    is_out_of_time: bool = False
    _begun_s: float = 0.0
    _is_caught: dict[str, bool] = field(default_factory=dict)

    def run(self, parts: Iterable[tuple[SuiteTest, Slice]]) -> None:
        """Runs the slices one after the other; ends at the first case that is caught, when it has been shrunk."""
        self._begun_s = time.monotonic()
        # torch's known defects are not the mutant's
        self.session.torch_parts[self.backend] = self.session.backends.torch_parts(self.backend)
        for test, part in parts:
            if self._elapsed_s() > self.max_s:
                self.is_out_of_time = True
                break
            self.tell(f"{self.num_cases} cases, {self._elapsed_s():.0f} s: {test.name}")
            self._run_slice(test, part)
            if self.caught_by:
                break
        if not self.caught_by:
            self.seconds = self._elapsed_s()
        else:
            self.shrinking_s = self._elapsed_s() - self.seconds

    def _run_slice(self, test: SuiteTest, part: Slice) -> None:
        is_property = test.strategy is not None
        try:
            test.run(part, self.session, self.backend, self._check, self._around)
        except _Caught:
            self.test = test.name
        except _Enough:
            self.test, self.is_out_of_time = (test.name, False) if self.caught_by else ("", True)
        except RuleBrokenError as error:  # a test of faults: it does its own judging
            self.num_cases += 1
            self._note(error)
            if self.caught_by:
                self.test, self.text = test.name, str(error)
                self.case = error.case if is_property else None
        except UnknownError as error:
            self.unknown = self.unknown or str(error)
        except hypothesis.errors.Unsatisfiable:  # the session turns cases down that known defects would hang in
            pass
        except (AssertionError, DcpbenchError) as error:  # a fault suite that needs a save that works, and has none
            self.unknown = self.unknown or f"{test.name}: {str(error).splitlines()[0] if str(error) else 'failed'}"
        else:
            self.num_cases += not is_property

    def _check(self, verdict: Any) -> None:
        try:
            self.session.check(verdict)
        except RuleBrokenError as error:
            self._note(error)
            if self._is_meant(error):
                self.text = str(error)
                raise _Caught from error

    def _rules_of(self, error: RuleBrokenError) -> list[str]:
        held = error.evidence.get("findings") or error.evidence.get("verdict", {}).get("findings", [])
        return [finding["rule"] for finding in held] or [error.finding.rule]

    def _is_meant(self, error: RuleBrokenError) -> bool:
        return not self.wanted or bool(self.wanted & set(self._rules_of(error)))

    def _note(self, error: RuleBrokenError) -> None:
        rules = self._rules_of(error)
        meant = [rule for rule in rules if not self.wanted or rule in self.wanted]
        if meant and not self.caught_by:
            self.caught_by, self.seconds = meant[0], self._elapsed_s()
        elif not meant and not self.caught_by:
            self.others.update(rules)

    def _around(self, body: Callable[..., None]) -> Callable[..., None]:
        """Returns ``body`` with an end to shrinking, and a memory: a case is judged once."""

        def judge_once(drawn: AnyCase | Sequence[AnyCase]) -> None:
            cases = drawn if isinstance(drawn, Sequence) else (drawn,)
            key = " ".join(case.id for case in cases)
            if key not in self._is_caught:
                if self._elapsed_s() > (self.seconds + self.shrink_s if self.caught_by else self.max_s):
                    raise _Enough
                self.num_cases += 0 if self.caught_by else len(cases)
                self._is_caught[key] = self._catches(body, drawn)
            if self._is_caught[key]:
                self.case = cases[-1]
                raise _Caught  # from one place: Hypothesis takes two for two defects

        return judge_once

    def _catches(self, body: Callable[..., None], drawn: AnyCase | Sequence[AnyCase]) -> bool:
        try:
            body(drawn)
        except _Caught:
            return True
        return False

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._begun_s


def size_of(case: AnyCase | None) -> tuple[int, int]:
    """Returns the ranks and leaves of a case; a model's leaves are its parameters and buffers. (0, 0) for none.

    Ranks of the protocol are virtual ones.
    """
    if case is None:
        return 0, 0
    if isinstance(case, Case):
        return case.max_world_size, len(case.leaves)
    if isinstance(case, ProtocolCase):
        return max((step.world_size for step in case.steps), default=0), len(case.leaves)
    return case.max_world_size, len(case.model.parameters()) + len(case.model.buffers())
