"""The tests of the suites as power runs them: the same functions, a slice of their cases at a time, without pytest.

All tests have a slice in each round, so that a defect which any of them shows is met early, whatever its kind.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import itertools
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, Verbosity, given

from dcpbench.suite_session import SuiteSession

__all__ = ["LEFT_OUT", "Slice", "SuiteTest", "load_tests", "rounds"]

Kind = Literal["cases", "faults", "training"]

ROUNDS: Final = (0.08, 0.24, 0.56, 1.0)
"""The share of a test's cases that has been run after each round. The first is what the quick profile runs."""

_LEAST = 3
_KINDS: Final[dict[str, Kind]] = {
    **dict.fromkeys(("test_corruption", "test_crash", "test_hostile", "test_live_faults"), "faults"),
    **dict.fromkeys(("test_models", "test_optimizers"), "training"),
}
_ORDER: Final = ("cases", "faults", "training")
"""The cheap ones first."""

LEFT_OUT: Final = {
    "test_interop": "needs two engines of one format",
    "test_swap": "needs two engines of one format",
    "test_known_defects": "is about entries, not about backends",
    "test_regressions": "fixed cases, which say nothing about those that are generated",
    "test_training": "one model and no generated case; the generated ones of test_models say more",
}
"""Modules of the suites that take no part, and why."""


@dataclass(frozen=True)
class Slice:
    """Some cases of one test.

    Attributes:
        num_cases: how many a property test draws; 0 for a test that has its own.
        profile: how much a test of faults tries.
        seed: of what is drawn.
    """

    num_cases: int
    profile: str
    seed: int


@dataclass(frozen=True)
class SuiteTest:
    """A test of the suites: a property with a strategy, or a function with parameters.

    Attributes:
        parameter: of a property, which takes what is drawn.
        num_cases: what the loaded profile gives a property; 0 for a function.
    """

    name: str
    kind: Kind
    function: Callable[..., None]
    arguments: dict[str, Any]
    strategy: Any = None
    parameter: str = "case"
    num_cases: int = 0

    def run(
        self,
        part: Slice,
        session: SuiteSession,
        backend: str,
        check: Callable[[Any], None],
        around: Callable[[Callable[..., None]], Callable[..., None]] = lambda body: body,
    ) -> None:
        """Runs a slice of the test on ``backend``. What the test raises, this raises; a skipped test does nothing.

        Args:
            part: how many cases.
            session: takes the place of pytest's fixture ``pool``.
            backend: specification.
            check: takes the place of the fixture.
            around: makes of the body of a property, which takes what is drawn, the one that Hypothesis calls.
        """
        session.settings = replace(session.settings, profile=part.profile, backends=(backend,))
        session.begin_test(self.name)
        given_here = {"pool": session, "backend": backend, "check": check, **self.arguments}
        fixed = {name: value for name, value in given_here.items() if name in _parameters(self.function)}
        with contextlib.suppress(pytest.skip.Exception):
            if self.strategy is None:
                self.function(**fixed)
            else:
                self._draw(part, around(lambda drawn: self.function(**{self.parameter: drawn}, **fixed)))

    def _draw(self, part: Slice, body: Callable[..., None]) -> None:
        """Runs ``body`` on what the strategy gives."""
        settings = hypothesis.settings(
            max_examples=part.num_cases,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            verbosity=Verbosity.quiet,
            print_blob=False,
        )

        def draw_and_run(drawn: Any) -> None:
            body(drawn)

        settings(hypothesis.seed(part.seed)(given(drawn=self.strategy)(draw_and_run)))()


def load_tests(suites: Path) -> list[SuiteTest]:
    """Returns the tests in a folder of suites that need one backend, cheap kinds first.

    How many cases a property has depends on the profile of Hypothesis that is loaded at this moment.
    """
    found: list[SuiteTest] = []
    for path in sorted(suites.glob("test_*.py")):
        if path.stem not in LEFT_OUT:
            module = _imported(path)
            functions = [(name, value) for name, value in vars(module).items() if name.startswith("test_")]
            for name, function in functions:
                found += _tests_of(name, _KINDS.get(path.stem, "cases"), function)
    return sorted(found, key=lambda test: _ORDER.index(test.kind))


def _imported(path: Path) -> ModuleType:
    """Returns a module of the suites, loaded anew: what it holds depends on the profile."""
    name = f"dcpbench_power_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _tests_of(name: str, kind: Kind, function: Any) -> Iterator[SuiteTest]:
    if not getattr(function, "is_hypothesis_test", False):
        for arguments in _argument_sets(function):
            yield SuiteTest(name, kind, function, arguments)
        return
    body, strategies = function.hypothesis.inner_test, function.hypothesis._given_kwargs
    if {"pool", "backend", "check"} <= _parameters(body):
        ((parameter, strategy),) = strategies.items()
        settings = function._hypothesis_internal_use_settings
        yield SuiteTest(name, kind, body, {}, strategy, parameter, settings.max_examples)


def _argument_sets(function: Any) -> Iterator[dict[str, Any]]:
    """Yields what pytest would call a test with, beside the fixtures."""
    marks = [mark for mark in getattr(function, "pytestmark", ()) if mark.name == "parametrize"]
    axes: list[list[dict[str, Any]]] = [[{mark.args[0]: value} for value in mark.args[1]] for mark in marks]
    for combination in itertools.product(*axes):
        yield {name: value for one in combination for name, value in one.items()}


def _parameters(function: Callable[..., None]) -> set[str]:
    return set(inspect.signature(function).parameters)


def rounds(tests: Sequence[SuiteTest], profile: str, seed: int) -> Iterator[tuple[SuiteTest, Slice]]:
    """Yields the slices of all tests, round by round; together they are what ``profile`` runs.

    A test of faults has the quick profile's share in the first round, and that of ``profile`` in the second one.
    """
    for number, share in enumerate(ROUNDS):
        before = ROUNDS[number - 1] if number else 0.0
        for test in tests:
            drawn = zlib.crc32(f"{seed} {number} {test.name}".encode())
            if test.strategy is not None:
                least = min(_LEAST, test.num_cases)
                done = max(math.ceil(before * test.num_cases), least if number else 0)
                count = max(math.ceil(share * test.num_cases), least) - done
                if count > 0:
                    yield test, Slice(count, profile, drawn)
            elif number == 0:
                yield test, Slice(0, "quick", drawn)
            elif number == 1 and profile != "quick":
                yield test, Slice(0, profile, drawn)
