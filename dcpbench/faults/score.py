"""Counts of trials, and how sure they are. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["OUTCOMES", "Outcome", "Row", "rows_of", "wilson"]

Outcome = Literal["detected", "harmless", "wrong", "no answer"]
OUTCOMES: tuple[Outcome, ...] = ("detected", "harmless", "wrong", "no answer")
"""The load raised; it brought what was saved; it brought something else; it hung or took its process along."""

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Row:
    """Trials of one kind.

    Attributes:
        target, kind: what was damaged, and how.
        counts: trials by outcome.
    """

    target: str
    kind: str
    counts: dict[Outcome, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def share(self, outcome: Outcome) -> tuple[float, float, float]:
        """Returns the share of an outcome with the ends of its 95 % interval."""
        low, high = wilson(self.counts[outcome], self.total)
        return self.counts[outcome] / self.total if self.total else 0.0, low, high


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Returns the ends of Wilson's 95 % score interval for a share; (0, 1) where nothing was tried.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    if not total:
        return 0.0, 1.0
    share, squared = hits / total, _Z95 * _Z95
    middle = share + squared / (2 * total)
    spread = _Z95 * math.sqrt(share * (1 - share) / total + squared / (4 * total * total))
    low, high = (middle - spread) / (1 + squared / total), (middle + spread) / (1 + squared / total)
    return (0.0 if not hits else low), (1.0 if hits == total else high)


def rows_of(trials: Iterable[tuple[str, str, Outcome]], order: Sequence[str]) -> list[Row]:
    """Returns a row for each (target, kind) of the trials, kinds in the given order, and one row of all at the end."""
    counts: dict[tuple[str, str], Counter[Outcome]] = {}
    for target, kind, outcome in trials:
        counts.setdefault((target, kind), Counter())[outcome] += 1
        counts.setdefault(("all", "all"), Counter())[outcome] += 1
    everything = counts.pop(("all", "all"), Counter())
    rows = [
        Row(target, kind, {outcome: found[outcome] for outcome in OUTCOMES})
        for (target, kind), found in sorted(counts.items(), key=lambda item: (item[0][0], order.index(item[0][1])))
    ]
    return [*rows, Row("all", "all", {outcome: everything[outcome] for outcome in OUTCOMES})]
