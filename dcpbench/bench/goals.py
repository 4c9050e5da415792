"""The goals of a benchmark, each with what was measured, and how they are printed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Goal", "at_least", "at_most", "goal_lines"]


@dataclass(frozen=True)
class Goal:
    """One figure and its limit.

    Attributes:
        name: what is measured, and where.
        value: what came out.
        limit: what it is held against.
        is_minimum: the value must not be below the limit; False: not above.
        unit: of both.
        note: what one must know to judge the figure; may be empty.
    """

    name: str
    value: float
    limit: float
    is_minimum: bool
    unit: str = "x"
    note: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the value keeps the limit."""
        return self.value >= self.limit if self.is_minimum else self.value <= self.limit

    def as_dict(self) -> dict[str, object]:
        """Returns the goal for a JSON file."""
        return {
            "name": self.name,
            "value": self.value,
            "limit": self.limit,
            "is_minimum": self.is_minimum,
            "unit": self.unit,
            "is_met": self.is_met,
            "note": self.note,
        }


def at_least(name: str, value: float, limit: float, unit: str = "x", note: str = "") -> Goal:
    """Returns a goal whose value must not be below ``limit``."""
    return Goal(name, value, limit, True, unit, note)


def at_most(name: str, value: float, limit: float, unit: str = "x", note: str = "") -> Goal:
    """Returns a goal whose value must not be above ``limit``."""
    return Goal(name, value, limit, False, unit, note)


def goal_lines(goals: list[Goal]) -> list[str]:
    """Returns a table with a line per goal."""
    width = max((len(goal.name) for goal in goals), default=0)
    lines = []
    for goal in goals:
        bound = f"{'at least' if goal.is_minimum else 'at most'} {goal.limit:.4g} {goal.unit}"
        verdict = "met" if goal.is_met else "MISSED"
        note = f"  {goal.note}" if goal.note else ""
        lines.append(
            f"  {goal.name:<{width}}  {goal.value:>8.4g} {goal.unit:<4}  {bound:<18} {verdict:<6}{note}".rstrip()
        )
    return lines
