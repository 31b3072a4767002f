"""What a run may spend, and whether one more request still fits.

A budget covers one generate run over all its attempts: what it has bought since it first began, not what it found in
the ledger. Requests in flight are counted at the mean price of an answer, so a run stops short of its limit instead of
beyond it; hours are those of this process.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from distill.config import Budget, TeacherConfig
from distill.records import Usage, write_json

from .ledger import Ledger, Spent, billed_tokens

SECONDS_PER_HOUR = 3600.0
TOKENS_PER_MTOK = 1_000_000


def cost_usd(teacher: TeacherConfig, usage: Usage, raw: str) -> float:
    """Dollars of one answer by the recipe's prices; 0 where it gives none."""
    if teacher.prices is None:
        return 0.0
    output = billed_tokens(usage.output, raw)
    dollars = usage.input * teacher.prices.input_usd_per_mtok + output * teacher.prices.output_usd_per_mtok
    return dollars / TOKENS_PER_MTOK


class Limit(NamedTuple):
    """One kind of budget: how much was spent of how much, and what one more answer is expected to take."""

    key: str
    limit: float
    spent: float
    each: float | None
    """None until an answer has come."""

    def fits(self, more: int, in_flight: int) -> bool:
        """Whether so many further requests stay within the limit, those in flight included.

        Before the first answer nothing is known of prices: one round of requests goes out to find out.
        """
        left = self.limit - self.spent
        if left <= 0:
            return False
        return in_flight == 0 if self.each is None else (in_flight + more) * self.each <= left


class Purse:
    """The budget of one generate run."""

    def __init__(
        self, budget: Budget, ledger: Ledger, before: Spent, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.budget = budget
        self.ledger = ledger
        self.before = before
        self.clock = clock
        self.started_s = clock()

    @property
    def spent(self) -> Spent:
        """What this run has spent over all its attempts."""
        return self.ledger.spent.less(self.before)

    def fits(self, in_flight: int) -> bool:
        """Whether one further request may be sent now."""
        return all(limit.fits(1, in_flight) for limit in self.limits())

    def limits(self) -> list[Limit]:
        """The recipe's limits as they stand."""
        spent, ever = self.spent, self.ledger.spent
        hours = (self.clock() - self.started_s) / SECONDS_PER_HOUR
        mean_tokens = ever.output_tokens / ever.answers if ever.answers else None
        mean_usd = ever.usd / ever.answers if ever.answers else None
        known = [
            ("usd", self.budget.usd, spent.usd, mean_usd),
            ("output_tokens", self.budget.output_tokens, float(spent.output_tokens), mean_tokens),
            ("hours", self.budget.hours, hours, 0.0),
        ]
        return [Limit(key, float(limit), used, each) for key, limit, used, each in known if limit is not None]

    def reached(self, more: int = 1) -> Limit | None:
        """The limit that lets so many further requests not through when none are in flight; None if they fit."""
        return next((limit for limit in self.limits() if not limit.fits(more, 0)), None)


def spent_before(path: Path, ledger: Ledger) -> Spent:
    """What the ledger had cost when this run first began, remembered in the run's own folder over its attempts."""
    if not path.exists():
        write_json(path, ledger.spent._asdict())
    return Spent(**json.loads(path.read_text(encoding="utf-8")))
