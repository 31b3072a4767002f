"""On-policy data: in every step the student answers some of the prompts itself, and is corrected on what it wrote.

Answers are drawn in batches cut from the step's prompts, each with a seed of its own, by whichever process has the
batch; so neither the number of processes nor a resume changes them. A student that does not stop, or whose answers grow
without end, is not trained further: guards look at windows of answers, and end the training with the reason.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distill.config import OnPolicyPhase
from distill.documents import Documents
from distill.engines.transformers import end_ids
from distill.errors import TrainingError
from distill.format import ANSWER, EOS, PROMPT, Document

from .distributed import World
from .writers import Batch, Writer


@dataclass
class Guard:
    """Watches how answers end and how long they are, window by window; part of a checkpoint."""

    window: int
    min_stop_rate: float
    max_growth: float
    stopped: int = 0
    """Answers of the open window that ended by themselves."""
    answers: int = 0
    tokens: int = 0
    first_mean: float | None = None
    """Mean length of the first window's answers."""
    last: dict[str, float] = field(default_factory=dict)
    """Stop rate and mean length of the window before."""

    @classmethod
    def of(cls, phase: OnPolicyPhase) -> "Guard":
        """As a phase asks for."""
        return cls(phase.guard_window, phase.min_stop_rate, phase.max_length_growth)

    def take(self, lengths: Sequence[int], stopped: Sequence[bool]) -> None:
        """Count answers; at the end of a window raise TrainingError if they do not stop or have grown too much."""
        self.answers += len(lengths)
        self.stopped += sum(stopped)
        self.tokens += sum(lengths)
        if self.answers < self.window:
            return
        rate, mean = self.stopped / self.answers, self.tokens / self.answers
        self.stopped = self.answers = self.tokens = 0
        self.last = {"stop_rate": rate, "mean_tokens": mean}
        self._judge(rate, mean)

    def _judge(self, rate: float, mean: float) -> None:
        if rate < self.min_stop_rate:
            why = "such a student first needs an sft phase" if self.first_mean is None else "training has made it so"
            raise TrainingError(
                f"on-policy: {rate:.0%} of the student's answers end by themselves (min_stop_rate is"
                f" {self.min_stop_rate:.0%}): {why}; put an sft phase before this one, raise max_new_tokens, or lower"
                " lr"
            )
        if self.first_mean is None:
            self.first_mean = mean
        elif mean > self.max_growth * self.first_mean:
            raise TrainingError(
                f"on-policy: the student's answers have grown from {self.first_mean:.0f} to {mean:.0f} tokens (limit:"
                f" {self.max_growth:g} times); lower lr, mix in traces (on_policy_fraction below 1), or raise"
                " max_length_growth"
            )

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: getattr(self, name) for name in ("stopped", "answers", "tokens", "first_mean", "last")}

    def load(self, state: dict[str, Any]) -> None:
        """The way back of `state`."""
        for name, value in state.items():
            setattr(self, name, value)


@dataclass
class Rollouts:
    """Turns a step's documents into what the student writes to their prompts."""

    phase: OnPolicyPhase
    writer: Writer
    guard: Guard
    context: int
    """Longest text, prompt and answer together, that student and teachers can read."""
    _synced: bool = False
    """Whether this process has given the writer weights."""

    def documents(
        self, model: Any, documents: Documents, chosen: Sequence[int], step: int, world: World
    ) -> tuple[Documents, list[int]]:
        """The step's documents with some answers replaced by the student's own, and their numbers.

        A prompt that has no room left in the context keeps its trace, or is left out where only drawn tokens may teach.
        Raises TrainingError if nothing is left.
        """
        if not self._synced or step % self.phase.sync_every_steps == 0:
            self.writer.sync(model)
            self._synced = True
        own = self._own(documents, chosen, step)
        prompts = [prompt_of(documents, chosen[place]) for place in own]
        answers = self._answers(prompts, step, world)
        ends = set(end_ids(model))
        stopped = [bool(answer) and answer[-1] in ends for answer in answers]
        self.guard.take([len(answer) for answer in answers], stopped)
        written = [
            document_of(prompt, answer, ended) for prompt, answer, ended in zip(prompts, answers, stopped) if answer
        ]
        kept = [
            Document(documents.ids(index).tolist(), documents.segments(index).tobytes(), False)
            for place, index in enumerate(chosen)
            if place not in own and self.phase.divergence != "sampled_reverse_kl"
        ]
        if not written and not kept:
            raise TrainingError(
                f"on-policy: in step {step + 1} no prompt has room for an answer within {self.context:,} tokens, or all"
                " answers were empty; select shorter prompts"
            )
        made = Documents.of([*written, *kept])
        return made, list(range(len(made)))

    def _own(self, documents: Documents, chosen: Sequence[int], step: int) -> list[int]:
        """Which of the chosen, by place, the student answers: their share on average, also in steps of one document."""
        order = [place for place, index in enumerate(chosen) if len(prompt_of(documents, index)) < self.context]
        rng = random.Random(f"{self.phase.seed}:on-policy:{step}")
        rng.shuffle(order)
        return order[: math.floor(self.phase.on_policy_fraction * len(chosen) + rng.random())]

    def _answers(self, prompts: Sequence[list[int]], step: int, world: World) -> list[list[int]]:
        size = self.phase.batch_size
        cuts = [(number, prompts[at : at + size]) for number, at in enumerate(range(0, len(prompts), size))]
        own = world.share(cuts)
        batches = [
            Batch(
                some,
                min(self.phase.max_new_tokens, self.context - max(map(len, some))),
                random.Random(f"{self.phase.seed}:{step}:{number}").getrandbits(31),
            )
            for number, some in own
        ]
        mine = {number: answers for (number, _), answers in zip(own, self.writer.write(batches), strict=True)}
        everyones = {number: answers for one in world.gathered(mine) for number, answers in one.items()}
        return [answer for number, _ in cuts for answer in everyones[number]]


def prompt_of(documents: Documents, index: int) -> list[int]:
    """Ids of a document before its first supervised token."""
    segments = documents.segments(index)
    start = int(np.argmax(segments != PROMPT))
    return list(map(int, documents.ids(index)[:start]))


def document_of(prompt: list[int], answer: list[int], ended: bool) -> Document:
    """A prompt with an answer; the last token is an end token only where the student wrote one."""
    kinds = bytes([ANSWER]) * (len(answer) - 1) + bytes([EOS if ended else ANSWER])
    return Document([*prompt, *answer], bytes([PROMPT]) * len(prompt) + kinds, False)
