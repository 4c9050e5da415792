"""Runs in the controller: sends trees to one warm rank, and finds the one that takes the rank along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dcpbench.case import Case
from dcpbench.errors import RanksUnavailable
from dcpbench.faults.law import LoadSeen
from dcpbench.messages import Call
from dcpbench.ranks.pool import RankPool

__all__ = ["Loader"]

BATCH = 200
LOAD_TIMEOUT_S = 10.0
MAX_LOAD_BYTES = 2 << 30
_SLACK_S = 30.0


@dataclass(frozen=True)
class Loader:
    """Loads trees through a backend, in one process without a process group.

    Attributes:
        pool: rank 0 of it does the work.
        backend: what loads.
        case: whose checkpoints the trees hold.
        steps: numbers of load steps, by the name under which they are reported.
        root: where each tree is laid out; the same folder in which the checkpoints were saved.
        timeout_s: for each load; None for `LOAD_TIMEOUT_S`.
        max_bytes: of address space that a load may take.
    """

    pool: RankPool
    backend: str
    case: Case
    steps: Mapping[str, int]
    root: str
    timeout_s: float | None = None
    max_bytes: int = MAX_LOAD_BYTES

    def load(self, trees: Sequence[Mapping[str, bytes | None]]) -> list[dict[str, LoadSeen]]:
        """Returns for each tree what its loads saw, by name."""
        found: list[dict[str, LoadSeen]] = []
        for start in range(0, len(trees), BATCH):
            found += self._batch(trees[start : start + BATCH])
        return found

    def _batch(self, trees: Sequence[Mapping[str, bytes | None]]) -> list[dict[str, LoadSeen]]:
        if not trees:
            return []
        timeout_s = LOAD_TIMEOUT_S if self.timeout_s is None else self.timeout_s
        arguments: dict[str, Any] = {
            "case": self.case,
            "steps": dict(self.steps),
            "backend": self.backend,
            "root": self.root,
            "trees": list(trees),
            "timeout_s": timeout_s,
            "max_bytes": self.max_bytes,
        }
        usual_s = self.pool.rank_timeout_s
        self.pool.rank_timeout_s = _SLACK_S + (timeout_s * len(self.steps) if len(trees) == 1 else 60.0)
        try:
            (seen,) = self.pool.step(Call(0, 1, "dcpbench.faults.warm_loads:load_trees", arguments, distributed=False))
        finally:
            self.pool.rank_timeout_s = usual_s
        if seen.outcome == "ok":
            return list(seen.value)
        if len(trees) > 1:
            middle = len(trees) // 2
            return self._batch(trees[:middle]) + self._batch(trees[middle:])
        if seen.outcome in ("died", "hung"):
            error = seen.error.text if seen.error else seen.outcome
            return [{name: LoadSeen(seen.outcome, error=error) for name in self.steps}]
        raise RanksUnavailable(f"A load could not be tried: {seen.error.text if seen.error else seen.outcome}")
