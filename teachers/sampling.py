"""The sampling policy: how many samples a prompt gets, and with which token limits.

A fixed number and `until` are one rule: ask for as many samples as are surely needed to reach `correct` right ones,
within `tries`. So an adaptive prompt is never asked for a sample that an ideal one-at-a-time policy would not ask for,
its samples are always the lowest indices, and which ones they are depends on the answers alone, not on their order.
A sample that was cut off climbs a ladder of token limits; each rung has a ledger of its own, because what is sent
differs.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from distill.config import Sampling, TeacherConfig, Until
from distill.engines import Request, sample_seed
from distill.records import Prompt, Trace, read_records
from distill.runs import Shard

from .ledger import Key, Ledger, packed


def policy_of(teacher: TeacherConfig) -> Until:
    """The recipe's rule; `sampling.n` samples are n right ones wanted in n tries."""
    return teacher.until or Until(correct=teacher.sampling.n, tries=teacher.sampling.n)


@dataclass
class Course:
    """How far one prompt has come."""

    prompt: Prompt
    policy: Until
    begun: int = 0
    pending: int = 0
    correct: int = 0
    stopped: bool = False
    """No further sample makes sense: the teacher refuses the prompt."""
    closed: bool = False
    """It was counted as done."""

    def begin(self) -> range:
        """Sample indices that are surely needed now; they count as begun."""
        needed = self.policy.correct - self.correct - self.pending
        count = 0 if self.stopped else max(0, min(self.policy.tries - self.begun, needed))
        first, self.begun = self.begun, self.begun + count
        self.pending += count
        return range(first, self.begun)

    def conclude(self, correct: bool) -> None:
        """A sample has its final answer."""
        self.pending -= 1
        self.correct += correct

    @property
    def done(self) -> bool:
        """Whether every sample that was begun has its final answer and no other one is needed."""
        return self.pending == 0 and (
            self.stopped or self.begun == self.policy.tries or self.correct >= self.policy.correct
        )


# --- the ladder of token limits -------------------------------------------------------------------------------------


class Rung(NamedTuple):
    """One token limit, with the ledger of what is asked with it."""

    sampling: Sampling
    cfg: str
    ledger: Ledger


class Standing(NamedTuple):
    """Where a sample stands on the ladder."""

    rung: int
    owed: bool
    """Whether that rung still has to be asked; else it has the final answer."""


@dataclass(frozen=True)
class Ladder:
    """The rungs in order; a sample climbs while it is cut off."""

    rungs: tuple[Rung, ...]

    def standing(self, key: Key) -> Standing:
        """The rung to ask next, or the one with the final answer."""
        for number, rung in enumerate(self.rungs):
            if not rung.ledger.answered(key):
                return Standing(number, True)
            if not rung.ledger.truncated(key):
                return Standing(number, False)
        return Standing(len(self.rungs) - 1, False)

    def climbs(self, key: Key, rung: int) -> bool:
        """Whether the answer on a rung was cut off and there is a higher one."""
        return rung + 1 < len(self.rungs) and self.rungs[rung].ledger.truncated(key)

    def final(self, key: Key) -> Trace | None:
        """The final answer, or the record of why there is none."""
        return self.rungs[self.standing(key).rung].ledger.get(key)

    def traces(self, key: Key) -> Iterator[Trace]:
        """Every answer to a sample, cut-off ones included, by rung."""
        for rung in self.rungs[: self.standing(key).rung + 1]:
            if rung.ledger.answered(key):
                trace = rung.ledger.get(key)
                assert trace is not None  # it is answered
                yield trace


def replay(prompt: Prompt, policy: Until, ladder: Ladder, correct: Container[int]) -> Course:
    """The course of a prompt as its answers have it; `correct` holds the packed keys of those that verified.

    It ends at the first sample that has no final answer.
    """
    course = Course(prompt, policy)
    while samples := course.begin():
        for sample in samples:
            key = (prompt.prompt_id, sample)
            course.stopped |= ladder.standing(key).owed
            course.conclude(packed(key) in correct)
    return course


# --- what is wanted -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """The prompts to answer, streamed from their file: those of a shard, less those removed on request."""

    file: Path
    shard: Shard | None = None
    removed: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    """Just these prompts; None for all."""

    def __iter__(self) -> Iterator[Prompt]:
        return (prompt for prompt in read_records(self.file, Prompt) if self._has(prompt.prompt_id))

    def _has(self, prompt_id: str) -> bool:
        if prompt_id in self.removed or (self.only is not None and prompt_id not in self.only):
            return False
        return self.shard is None or self.shard.has(prompt_id)


def request_of(prompt: Prompt, sample: int, sampling: Sampling, teacher: TeacherConfig) -> Request:
    """What is sent for one sample; its seed is the same on every rung."""
    return Request(prompt, sample, sampling, sample_seed(sampling.seed, prompt.prompt_id, sample), teacher.system)
