"""Runs a case file again: what a failing suite wrote, or a case made by hand. Runs in the controller."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dcpbench.backends import registry
from dcpbench.case_files import AnyCase, load_case
from dcpbench.needs import with_absences
from dcpbench.oracle.judge import judge
from dcpbench.oracle.verdict import Verdict
from dcpbench.ranks.backends_seen import BackendsSeen
from dcpbench.ranks.pool import RankPool

__all__ = ["Replay", "replay"]


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay ran, and its verdict."""

    case: AnyCase
    backend: str
    load_backend: str
    verdict: Verdict


def replay(
    path: Path, *, backend: str | None, load_backend: str | None, device: str = "cpu", rank_timeout_s: float = 60.0
) -> Replay:
    """Runs the case in ``path`` once, on as many ranks as it needs, and returns its verdict.

    Args:
        path: a case file.
        backend: saves and loads; None takes the one that the file names, or ``torch``.
        load_backend: loads, if another one does; None takes ``backend``, or what the file names.
        device: ``cpu`` or ``cuda``.
        rank_timeout_s: when a rank counts as hung.

    Raises:
        UsageError: the file is malformed or the backend unknown.
    """
    case = load_case(path)
    named = json.loads(path.read_text(encoding="utf-8"))
    saver = backend or named.get("backend", "torch")
    loader = load_backend or backend or named.get("load_backend", saver)
    for name in (saver, loader):
        registry.check_spelling(name)
    with RankPool(case.max_world_size, device=device, rank_timeout_s=rank_timeout_s) as pool:
        seen = BackendsSeen(lambda: pool)
        try:
            observations = pool.run(case, saver, load_backend=loader, place=seen.place(saver))
            absent = {"save": seen.declared(saver), "load": seen.declared(loader)}
        finally:
            seen.close()
        observations = with_absences(case, observations, absent)
    return Replay(case, saver, loader, judge(case, observations))
