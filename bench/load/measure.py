"""What all clients of the throughput benchmark share: questions, processor time, one line of result.

Imported by scripts that run in several virtual environments, so it needs nothing but the standard library.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

RESULT = "RESULT "
"""Begins the line of a client's stdout that holds its result, among whatever else it prints."""
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 1024}


def arguments(description: str, *settings: str) -> argparse.Namespace:
    """What every client takes: the server, how many requests, how many at once, and its own settings."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--url", required=True, help="address of the server, up to /v1")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", default="64")
    for name in settings:
        parser.add_argument(name, required=True)
    return parser.parse_args()


def question(number: int) -> str:
    """A question; the benchmark's server answers every one with the same number."""
    return f"A shop sells {number} apples in the morning. What is 6 times 7? Give the answer in \\boxed{{}}."


def cpu_s() -> float:
    """Processor time of this process and of its children that have ended, in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


@contextmanager
def measured(requests: int) -> Iterator[None]:
    """Print the processor and wall time of a block that completes so many requests."""
    cpu, wall = cpu_s(), time.monotonic()
    yield
    result = {"requests": requests, "cpu_s": cpu_s() - cpu, "wall_s": time.monotonic() - wall}
    print(RESULT + json.dumps(result), flush=True)
