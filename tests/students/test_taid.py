"""The share of the teacher in TAID's target, beside a derivation of its own in exact fractions."""

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import KdPhase
from distill.students.taid import TeacherShare

LOSSES = [3.0, 2.4, 2.5, 1.9, 1.2, 1.3, 1.25, 0.9]


def phase(**changes: Any) -> KdPhase:
    return KdPhase(**({"kind": "kd", "divergence": "taid", "taid_schedule": "adaptive"} | changes))


def shares(of: KdPhase, losses: list[float]) -> list[float]:
    """The share at every step of a training with these losses."""
    share, found = TeacherShare(of, len(losses)), []
    for step, loss in enumerate(losses):
        found.append(share.at(step))
        share.take(step, loss)
    return found


def rederived(losses: list[float], start: str, end: str, rate: str, keep: str) -> list[float]:
    """t[n] = min(end, max(even[n], t[n-1] + rate * sigmoid(m[n]) * (1 - t[n-1]))), in exact fractions but for sigmoid.

    m[n] unrolled is a sum over all earlier changes, (1 - keep) * keep**age each; the first change is known after two
    losses, so t[2] is the first that can be ahead.
    """
    first, last, alpha, beta = map(Fraction, (start, end, rate, keep))
    exact = [Fraction(loss) for loss in losses]
    falls = [(before - after) / before for before, after in zip(exact, exact[1:])]
    found = [first]
    for n in range(1, len(exact)):
        even = first + (last - first) * Fraction(n, len(exact) - 1)
        ahead = found[-1]
        if n >= 2:
            mean = sum(((1 - beta) * beta**age * falls[n - 2 - age] for age in range(n - 1)), Fraction(0))
            ahead += alpha * Fraction(1 / (1 + math.exp(-float(mean)))) * (1 - ahead)
        found.append(min(last, max(even, ahead)))
    return [float(one) for one in found]


@pytest.mark.parametrize(("start", "end", "rate", "keep"), [("0.4", "1", "0.0005", "0.99"), ("0", "0.9", "0.7", "0.5")])
def test_the_adaptive_share_is_the_papers(start: str, end: str, rate: str, keep: str) -> None:
    of = phase(taid_start=float(start), taid_end=float(end), taid_rate=float(rate), taid_momentum=float(keep))
    found = shares(of, LOSSES)
    assert found == pytest.approx(rederived(LOSSES, start, end, rate, keep), rel=1e-12)
    even = shares(of.model_copy(update={"taid_schedule": "linear"}), LOSSES)
    assert even[0] == found[0] == float(start) and even[-1] == pytest.approx(found[-1]) == float(end)
    assert max(ours - theirs for ours, theirs in zip(found, even)) > (0.1 if rate == "0.7" else -1e-12)


def test_a_falling_loss_moves_the_target_faster_than_a_rising_one() -> None:
    of = phase(taid_rate=1.0, taid_momentum=0.0)
    falling, rising = shares(of, [4.0, 2.0, 1.0, 0.5, 0.25, 0.2]), shares(of, [1.0, 2.0, 4.0, 8.0, 16.0, 20.0])
    assert all(ours > theirs for ours, theirs in zip(falling[2:4], rising[2:4]))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(0, 0.9), st.floats(1e-4, 1), st.floats(0, 0.99))
def test_the_share_never_falls_nor_leaves_its_ends(losses: list[float], start: float, rate: float, keep: float) -> None:
    found = shares(phase(taid_start=start, taid_end=0.95, taid_rate=rate, taid_momentum=keep), losses)
    assert found == sorted(found) and found[0] == start and found[-1] <= 0.95


def test_a_share_goes_on_from_its_state() -> None:
    of = phase(taid_rate=0.5, taid_momentum=0.8)
    whole = shares(of, LOSSES)
    before = TeacherShare(of, len(LOSSES))
    for step, loss in enumerate(LOSSES[:4]):
        before.take(step, loss)
    after, found = TeacherShare(of, len(LOSSES)), []
    after.load(before.state())
    for step in range(4, len(LOSSES)):
        found.append(after.at(step))
        after.take(step, LOSSES[step])
    assert found == whole[4:]
