"""Intervals against published tables, exact distributions and analytic cases."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.statistics import (
    RESAMPLES,
    Interval,
    _resampled_means,
    accuracy,
    bootstrap_mean,
    paired_difference,
    retained_share,
    surely_below,
    wilson,
)

# Newcombe (1998), "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17, table I:
# method 3, the score interval without continuity correction
NEWCOMBE = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}


@pytest.mark.parametrize(("counts", "bounds"), NEWCOMBE.items())
def test_wilson_gives_the_published_intervals(counts: tuple[int, int], bounds: tuple[float, float]) -> None:
    found = wilson(*counts)
    assert found.value == counts[0] / counts[1]
    assert (round(found.low, 4), round(found.high, 4)) == bounds


@given(st.integers(1, 2000), st.data())
def test_wilsons_bounds_are_where_the_score_test_just_rejects(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    share, low, high = wilson(successes, trials)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:  # (share - p)^2 = z^2 p (1 - p) / n, the definition
            assert (share - bound) ** 2 == pytest.approx(
                1.959964**2 * bound * (1 - bound) / trials, rel=1e-4, abs=1e-12
            )
    mirrored = wilson(trials - successes, trials)
    assert (mirrored.low, mirrored.high) == (pytest.approx(1 - high), pytest.approx(1 - low))


def test_a_proportion_or_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="at least one trial"):
        accuracy([])


def binomial_quantile(n: int, p: float, q: float) -> int:
    """The smallest k with P(X <= k) >= q, from the definition."""
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= q:
            return k
    return n


@pytest.mark.parametrize(("right", "problems"), [(1, 2), (1, 8), (4, 10), (25, 50)])
def test_the_bootstrap_of_a_proportion_has_the_quantiles_of_the_binomial_distribution(
    right: int, problems: int
) -> None:
    # resampling n zeros and ones draws n times with probability right / n
    found = bootstrap_mean([1.0] * right + [0.0] * (problems - right))
    bounds = [binomial_quantile(problems, right / problems, q) / problems for q in (0.025, 0.975)]
    assert found == Interval(right / problems, *map(pytest.approx, bounds))


def test_the_bootstrap_of_many_values_has_the_width_of_the_central_limit_theorem() -> None:
    values = np.random.default_rng(3).normal(10, 4, size=900)
    found = bootstrap_mean(values.tolist())
    half = 1.959964 * values.std() / math.sqrt(900)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(half, rel=0.05)
    assert found.value - found.low == pytest.approx(half, rel=0.05)


def test_samples_of_one_problem_count_as_one_problem() -> None:
    alike = [[True] * 10] * 30 + [[False] * 10] * 70
    found = accuracy(alike)
    once = wilson(30, 100)
    assert found.value == 0.3
    assert found.high - found.low == pytest.approx(once.high - once.low, rel=0.1)
    as_if_independent = wilson(300, 1000)
    assert found.high - found.low > 2.5 * (as_if_independent.high - as_if_independent.low)


def test_one_sample_a_problem_is_wilsons_case_and_any_more_are_not() -> None:
    assert accuracy([[True], [False], [True]]) == wilson(2, 3)
    assert accuracy([[True, True], [False], [True]]) == bootstrap_mean([1.0, 0.0, 1.0])
    assert accuracy([[True, False], [False], [True, True, False, False]]).value == pytest.approx((0.5 + 0 + 0.5) / 3)


def test_a_paired_difference_sees_through_what_both_models_share() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 10, size=200)
    first, second = difficulty + 1 + rng.normal(0, 0.5, 200), difficulty
    found = paired_difference(first.tolist(), second.tolist())
    half = 1.959964 * (first - second).std() / math.sqrt(200)
    assert found.value == pytest.approx((first - second).mean())
    assert found.low == pytest.approx(found.value - half, abs=0.01) and found.low > 0.8
    unpaired = 1.959964 * math.sqrt((first.var() + second.var()) / 200)
    assert unpaired > 20 * half, "unpaired, the same difference could not be told from none"


def test_a_paired_difference_by_hand() -> None:
    # right on 1 of 2 that the other missed: the mean of two draws from (1, 0) is 0, 1/2 or 1 with 1/4, 1/2, 1/4
    assert paired_difference([1, 1], [0, 1]) == Interval(0.5, 0.0, 1.0)
    assert paired_difference([1, 0, 1], [1, 0, 1]) == Interval(0.0, 0.0, 0.0)
    assert paired_difference([1, 0], [0, 1]).value == 0
    swapped = paired_difference([0, 1, 1, 0.5], [1, 1, 0.25, 0])
    assert swapped.value == pytest.approx((-1 + 0 + 0.75 + 0.5) / 4)


def test_different_problems_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match=r"same problems on both sides \(2 and 3\)"):
        paired_difference([1, 0], [1, 0, 1])


@pytest.mark.parametrize("problems", [3, 4097])
def test_a_report_made_twice_says_the_same_and_every_resample_counts(problems: int) -> None:
    values = np.random.default_rng(1).random(problems).tolist()
    assert bootstrap_mean(values) == bootstrap_mean(values)
    means = _resampled_means(np.asarray(values), 0)  # many problems are resampled in parts
    assert len(means) == RESAMPLES and len(np.unique(means)) >= min(10, RESAMPLES // 2)
    assert not np.array_equal(means, _resampled_means(np.asarray(values), 1))


def test_an_interval_reads_as_percentages() -> None:
    assert str(Interval(0.5, 0.25, 0.755)) == "50.0% [25.0%, 75.5%]"


def test_a_retained_share_is_the_later_gain_over_the_first() -> None:
    before, after, later = [0.0] * 8, [1.0] * 6 + [0.0] * 2, [1.0] * 3 + [0.0] * 5
    found = retained_share(before, after, later)
    assert found.value == 0.5 and found.low < 0.5 < found.high <= 1.0
    assert retained_share(before, after, after) == (1.0, 1.0, 1.0)
    assert retained_share(after, before, later).value == 0.0  # no gain, nothing to keep
    with pytest.raises(ValueError, match="the same problems three times"):
        retained_share([0.0], [1.0, 1.0], [1.0])


def test_a_retained_share_pairs_its_resamples_by_problem() -> None:
    """Where every problem's gain is kept to the same half, no resample can say anything but a half."""
    gains = [float(k % 5) for k in range(40)]
    found = retained_share([0.0] * 40, gains, [gain / 2 for gain in gains])
    assert found == pytest.approx((0.5, 0.5, 0.5))


@given(st.integers(1, 60), st.data())
def test_surely_below_is_the_exact_binomial_test(trials: int, data: st.DataObject) -> None:
    successes, percent = data.draw(st.integers(0, trials)), data.draw(st.integers(1, 99))
    share = Fraction(percent, 100)
    at_most = sum(math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(successes + 1))
    if abs(at_most - Fraction(25, 1000)) > Fraction(1, 10**9):
        assert surely_below(successes, trials, float(share)) is (at_most < Fraction(25, 1000))


def test_surely_below_takes_many_trials_and_certainty() -> None:
    assert not surely_below(96_900, 100_000, 0.97) and surely_below(96_500, 100_000, 0.97)
    assert surely_below(9, 10, 1.0) and not surely_below(10, 10, 1.0) and not surely_below(0, 10, 0.0)
