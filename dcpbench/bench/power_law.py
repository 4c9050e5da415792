"""How a cost grows: the power law through measured points. Standard library only."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

__all__ = ["Fit", "fit"]

_T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
"""Student's t for an interval of 95 %, by degrees of freedom."""


@dataclass(frozen=True)
class Fit:
    """``value = factor * ranks ** exponent``, by least squares of the logarithms.

    Attributes:
        low, high: an interval of 95 % for the exponent; None with fewer than three points.
    """

    exponent: float
    factor: float
    low: float | None = None
    high: float | None = None

    def at(self, ranks: int) -> float:
        """Returns the value at so many ranks."""
        return self.factor * math.exp(self.exponent * math.log(ranks))

    def __str__(self) -> str:
        interval = f" ({self.low:.2f} to {self.high:.2f})" if self.low is not None else ""
        return f"{self.exponent:.2f}{interval}"


def fit(points: dict[int, float]) -> Fit:
    """Returns the power law through those of the points that were measured, of which there are at least two.

    Source: the interval of a slope, as of any simple linear regression.
    """
    held = {n: value for n, value in points.items() if value > 0}
    xs, ys = [math.log(n) for n in held], [math.log(value) for value in held.values()]
    slope, intercept = statistics.linear_regression(xs, ys)
    degrees = len(xs) - 2
    if degrees < 1:
        return Fit(slope, math.exp(intercept))
    residual = sum((y - slope * x - intercept) ** 2 for x, y in zip(xs, ys, strict=True))
    spread = sum((x - statistics.mean(xs)) ** 2 for x in xs)
    reach = _T_95.get(degrees, 2.3) * math.sqrt(residual / degrees / spread)
    return Fit(slope, math.exp(intercept), slope - reach, slope + reach)
