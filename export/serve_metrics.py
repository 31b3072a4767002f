"""What a server counts, as Prometheus reads it: counters, gauges and histograms in its text format."""

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Sequence

TTFT_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
LATENCY_S = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
RATE_WINDOW_S = 10.0


class Histogram:
    """Observations by upper bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        """Cumulative buckets, sum and count."""
        total, lines = 0, []
        for bound, count in zip((*self.bounds, "+Inf"), self.counts):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {total}"]


class Rate:
    """Events a second over the last seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events: deque[tuple[float, int]] = deque()

    def add(self, count: int) -> None:
        """Count events that happened now."""
        self._events.append((self._clock(), count))
        self._forget()

    @property
    def per_second(self) -> float:
        """Mean over the window."""
        self._forget()
        return sum(count for _, count in self._events) / RATE_WINDOW_S

    def _forget(self) -> None:
        while self._events and self._events[0][0] < self._clock() - RATE_WINDOW_S:
            self._events.popleft()


class Metrics:
    """Everything a server counts."""

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()
        """By HTTP status."""
        self.finished: Counter[str] = Counter()
        """Answers by how they ended."""
        self.prompt_tokens = 0
        self.shared_tokens = 0
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.ttft = Histogram(TTFT_S)
        self.latency = Histogram(LATENCY_S)
        self.rate = Rate()

    def text(self, running: int, waiting: int, connections: int, refused: int) -> str:
        """The page that is scraped."""
        lines: list[str] = []

        def put(name: str, kind: str, help: str, values: Sequence[str]) -> None:
            lines.extend((f"# HELP distill_{name} {help}", f"# TYPE distill_{name} {kind}"))
            lines.extend(f"distill_{value}" for value in values)

        by_status = [f'requests_total{{status="{status}"}} {n}' for status, n in sorted(self.requests.items())]
        by_end = [f'answers_total{{finish="{finish}"}} {n}' for finish, n in sorted(self.finished.items())]
        put("requests_total", "counter", "HTTP requests by status.", by_status)
        put("answers_total", "counter", "Answers by how they ended.", by_end)
        for name in ("prompt", "shared", "completion", "reasoning"):
            count = getattr(self, f"{name}_tokens")
            put(f"{name}_tokens_total", "counter", f"Tokens: {name}.", [f"{name}_tokens_total {count}"])
        put("running_rows", "gauge", "Texts being written.", [f"running_rows {running}"])
        put("queue_depth", "gauge", "Requests that wait for a place.", [f"queue_depth {waiting}"])
        put("connections", "gauge", "Open connections.", [f"connections {connections}"])
        put("connections_refused_total", "counter", "Beyond the limit.", [f"connections_refused_total {refused}"])
        rate = f"tokens_per_second {self.rate.per_second:.3f}"
        put(
            "tokens_per_second",
            "gauge",
            f"New tokens a second of answers that ended in the last {RATE_WINDOW_S:.0f} s.",
            [rate],
        )
        put("ttft_seconds", "histogram", "Seconds to the first token.", self.ttft.lines("ttft_seconds"))
        put("request_seconds", "histogram", "Seconds to the last token.", self.latency.lines("request_seconds"))
        return "\n".join(lines) + "\n"
