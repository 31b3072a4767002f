"""Adaptive stopping (`until`) through the real scheduler, against an ideal one-at-a-time policy and a fixed n.

    python bench/adaptive_stopping.py --check

Prompts have pass rates drawn from Beta(1.1, 0.9); a wrong sample takes 1.6 times the tokens, and the time, of a right
one. An engine that sleeps instead of thinking answers 256 requests at once; everything else (ledger, journal, verifier,
policy) is what `distill generate` runs. The ideal policy asks for one sample at a time and stops a prompt as soon as
enough are right, so it spends the fewest tokens; fixed n = 4 asks for four of every prompt. A policy that even ideally
spends more tokens than fixed n = 4 does is shown, but its wall time is not judged.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from typing import Any

from distill.config import TeacherConfig, Until
from distill.engines import Completion, Request
from distill.interrupts import Stop
from distill.progress import Bar
from distill.records import Message, Prompt, Usage, digest_json, write_records
from distill.teachers.budget import Purse
from distill.teachers.collection import Collection, Judging
from distill.teachers.ledger import Ledger
from distill.teachers.sampling import Ladder, Rung, Wanted, policy_of
from distill.verifiers import resolve
from distill.verifiers.pool import VerifierPool

MOST_TOKENS_OVER_IDEAL = 1.05
MOST_WALL_OVER_FIXED = 1.3
IN_FLIGHT = 256
RIGHT_TOKENS, WRONG_FACTOR = 1000, 1.6
OUT = Path("build/bench/adaptive_stopping.json")


class Model:
    """Answers by dice that depend on prompt and sample alone, after a time in proportion to the tokens."""

    name, version, batch_size = "openai", "bench", None

    def __init__(self, seconds_per_answer: float) -> None:
        self.seconds = seconds_per_answer
        self.tokens = 0

    def sample(self, prompt: Prompt, sample: int) -> tuple[bool, int]:
        """Whether a sample is right, and its tokens."""
        rate = random.Random(prompt.prompt_id).betavariate(1.1, 0.9)
        dice = random.Random(digest_json([prompt.prompt_id, sample]))
        right = dice.random() < rate
        length = dice.lognormvariate(0, 0.4) * RIGHT_TOKENS * (1 if right else WRONG_FACTOR)
        return right, max(1, round(length))

    async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        """As an engine does, 256 at a time."""
        room, done = asyncio.Semaphore(IN_FLIGHT), asyncio.Queue[Completion | None]()

        async def answer(request: Request) -> None:
            right, tokens = self.sample(request.prompt, request.sample)
            await asyncio.sleep(self.seconds * tokens / RIGHT_TOKENS)
            self.tokens += tokens
            text = f"\\boxed{{{request.prompt.gold if right else 'no'}}}"
            done.put_nowait(Completion(request.key, answer=text, raw=text, usage=Usage(output=tokens)))

        async def pull() -> None:
            tasks = set()
            source = aiter(requests)
            while True:
                await room.acquire()
                request = await anext(source, None)
                if request is None:
                    break
                tasks.add(asyncio.create_task(answer(request)))
            await asyncio.gather(*tasks)
            done.put_nowait(None)

        puller = asyncio.create_task(pull())
        while (completion := await done.get()) is not None:
            yield completion
            room.release()
        await puller

    async def close(self) -> None:
        """Nothing is held."""


def ideal_tokens(model: Model, prompts: list[Prompt], policy: Until) -> int:
    """What asking for one sample at a time would spend."""
    spent = 0
    for prompt in prompts:
        right = 0
        for sample in range(policy.tries):
            correct, tokens = model.sample(prompt, sample)
            spent += tokens
            right += correct
            if right >= policy.correct:
                break
    return spent


def measure(prompts: list[Prompt], seconds: float, **policy: Any) -> tuple[int, float, Collection]:
    """Tokens, seconds and the collection of one policy."""
    sampling = {"temperature": 0.6, "n": policy.pop("n", 1)}
    teacher = TeacherConfig(engine="openai", model="m", sampling=sampling, **policy)
    model = Model(seconds)
    with tempfile.TemporaryDirectory() as folder, VerifierPool(1) as pool:
        file = Path(folder) / "train.jsonl"
        write_records(file, prompts)
        ledger = Ledger(Path(folder))
        ladder = Ladder((Rung(teacher.sampling, "cfg", ledger),))
        purse = Purse(teacher.budget, {"cfg": ledger}, {})
        spec = resolve("number")
        work = Collection(
            model, teacher, policy_of(teacher), ladder, Wanted(file), purse, Bar("bench", None), Stop(),
            Judging(pool.verify, lambda _: spec),
        )  # fmt: skip
        started = time.perf_counter()
        asyncio.run(work.run())
        seconds_taken = time.perf_counter() - started
        ledger.close()
    return model.tokens, seconds_taken, work


def main() -> int:
    """Print the table, write JSON, and with --check judge the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=0.5, help="time of an answer of 1,000 tokens")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    prompts = [
        Prompt.of([Message(role="user", content=f"problem {number}")], gold=str(number), source="bench")
        for number in range(given.prompts)
    ]
    fixed_tokens, fixed_s, _ = measure(prompts, given.seconds, n=4)
    rows: list[dict[str, Any]] = [
        {"policy": "fixed n = 4", "tokens": fixed_tokens, "over_ideal": None, "seconds": fixed_s, "over_fixed": 1.0}
    ]
    for correct, tries in [(1, 4), (1, 8), (2, 8), (4, 8)]:
        tokens, seconds, _ = measure(prompts, given.seconds, until={"correct": correct, "tries": tries})
        ideal = ideal_tokens(Model(0), prompts, Until(correct=correct, tries=tries))
        rows.append(
            {
                "policy": f"until {correct} of {tries}",
                "tokens": tokens,
                "over_ideal": tokens / ideal,
                "seconds": seconds,
                "over_fixed": seconds / fixed_s,
                "judged": ideal <= 1.1 * fixed_tokens,
            }
        )
    print(f"{given.prompts} prompts, {IN_FLIGHT} in flight, {given.seconds:g} s an answer of {RIGHT_TOKENS} tokens")
    print(f"{'policy':<16} {'tokens':>12} {'/ ideal':>8} {'seconds':>8} {'/ fixed':>8}")
    for row in rows:
        over = "" if row["over_ideal"] is None else f"{row['over_ideal']:.3f}"
        print(f"{row['policy']:<16} {row['tokens']:>12,} {over:>8} {row['seconds']:>8.1f} {row['over_fixed']:>8.2f}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=2) + "\n")
    missed = [
        str(row["policy"])
        for row in rows[1:]
        if row["over_ideal"] > MOST_TOKENS_OVER_IDEAL or (row["judged"] and row["over_fixed"] > MOST_WALL_OVER_FIXED)
    ]
    if missed:
        print(f"missed: {', '.join(missed)}")
    return int(bool(missed) and given.check)


if __name__ == "__main__":
    sys.exit(main())
