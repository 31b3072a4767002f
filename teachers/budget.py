"""What a run may spend, and whether one more request still fits.

A budget covers one generate run over all its attempts: what it has bought since it first began, not what it found in
the ledgers. Requests in flight are counted at the mean price of an answer (judges and probes included), so a run stops
short of its limit instead of beyond it; hours are those of this process. The shards of a run share a budget equally.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from distill.config import Budget, Prices, TeacherConfig
from distill.engines import Completion
from distill.records import Usage, write_json

from .ledger import Ledger, Spent, billed_tokens

SECONDS_PER_HOUR = 3600.0
TOKENS_PER_MTOK = 1_000_000


def dollars(prices: Prices | None, usage: Usage, raw: str = "") -> float:
    """What so many tokens cost; 0 where no prices are known."""
    if prices is None:
        return 0.0
    output = billed_tokens(usage.output, raw)
    return (usage.input * prices.input_usd_per_mtok + output * prices.output_usd_per_mtok) / TOKENS_PER_MTOK


def cost_usd(teacher: TeacherConfig, completion: Completion) -> float:
    """Dollars of one answer: as the engine knows them, else by the recipe's prices."""
    if completion.cost_usd is not None:
        return completion.cost_usd
    return dollars(teacher.prices, completion.usage, completion.raw)


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
    """The budget of one generate run over the ledgers it buys into.

    `before` is what each ledger had cost when the run first began. Answers are counted in the ledgers that `judges`
    does not name; those of judges only add to what an answer costs.
    """

    def __init__(
        self,
        budget: Budget,
        ledgers: Mapping[str, Ledger],
        before: Mapping[str, Spent],
        share: int = 1,
        judges: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget = budget
        self.ledgers = ledgers
        self.before = before
        self.share = share
        self.judges = judges
        self.clock = clock
        self.started_s = clock()
        self.probes = Spent()

    @property
    def spent(self) -> Spent:
        """What this run has spent over all its attempts."""
        total = self.probes
        for name, spent in self._by_ledger():
            total = total.plus(spent.less(self.before.get(name, Spent())))
        return total

    def _by_ledger(self) -> Iterator[tuple[str, Spent]]:
        """What each ledger has cost; a judge's verdict is no answer."""
        for name, ledger in self.ledgers.items():
            yield name, ledger.spent._replace(answers=0) if name in self.judges else ledger.spent

    def pay_probe(self, usage: Usage, prices: Prices | None) -> None:
        """Count what trying the servers has cost."""
        self.probes = self.probes.plus(Spent(0, usage.output, dollars(prices, usage)))

    def fits(self, in_flight: int) -> bool:
        """Whether one further request may be sent now."""
        return all(limit.fits(1, in_flight) for limit in self.limits())

    def limits(self) -> list[Limit]:
        """The recipe's limits as they stand."""
        if not self._limited:
            return []
        spent, ever = self.spent, Spent()
        for _, of_ledger in self._by_ledger():
            ever = ever.plus(of_ledger)
        hours = (self.clock() - self.started_s) / SECONDS_PER_HOUR
        known_prices = ever.answers and all(self.ledgers[name].spent.answers for name in self.judges)
        mean_tokens = ever.output_tokens / ever.answers if known_prices else None
        mean_usd = ever.usd / ever.answers if known_prices else None
        known = [
            ("usd", self._part(self.budget.usd), spent.usd, mean_usd),
            ("output_tokens", self._part(self.budget.output_tokens), float(spent.output_tokens), mean_tokens),
            ("hours", self.budget.hours, hours, 0.0),
        ]
        return [Limit(key, float(limit), used, each) for key, limit, used, each in known if limit is not None]

    def reached(self, more: int = 1) -> Limit | None:
        """The limit that lets so many further requests not through when none are in flight; None if they fit."""
        return next((limit for limit in self.limits() if not limit.fits(more, 0)), None)

    @property
    def _limited(self) -> bool:
        return self.budget != Budget()

    def _part(self, limit: float | None) -> float | None:
        return None if limit is None else limit / self.share


def spent_before(path: Path, ledgers: Mapping[str, Ledger]) -> dict[str, Spent]:
    """What each ledger had cost when this run first began, remembered in a file over the run's attempts."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if missing := ledgers.keys() - known.keys():
        known |= {name: ledgers[name].spent._asdict() for name in missing}
        write_json(path, known)
    return {name: Spent(**known[name]) for name in ledgers}
