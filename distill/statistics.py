"""Intervals for accuracies: Wilson for one sample a problem, bootstraps by problem for more and for differences.

All intervals are 95% and two-sided. A bootstrap resamples *problems*, never single samples, since samples of one
problem are alike. Seeds are fixed, so a report's numbers are the same each time it is made.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 10_000


class Interval(NamedTuple):
    """A value with its 95% bounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval for a proportion (Wilson 1927, eq. 4 with z = 1.96).

    Raises ValueError without trials.
    """
    if trials <= 0:
        raise ValueError("a proportion takes at least one trial")
    share, z2 = successes / trials, Z95 * Z95
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    # at no or only successes one bound is the share itself, which rounding may miss
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def surely_below(successes: int, trials: int, share: float) -> bool:
    """Whether so few successes are rare where they come with probability `share`: one-sided binomial test at 2.5%.

    The same as the upper bound of Clopper and Pearson's 95% interval (1934) lying below `share`.
    """
    misses = trials - successes
    if not 0 < share < 1:
        return share >= 1 and misses > 0
    return 1 - math.fsum(_binomial(k, trials, 1 - share) for k in range(misses)) < 0.025


def _binomial(k: int, trials: int, share: float) -> float:
    ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
    return math.exp(ways + k * math.log(share) + (trials - k) * math.log1p(-share))


def bootstrap_mean(per_problem: Sequence[float], seed: int = 0) -> Interval:
    """Mean over problems with a percentile bootstrap over problems (Efron 1979)."""
    values = np.asarray(per_problem, dtype=np.float64)
    if values.size == 0:
        raise ValueError("a mean takes at least one problem")
    means = _resampled_means(values, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def accuracy(per_problem: Sequence[Sequence[bool]]) -> Interval:
    """Accuracy of samples grouped by problem: Wilson at one sample a problem, else a bootstrap by problem."""
    if all(len(samples) == 1 for samples in per_problem):
        return wilson(sum(samples[0] for samples in per_problem), len(per_problem))
    return bootstrap_mean([sum(samples) / len(samples) for samples in per_problem])


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Interval:
    """Mean of first - second over the same problems, with a paired bootstrap by problem.

    Raises ValueError if the lists are not of one length.
    """
    if len(first) != len(second):
        raise ValueError(f"a paired difference takes the same problems on both sides ({len(first)} and {len(second)})")
    return bootstrap_mean(np.subtract(first, second, dtype=np.float64).tolist(), seed)


def retained_share(before: Sequence[float], after: Sequence[float], later: Sequence[float], seed: int = 0) -> Interval:
    """Share of the gain from `before` to `after` that `later` still has, with a paired bootstrap by problem.

    The ratio mean(later - before) / mean(after - before), each resample drawing the same problems for all three; those
    without a gain count as keeping nothing. Raises ValueError as `paired_difference`.
    """
    if not len(before) == len(after) == len(later):
        raise ValueError("a retained share takes the same problems three times")
    gains = np.stack([np.subtract(after, before, dtype=np.float64), np.subtract(later, before, dtype=np.float64)])
    if gains.shape[1] == 0:
        raise ValueError("a mean takes at least one problem")
    # both means must come from the same resamples, which one seed gives
    gained, kept = (_resampled_means(row, seed) for row in gains)
    shares = np.divide(kept, gained, out=np.zeros_like(kept), where=gained > 0)
    low, high = np.quantile(shares, [0.025, 0.975])
    total = float(gains[0].mean())
    return Interval(float(gains[1].mean()) / total if total > 0 else 0.0, float(low), float(high))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided p-value that two models are right equally often, from the problems on which just one is right.

    McNemar 1947 with the binomial distribution; 1 where they never differ. Raises ValueError as `paired_difference`.
    """
    if len(first) != len(second):
        raise ValueError(f"McNemar's test takes the same problems on both sides ({len(first)} and {len(second)})")
    only_first = sum(a and not b for a, b in zip(first, second))
    only_second = sum(b and not a for a, b in zip(first, second))
    differ = only_first + only_second
    tail = sum(math.comb(differ, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << differ))


def explained_share(groups: Sequence[Sequence[float]]) -> float:
    """Share of the values' variance that their group's mean explains (eta squared); 0 where nothing varies."""
    values = np.concatenate([np.asarray(group, dtype=np.float64) for group in groups])
    total = float(((values - values.mean()) ** 2).sum())
    between = sum(len(group) * (float(np.mean(group)) - float(values.mean())) ** 2 for group in groups)
    rounding = values.size * (float(np.abs(values).max()) * 1e-12) ** 2
    return float(between / total) if total > rounding else 0.0


def _resampled_means(values: "np.ndarray[tuple[int], np.dtype[np.float64]]", seed: int) -> "np.ndarray":
    generator = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // values.size)  # bounds the memory of the index table
    parts = [
        values[generator.integers(0, values.size, size=(min(chunk, RESAMPLES - start), values.size))].mean(axis=1)
        for start in range(0, RESAMPLES, chunk)
    ]
    return np.concatenate(parts)
