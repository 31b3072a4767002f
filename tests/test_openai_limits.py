"""Concurrency found by trial and caps a minute, against simulated servers in simulated time."""

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from distill.engines.openai.limits import CUT, LEAP, START, Adaptive, Bucket, Fixed, Forecast, Limit, Ticket
from distill.records import Usage

MEDIAN_S, SIGMA = 4.0, 0.5
MEAN_S = MEDIAN_S * math.exp(SIGMA**2 / 2)


@dataclass
class Simulation:
    """A client that keeps as many in flight as it may, and a server with log-normal service times."""

    limit: Limit
    slots: float = math.inf
    """Requests served at once; others wait in line."""
    refuses_above: float = math.inf
    """In flight; what is more is pushed back at once."""
    wanted: float = math.inf
    """Most that the client ever wants in flight."""
    seed: int = 0
    now: float = 0.0
    in_flight: int = 0
    most_in_flight: int = 0
    answers: list[float] = field(default_factory=list)
    allowed: list[tuple[float, int]] = field(default_factory=list)

    def run(self, seconds: float) -> "Simulation":
        rng, events, line, busy, number = random.Random(self.seed), [], [], 0, 0

        def begin(ticket: Ticket, sent: float) -> None:
            nonlocal busy, number
            busy, number = busy + 1, number + 1
            done = self.now + rng.lognormvariate(math.log(MEDIAN_S), SIGMA)
            heapq.heappush(events, (done, number, "answer", ticket, sent))

        while self.now < seconds:
            while self.in_flight < min(self.limit.allowed, self.wanted):
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                ticket = self.limit.sent(self.in_flight)
                if self.in_flight > self.refuses_above:
                    number += 1
                    heapq.heappush(events, (self.now + 0.1, number, "refusal", ticket, self.now))
                elif busy < self.slots:
                    begin(ticket, self.now)
                else:
                    line.append((ticket, self.now))
            self.now, _, kind, ticket, sent = heapq.heappop(events)
            self.in_flight -= 1
            if kind == "refusal":
                self.limit.pushed_back(ticket)
                continue
            busy -= 1
            self.answers.append(self.now)
            self.limit.answered(ticket, self.now - sent)
            self.allowed.append((self.now, self.limit.allowed))
            if line:
                begin(*line.pop(0))
        return self

    def rate(self, start: float, end: float) -> float:
        return sum(start <= answer < end for answer in self.answers) / (end - start)

    def mean_allowed(self, since: float) -> float:
        late = [allowed for moment, allowed in self.allowed if moment >= since]
        return sum(late) / len(late)


# --- growing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_ninety_per_cent_of_a_fixed_thousand_within_a_minute(seed: int) -> None:
    simulated = Simulation(Adaptive(1024), seed=seed).run(75)
    assert simulated.rate(55, 65) >= 0.9 * 1024 / MEAN_S
    assert simulated.most_in_flight <= 1024


def test_a_fixed_limit_reaches_that_rate_itself() -> None:
    assert Simulation(Fixed(1024)).run(75).rate(55, 65) == pytest.approx(1024 / MEAN_S, rel=0.05)


def test_slow_start_doubles_a_round_trip() -> None:
    limit = Adaptive(1000)
    for round_trip in range(5):
        assert limit.allowed == START * 2**round_trip
        for ticket in [limit.sent(limit.allowed)] * limit.allowed:
            limit.answered(ticket, 1.0)


def test_the_limit_does_not_grow_when_something_else_holds_requests_back() -> None:
    simulated = Simulation(Adaptive(1024), wanted=10).run(300)
    assert simulated.limit.allowed <= 20
    assert Simulation(Adaptive(1024)).run(300).limit.allowed == 1024  # nothing else does


def test_the_most_allowed_is_never_exceeded() -> None:
    assert Simulation(Adaptive(50)).run(200).most_in_flight == 50
    assert Adaptive(2).allowed == 2


# --- a server that queues -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 4, 16, 64])
def test_a_server_with_few_slots_is_not_overwhelmed_and_not_idle(slots: int) -> None:
    runs = [Simulation(Adaptive(1024), slots=slots, seed=seed).run(900) for seed in range(6)]
    assert sorted(run.most_in_flight for run in runs)[2] <= 10 * slots + 16
    assert sum(run.mean_allowed(since=300) for run in runs) / 6 <= 2 * slots + 10
    assert sum(run.rate(200, 900) for run in runs) / 6 >= 0.85 * slots / MEAN_S


def test_without_looking_at_throughput_the_same_server_would_be_overwhelmed() -> None:
    class Blind(Adaptive):
        def _judge(self) -> None:
            pass

    assert Simulation(Blind(1024), slots=4).run(900).mean_allowed(since=300) > 200


def test_the_limit_never_runs_far_ahead_of_what_was_seen_to_be_good() -> None:
    limit = Adaptive(1000)
    for ticket in [limit.sent(START)] * START:
        limit.answered(ticket, 1.0)  # the first round: good at START
    for ticket in [limit.sent(8)] * 100:
        limit.answered(ticket._replace(round=-1), 1.0)  # answers of no round: it never ends
    assert limit.allowed <= LEAP * START + 1


# --- push-back ------------------------------------------------------------------------------------------------------


def test_push_back_cuts_once_a_round_trip_however_many_requests_it_hits() -> None:
    limit = Adaptive(1000, start=100)
    tickets = [limit.sent(count) for count in range(1, 101)]
    for ticket in tickets:
        limit.pushed_back(ticket)
    assert limit.allowed == 100 * CUT
    limit.pushed_back(limit.sent(70))  # sent after the cut: the server means it
    assert limit.allowed == 100 * CUT * CUT


def test_after_a_cut_growth_is_by_steps() -> None:
    limit = Adaptive(1000, start=100)
    limit.pushed_back(limit.sent(100))
    before = limit.allowed
    for _ in range(2):
        for ticket in [limit.sent(limit.allowed)] * limit.allowed:
            limit.answered(ticket, 1.0)
    assert before < limit.allowed <= 1.2 * before


@pytest.mark.parametrize("takes", [3, 50, 300])
def test_a_server_that_refuses_what_is_too_much_is_kept_nearly_full(takes: int) -> None:
    simulated = Simulation(Adaptive(1024), refuses_above=takes).run(600)
    assert simulated.rate(100, 600) >= 0.6 * takes / MEAN_S
    assert simulated.most_in_flight <= 2 * takes + START


def test_a_restart_forgets_what_the_server_took() -> None:
    limit = Simulation(Adaptive(1024)).run(100).limit
    assert limit.allowed == 1024
    limit.restart()
    assert limit.allowed == START


# --- so much a minute -----------------------------------------------------------------------------------------------


def sent_within(bucket: Bucket, cost: Callable[[], float], seconds: float) -> list[float]:
    """When requests go out that are sent as early as the bucket lets them."""
    now, moments = 0.0, []
    while (now := now + bucket.wait_s(now)) < seconds:
        bucket.take(cost())
        moments.append(now)
    return moments


def test_no_minute_has_more_requests_than_allowed_but_for_the_first_second() -> None:
    moments = sent_within(Bucket(90, now=0.0), lambda: 1, 600)
    for start in range(0, 540, 7):
        assert sum(start <= moment < start + 60 for moment in moments) <= 90 + 3
    assert len(moments) >= 890


def test_tokens_are_held_to_their_cap_though_estimates_are_wrong() -> None:
    rng, bucket, spent = random.Random(0), Bucket(60_000, now=0.0), 0.0

    def send() -> float:
        nonlocal spent
        really = rng.uniform(100, 9000)
        spent += really
        bucket.take(really - 500)  # corrected when the answer is there
        return 500

    sent_within(bucket, send, 600)
    assert spent == pytest.approx(600_000, rel=0.05)


def test_a_forecast_learns_the_length_of_texts_and_answers() -> None:
    forecast = Forecast()
    assert forecast.tokens(400, 2048) == 100 + 2048
    forecast.learn(400, Usage(input=200, output=1000))
    forecast.learn(400, Usage(input=200, output=500))
    assert forecast.tokens(400, 2048) == 200 + 750
