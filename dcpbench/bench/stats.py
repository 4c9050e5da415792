"""Which of two sides is faster, and could it be told? Rank-based tests, intervals, detectable effects. numpy only.

Everything is on logarithms of times, so that effects are ratios: 1.05 means that the second side takes 5 % longer.
Tests are exact up to 50 samples, ties included, and normal approximations above.

Sources: F. Wilcoxon, "Individual comparisons by ranking methods", 1945 (both tests); J. L. Hodges and E. L. Lehmann,
"Estimates of location based on rank tests", 1963 (the estimates of the ratio).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Comparison", "Verdict", "compare_paired", "compare_unpaired", "holm", "verdict_of"]

Verdict = Literal["faster", "slower", "same", "cannot tell"]

_Floats = npt.NDArray[np.float64]
_EXACT_UP_TO: Final = 50
_RESAMPLES: Final = 1000
_POWER: Final = 0.8
_EFFICIENCY: Final = 3 / math.pi
"""Of the rank tests beside the t test, on normal noise."""


@dataclass(frozen=True)
class Comparison:
    """Two sets of times, compared.

    Attributes:
        ratio: the second side's times over the first's, by Hodges and Lehmann.
        low, high: bootstrap interval of it.
        p: of the two-sided rank test.
        detectable: the ratio above 1 that would be found in four of five such comparisons; infinite without samples.
        num_samples: of the smaller side.
    """

    ratio: float
    low: float
    high: float
    p: float
    detectable: float
    num_samples: int


def compare_paired(
    first: Sequence[float], second: Sequence[float], *, alpha: float = 0.01, seed: int = 0
) -> Comparison:
    """Returns the comparison of times that were measured in turns: pairs share what disturbed the machine.

    Args:
        first: seconds of the one side.
        second: those of the other, as many; pair by pair.
        alpha: the level that the interval and the detectable effect are for.
        seed: of the bootstrap.
    """
    differences = np.log(np.asarray(second, dtype=float)) - np.log(np.asarray(first, dtype=float))
    drawn = np.random.default_rng(seed).integers(0, len(differences), (_RESAMPLES, len(differences)))
    shifts = _pseudo_medians(differences[drawn])
    noise = _noise(differences) / math.sqrt(len(differences) * _EFFICIENCY)
    center = float(_pseudo_medians(differences[None])[0])
    return _comparison(
        center, shifts, _signed_rank_p(differences), noise=noise, num_samples=len(differences), alpha=alpha
    )


def compare_unpaired(
    first: Sequence[float], second: Sequence[float], *, alpha: float = 0.01, seed: int = 0
) -> Comparison:
    """Returns the comparison of two independent sets of times, or of shares; arguments as in :func:`compare_paired`."""
    one, other = np.log(np.asarray(first, dtype=float)), np.log(np.asarray(second, dtype=float))
    generator = np.random.default_rng(seed)
    shifts = _shifts(generator.choice(one, (_RESAMPLES, len(one))), generator.choice(other, (_RESAMPLES, len(other))))
    noise = math.sqrt((_noise(one) ** 2 / len(one) + _noise(other) ** 2 / len(other)) / _EFFICIENCY)
    center = float(_shifts(one[None], other[None])[0])
    return _comparison(
        center, shifts, _rank_sum_p(one, other), noise=noise, num_samples=min(len(one), len(other)), alpha=alpha
    )


def verdict_of(comparison: Comparison, p: float, *, alpha: float = 0.01, margin: float = 0.03) -> Verdict:
    """Returns what can be said.

    Args:
        comparison: of two sides.
        p: its ``p``, corrected for how many comparisons there are.
        alpha: how often equal sides may be called different.
        margin: sides are the same where the whole interval lies within 1 / (1 + margin) .. 1 + margin.
    """
    if p < alpha and not comparison.low <= 1.0 <= comparison.high:
        return "slower" if comparison.ratio > 1 else "faster"
    if comparison.num_samples > 1 and comparison.low >= 1 / (1 + margin) and comparison.high <= 1 + margin:
        return "same"
    return "cannot tell"


def holm(ps: Sequence[float]) -> list[float]:
    """Returns the p-values, raised so that many comparisons give a false alarm no more often than one.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    corrected, highest = [0.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, ps[index] * (len(ps) - place)))
        corrected[index] = highest
    return corrected


def _comparison(shift: float, shifts: _Floats, p: float, *, noise: float, num_samples: int, alpha: float) -> Comparison:
    low, high = np.quantile(shifts, [alpha / 2, 1 - alpha / 2])
    z = NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(_POWER)
    detectable = math.exp(z * noise) if num_samples > 1 else math.inf
    return Comparison(math.exp(shift), math.exp(low), math.exp(high), p, detectable, num_samples)


def _pseudo_medians(rows: _Floats) -> _Floats:
    """Returns of each row the median of the means of all pairs."""
    first, second = np.triu_indices(rows.shape[1])
    medians: _Floats = np.median((rows[:, first] + rows[:, second]) / 2, axis=1)
    return medians


def _shifts(ones: _Floats, others: _Floats) -> _Floats:
    """Returns of each pair of rows the median of all differences."""
    differences = others[:, :, None] - ones[:, None, :]
    medians: _Floats = np.median(differences.reshape(len(ones), -1), axis=1)
    return medians


def _noise(values: _Floats) -> float:
    """Returns the standard deviation; what lies far out counts as three of it, since ranks do not see how far."""
    if len(values) < 2:
        return math.inf
    middle = np.median(values)
    reach = 3 * 1.4826 * float(np.median(np.abs(values - middle)))
    kept = np.clip(values, middle - reach, middle + reach) if reach else values
    return float(np.std(kept, ddof=1)) * (1 + 2 / len(values))  # a few values show too little of it


def _signed_rank_p(differences: _Floats) -> float:
    kept = differences[differences != 0]
    if not len(kept):
        return 1.0
    doubled = _doubled_ranks(np.abs(kept))
    total, seen = int(doubled.sum()), int(doubled[kept > 0].sum())
    if len(kept) <= _EXACT_UP_TO:
        ways = np.zeros(total + 1)
        ways[0] = 1.0
        for rank in doubled:
            ways[rank:] += ways[: total + 1 - rank].copy()
            ways /= 2.0
        return _two_sided(ways, seen)
    return _normal_p(seen - total / 2, math.sqrt(float((doubled.astype(float) ** 2).sum()) / 4))


def _rank_sum_p(one: _Floats, other: _Floats) -> float:
    doubled = _doubled_ranks(np.concatenate([one, other]))
    total, seen, number = int(doubled.sum()), int(doubled[len(one) :].sum()), len(other)
    if len(doubled) <= _EXACT_UP_TO:
        ways = np.zeros((number + 1, total + 1))
        ways[0, 0] = 1.0
        for rank in doubled:
            ways[1:, rank:] += ways[:-1, : total + 1 - rank].copy()
        return _two_sided(ways[number] / ways[number].sum(), seen)
    mean = total * number / len(doubled)
    spread = float(np.var(doubled, ddof=1)) * number * len(one) / len(doubled)
    return _normal_p(seen - mean, math.sqrt(spread))


def _two_sided(probabilities: _Floats, seen: int) -> float:
    return float(min(1.0, 2 * min(probabilities[: seen + 1].sum(), probabilities[seen:].sum())))


def _normal_p(distance: float, deviation: float) -> float:
    if not deviation:
        return 1.0
    # Ranks are doubled, so that a step of the statistic is 2 and half of it 1.
    return 2 * (1 - NormalDist().cdf(max(0.0, abs(distance) - 1.0) / deviation))


def _doubled_ranks(values: _Floats) -> npt.NDArray[np.int64]:
    """Returns twice the rank of each value, equal values sharing their mean rank: integers, whatever the ties."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: npt.NDArray[np.int64] = (2 * last - counts + 1)[inverse]
    return ranks
