"""Statistics of the benchmark: exact tests, intervals that cover, alarms that are rare, effects that are found."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dcpbench.bench.goodput import goodput
from dcpbench.bench.memory_law import MemoryPoint, fit
from dcpbench.bench.stats import Comparison, compare_paired, compare_unpaired, holm, verdict_of

MIB = 1 << 20


def enumerated_rank_sum(first, second):
    """The two-sided p of the rank sum, by looking at every way to deal the values out."""
    values = [*first, *second]
    rank = {v: np.mean([i + 1 for i, w in enumerate(sorted(values)) if w == v]) for v in values}
    sums = [sum(rank[v] for v in dealt) for dealt in itertools.combinations(values, len(second))]
    seen = sum(rank[v] for v in second)
    below, above = (np.mean([f(s, seen) for s in sums]) for f in (np.less_equal, np.greater_equal))
    return min(1.0, 2 * min(below, above))


@pytest.mark.parametrize(
    ("first", "second"),
    [([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]), ([1, 3, 5, 7], [2, 4, 6, 8]), ([1, 1, 2, 3], [2, 3, 3, 4]), ([1, 9], [2, 3])],
)
def test_the_rank_sum_is_exact(first, second):
    assert compare_unpaired(first, second).p == pytest.approx(enumerated_rank_sum(first, second))


def test_the_signed_rank_is_exact():
    assert compare_paired([1, 1, 1, 1, 1], [2, 3, 4, 5, 6]).p == pytest.approx(2 / 32)
    assert compare_paired([1, 2, 3], [1, 2, 3]).p == 1.0
    differences = [1, -2, 3, 4, 5, -6]
    sums = [
        sum(r for r, keep in zip(range(1, 7), signs, strict=True) if keep)
        for signs in itertools.product((0, 1), repeat=6)
    ]
    below = np.mean([total <= 1 + 3 + 4 + 5 for total in sums])
    above = np.mean([total >= 1 + 3 + 4 + 5 for total in sums])
    found = compare_paired([1.0] * 6, [math.exp(d) for d in differences]).p
    assert found == pytest.approx(min(1.0, 2 * min(below, above)))


def test_large_samples_agree_with_exact_ones():
    generator = np.random.default_rng(3)
    for size in (26, 51):  # 52 in all, and 51 pairs: just above where the exact test ends
        one, other = np.exp(generator.normal(0, 0.1, size)), np.exp(generator.normal(0.03, 0.1, size))
        near = compare_unpaired(one[:25], other[:25]).p if size == 26 else compare_paired(one[:50], other[:50]).p
        far = compare_unpaired(one, other).p if size == 26 else compare_paired(one, other).p
        assert abs(math.log10(near) - math.log10(far)) < 1


def drawn(generator, effect, noise=0.04, pairs=30):
    drift = np.exp(np.cumsum(generator.normal(0, 0.02, pairs)))
    first = drift * np.exp(generator.normal(0, noise, pairs))
    return first, effect * drift * np.exp(generator.normal(0, noise, pairs))


def test_equal_sides_are_rarely_called_different_and_a_slower_one_is():
    generator = np.random.default_rng(5)
    verdicts = {effect: [] for effect in (1.0, 1.05, 1 / 1.05)}
    covered = 0
    for effect, seen in verdicts.items():
        for _ in range(60):
            compared = compare_paired(*drawn(generator, effect))
            seen.append(verdict_of(compared, compared.p))
            covered += compared.low <= effect <= compared.high
    assert verdicts[1.0].count("slower") + verdicts[1.0].count("faster") <= 2
    assert verdicts[1.05].count("slower") >= 54
    assert verdicts[1.05].count("faster") == 0
    assert verdicts[1 / 1.05].count("faster") >= 54
    assert covered >= 171


def test_pairs_see_through_what_both_sides_share():
    drift = np.exp(np.linspace(0, 1, 20))
    noise = np.exp(np.random.default_rng(6).normal(0, 0.01, 20))
    assert compare_paired(drift, 1.05 * drift * noise).p < 1e-4
    assert compare_unpaired(drift, 1.05 * drift * noise).p > 0.3


def test_the_interval_of_independent_sides_covers():
    generator = np.random.default_rng(6)
    compared = compare_unpaired(np.exp(generator.normal(0, 0.02, 12)), np.exp(generator.normal(0.1, 0.02, 12)))
    assert compared.low < math.exp(0.1) < compared.high


@pytest.mark.parametrize(
    ("comparison", "p", "verdict"),
    [
        (Comparison(1.05, 1.02, 1.08, 0.001, 1.03, 20), 0.001, "slower"),
        (Comparison(0.95, 0.92, 0.98, 0.001, 1.03, 20), 0.001, "faster"),
        (Comparison(1.05, 1.02, 1.08, 0.001, 1.03, 20), 0.2, "cannot tell"),
        (Comparison(1.00, 0.98, 1.02, 0.7, 1.03, 20), 0.7, "same"),
        (Comparison(1.00, 0.90, 1.02, 0.7, 1.10, 20), 0.7, "cannot tell"),
        (Comparison(1.00, 1.00, 1.00, 1.0, math.inf, 1), 1.0, "cannot tell"),
    ],
)
def test_verdicts(comparison, p, verdict):
    assert verdict_of(comparison, p) == verdict


def test_what_is_detectable_is_detected_four_times_in_five():
    generator = np.random.default_rng(7)
    detectable = np.median([compare_paired(*drawn(generator, 1.0)).detectable for _ in range(30)])
    found = [compare_paired(*drawn(generator, detectable)) for _ in range(60)]
    assert 38 <= sum(verdict_of(one, one.p) == "slower" for one in found) <= 57


def test_many_comparisons_are_corrected():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_goodput():
    assert goodput(0, 0, 0, 0, 3600) == 1.0
    blocking, background = goodput(10, 10, 0, 60, 14400), goodput(1, 10, 0.1, 60, 14400)
    assert blocking < background < 1
    cost, mtbf = 10.0, 14400.0
    interval = math.sqrt(2 * cost * mtbf)
    assert blocking == pytest.approx(1 - cost / interval - (interval / 2 + 60) / mtbf)
    assert goodput(1, 1000, 0, 0, 14400) < goodput(1, 1, 0, 0, 14400)  # no save may begin before the last one ended


def test_a_memory_law_is_found_and_its_outlier_named():
    points = [
        MemoryPoint(n, size, n * size, int(5 * MIB + 0.5 * size)) for n in (1, 2, 4) for size in (8 * MIB, 64 * MIB)
    ]
    law = fit(points)
    assert (law.base_bytes / MIB, law.per_local, law.per_global) == pytest.approx((5, 0.5, 0), abs=1e-6)
    assert law.is_local
    assert law.outliers == ()
    gathers = fit([MemoryPoint(p.world_size, p.local_bytes, p.global_bytes, p.global_bytes) for p in points])
    assert not gathers.is_local
    odd = MemoryPoint(2, 32 * MIB, 64 * MIB, 200 * MIB)
    assert odd in fit([*points * 5, odd]).outliers
