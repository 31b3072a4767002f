"""How much one server is asked at once and a minute: limits found by trial, fixed limits, token buckets.

Nothing here knows of HTTP, nor of a clock: whoever sends requests says when, so that a simulation can drive it.
`Adaptive` grows as TCP does (slow start, then additive increase; cut on push-back). A server that queues what it
cannot serve pushes back only when it is too late, so it also watches whether more in flight still means more answers.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from distill.records import Usage

START = 4
"""Requests in flight to begin with: what the smallest servers take."""
CUT = 0.7
"""What push-back leaves of the limit."""
STEPS_TO_DOUBLE = 16
"""Round trips in which additive increase doubles what a cut has left."""
GAIN_SHARE = 0.3
"""Answers a second must rise at least as this power of the requests in flight: by 23% where those double."""
WORTH_COMPARING = 0.1
"""Requests in flight (as a logarithm) must differ by so much for two rounds to say anything about growing."""
LEAP = 6.0
"""Farthest the limit runs ahead of the level that was last seen to be worth it."""
LONGEST_HOLD = 32
"""Most rounds that a limit without gain is kept before the next try."""
BURST_S = 1.0
"""Seconds' worth of an idle bucket that may go at once."""
CHARS_PER_TOKEN = 4
"""Characters a token, until a server has said how many tokens a text was."""


class Ticket(NamedTuple):
    """A request in flight: the round it was sent in, and how many were in flight with it."""

    round: int
    in_flight: int


class Limit(Protocol):
    """How many requests one server may have in flight."""

    most: int
    """Never more."""

    @property
    def allowed(self) -> int:
        """Most requests in flight now."""

    def sent(self, in_flight: int) -> Ticket:
        """A request went out; `in_flight` counts it."""

    def answered(self, ticket: Ticket, latency_s: float) -> None:
        """A good answer came."""

    def pushed_back(self, ticket: Ticket) -> None:
        """The server said that it is too much, or fell silent."""

    def restart(self) -> None:
        """The server was away: what it took before says nothing."""


class Fixed:
    """The recipe's own number; only back-off and the server's own waits slow it down."""

    def __init__(self, allowed: int) -> None:
        self.allowed = self.most = allowed

    def sent(self, in_flight: int) -> Ticket:
        """Nothing to learn."""
        return Ticket(0, in_flight)

    def answered(self, ticket: Ticket, latency_s: float) -> None:
        """Nothing to learn."""

    def pushed_back(self, ticket: Ticket) -> None:
        """Nothing to learn."""

    def restart(self) -> None:
        """Nothing was learnt."""


# --- a limit found by trial -----------------------------------------------------------------------------------------


@dataclass
class Measured:
    """Requests in flight and latencies of a round, in logarithms: what counts is by which factor they differ."""

    count: int = 0
    in_flight: float = 0.0
    latency: float = 0.0
    latency_squares: float = 0.0

    def add(self, in_flight: int, latency_s: float) -> None:
        """Count one answer."""
        latency = math.log(max(latency_s, 1e-6))
        self.count += 1
        self.in_flight += math.log(in_flight)
        self.latency += latency
        self.latency_squares += latency * latency

    @property
    def load(self) -> float:
        """Requests in flight."""
        return self.in_flight / self.count

    @property
    def throughput(self) -> float:
        """Answers a second, by Little's law."""
        return self.load - self.latency / self.count

    @property
    def variance(self) -> float:
        """Of `throughput`: a few answers say little."""
        mean = self.latency / self.count
        return max(self.latency_squares / self.count - mean * mean, 0.0) / self.count


@dataclass
class Adaptive:
    """A limit found by trial.

    A round is as many answers, to requests sent within it, as were allowed when it began: about one round trip. The
    limit grows only while it is what holds requests back. Push-back cuts it once a round; from there it grows by
    steps. Where a round with more in flight surely brought no more answers a second than the last good one, the limit
    goes back to that and is held there, twice as long each time, before the next try.
    """

    most: int
    start: float = START
    _allowed: float = 0.0
    _step: float = 0.0
    """Additive increase a round; 0 while in slow start."""
    _round: int = 0
    _size: int = 0
    """Answers that end the round: what was allowed when it began."""
    _cut_round: int = 0
    """The round that began with the last cut; what was sent before it cuts no more."""
    _peak: int = 0
    _peak_before: int = 0
    """Most in flight in this round and in the one before."""
    _now: Measured = field(default_factory=Measured)
    _good: Measured | None = None
    """The last level at which more in flight brought more answers."""
    _hold: int = 0
    _patience: int = 1

    def __post_init__(self) -> None:
        self.restart()

    @property
    def allowed(self) -> int:
        """Most requests in flight now."""
        return int(self._allowed)

    def restart(self) -> None:
        """Begin again, as with a server never asked before."""
        self._allowed = min(max(1.0, self.start), float(self.most))
        self._step, self._good, self._hold, self._patience = 0.0, None, 0, 1
        self._begin_round()

    def sent(self, in_flight: int) -> Ticket:
        """A request went out; `in_flight` counts it."""
        self._peak = max(self._peak, in_flight)
        return Ticket(self._round, in_flight)

    def answered(self, ticket: Ticket, latency_s: float) -> None:
        """A good answer came: grow, and at the end of a round see what growing has brought."""
        if ticket.round == self._round:
            self._now.add(ticket.in_flight, latency_s)
        if self._may_grow():
            self._allowed = min(self._allowed + (self._step / self._allowed or 1.0), float(self.most))
        if self._now.count >= self._size:
            self._judge()
            self._begin_round()

    def pushed_back(self, ticket: Ticket) -> None:
        """Cut, unless this is more of what the last cut was for."""
        if ticket.round < self._cut_round:
            return
        self._allowed = max(1.0, self._allowed * CUT)
        self._step = max(1.0, self._allowed / STEPS_TO_DOUBLE)
        self._good, self._hold = None, 0
        self._begin_round()
        self._cut_round = self._round

    def _may_grow(self) -> bool:
        """Whether the limit was reached lately, is not held, and is not too far ahead of what was seen to be good."""
        peak = max(self._peak, self._peak_before)
        if self._hold or peak < self._size or self._allowed >= 2 * peak:
            return False
        return self._good is None or self._allowed < LEAP * math.exp(self._good.load)

    def _begin_round(self) -> None:
        self._round += 1
        self._size = self.allowed
        self._peak_before, self._peak = self._peak, 0
        self._now = Measured()

    def _judge(self) -> None:
        """Compare the round with the last good one: better, no better, or (few answers that differ much) unclear."""
        if self._hold:
            self._hold -= 1
            self._good = self._now
            return
        if self._good is None or (more := self._now.load - self._good.load) < WORTH_COMPARING:
            self._good = self._now
            return
        gain = self._now.throughput - self._good.throughput - GAIN_SHARE * more
        doubt = math.sqrt(self._now.variance + self._good.variance)
        if gain > doubt:
            self._good, self._patience = self._now, 1
        elif gain < -doubt / 2:
            self._allowed = float(math.ceil(math.exp(self._good.load)))
            self._hold, self._patience = self._patience, min(2 * self._patience, LONGEST_HOLD)


# --- so much a minute -----------------------------------------------------------------------------------------------


class Bucket:
    """At most so much a minute: what is taken beyond the level is a debt that is waited off."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.rate = per_minute / 60
        self.most = max(1.0, self.rate * BURST_S)
        self._level, self._at = self.most, now

    def wait_s(self, now: float) -> float:
        """Seconds until something may be taken."""
        self._level = min(self.most, self._level + (now - self._at) * self.rate)
        self._at = now
        return max(0.0, -self._level / self.rate)

    def take(self, amount: float) -> None:
        """Take; a negative amount gives back what was not needed after all."""
        self._level -= amount


class Forecast:
    """Tokens that a request will take: its text by length, its answer as long as those before it."""

    def __init__(self) -> None:
        self.chars = self.input = self.output = self.answers = 0

    def tokens(self, chars: int, max_new_tokens: int) -> float:
        """Input and output of a request with so many characters."""
        a_char = self.input / self.chars if self.chars and self.input else 1 / CHARS_PER_TOKEN
        return chars * a_char + (self.output / self.answers if self.answers else max_new_tokens)

    def learn(self, chars: int, usage: Usage) -> None:
        """What a request has really taken."""
        self.chars += chars if usage.input else 0
        self.input += usage.input
        self.output += usage.output
        self.answers += 1
