"""dcpbench: a correctness and benchmark test-suite framework for distributed checkpoint implementations.

    strategies/     case.py      ranks/pool.py     backends/*        oracle/            report/
    draw       -->  Case    -->  N ranks      -->  save, load   -->  judge()       -->  Verdict --> terminal, results/*
    (Hypothesis)    (data)       (torch elastic)   (under test)      (pure, no torch)   (data)
                                      +--- Observation, one per rank and step ---+

What suites and backends need is here; names that need torch or Hypothesis are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dcpbench.case import Case
from dcpbench.case_files import load_case
from dcpbench.errors import DcpbenchError, UsageError
from dcpbench.oracle.judge import judge
from dcpbench.oracle.verdict import Finding, RuleBrokenError, Verdict

if TYPE_CHECKING:
    from dcpbench.backends.protocol import EngineBackend, PlannerBackend, StorageBackend
    from dcpbench.profiles import share
    from dcpbench.strategies import cases, protocol, training

__all__ = [
    "Case",
    "DcpbenchError",
    "EngineBackend",
    "Finding",
    "PlannerBackend",
    "RuleBrokenError",
    "StorageBackend",
    "UsageError",
    "Verdict",
    "cases",
    "judge",
    "load_case",
    "protocol",
    "share",
    "training",
]

_LAZY = {
    "EngineBackend": "dcpbench.backends.protocol",
    "PlannerBackend": "dcpbench.backends.protocol",
    "StorageBackend": "dcpbench.backends.protocol",
    "share": "dcpbench.profiles",
}

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("cases", "protocol", "training"):
        return importlib.import_module(f"dcpbench.strategies.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
