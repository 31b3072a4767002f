"""The sampling policy: as few samples as an ideal one-at-a-time policy, whatever the order of answers."""

import asyncio
import random
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import TeacherConfig, Until
from distill.engines import Completion, Request
from distill.errors import RecipeError
from distill.interrupts import Stop
from distill.progress import Bar
from distill.records import FinishReason, Message, Prompt, Usage, Verdict, write_records
from distill.runs import Shard
from distill.teachers.budget import Purse
from distill.teachers.collection import Collection, Judging
from distill.teachers.ledger import Ledger, samplings
from distill.teachers.sampling import Course, Ladder, Rung, Wanted, policy_of, replay
from distill.verifiers import VerifierSpec, resolve
from distill.verifiers.pool import VerifierPool


def problems(count: int) -> list[Prompt]:
    return [Prompt.of([Message(role="user", content=f"problem {n}")], gold="1", source="s") for n in range(count)]


def ideal(answers: list[bool], policy: Until) -> int:
    """How many samples asking for one at a time takes."""
    right = 0
    for number, correct in enumerate(answers[: policy.tries], 1):
        right += correct
        if right == policy.correct:
            return number
    return policy.tries


@given(
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.integers(1, 5),
    st.integers(0, 7),
    st.randoms(use_true_random=False),
)
def test_whatever_the_order_of_answers_the_samples_are_those_of_the_ideal_policy(
    answers: list[bool], correct: int, more: int, dice: random.Random
) -> None:
    policy = Until(correct=correct, tries=correct + more)
    course = Course(problems(1)[0], policy)
    waiting, begun = list(course.begin()), []
    while waiting:
        sample = waiting.pop(dice.randrange(len(waiting)))
        begun.append(sample)
        course.conclude(answers[sample])
        waiting += course.begin()
    assert sorted(begun) == list(range(ideal(answers, policy)))
    assert course.done


def test_a_policy_that_begins_tries_at_once_would_spend_more() -> None:
    answers = [True, True, True]
    assert ideal(answers, Until(correct=1, tries=3)) == 1 < len(answers)


def test_a_fixed_number_begins_all_samples_at_once() -> None:
    policy = policy_of(TeacherConfig(engine="solver", sampling={"n": 3}))
    course = Course(problems(1)[0], policy)
    assert list(course.begin()) == [0, 1, 2] and list(course.begin()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"until": {"correct": 3, "tries": 2}}, r"tries \(2\) must be at least correct \(3\)"),
        ({"until": {"correct": 1}, "sampling": {"n": 2, "temperature": 1}}, "give one of the two"),
        ({"until": {"correct": 1}, "engine": "openai", "model": "m"}, "temperature above 0"),
        ({"escalate": [100], "sampling": {"max_new_tokens": 100}}, r"must rise from .* given: \[100, 100\]"),
        ({"escalate": [300, 200], "sampling": {"max_new_tokens": 100}}, "must rise"),
    ],
)
def test_policies_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherConfig(**{"engine": "solver"} | fields)


# --- shards ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9))
def test_every_prompt_belongs_to_exactly_one_shard(of: int) -> None:
    shards = [Shard.parse(f"{index}/{of}") for index in range(1, of + 1)]
    assert all(sum(shard.has(p.prompt_id) for shard in shards) == 1 for p in problems(40))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/2", ""])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="i/N with i from 1 to N"):
        Shard.parse(text)


# --- through the scheduler ------------------------------------------------------------------------------------------

Script = Callable[[Prompt, int, int], tuple[str, FinishReason]]
"""(prompt, sample, token limit) -> answer and why it ended."""


class Scripted:
    """Answers by a script, in a random order, several at once or in batches."""

    name, version = "openai", "test"

    def __init__(self, script: Script, batch_size: int | None = None, at_once: int = 7, seed: int = 0) -> None:
        self.script, self.batch_size, self.at_once = script, batch_size, at_once
        self.dice = random.Random(seed)
        self.asked: list[tuple[str, int, int]] = []

    async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        done: asyncio.Queue[Completion | None] = asyncio.Queue()
        room = asyncio.Semaphore(self.at_once)

        async def answer(request: Request) -> None:
            for _ in range(self.dice.randrange(5)):
                await asyncio.sleep(0)
            done.put_nowait(self.completion(request))

        async def pull() -> None:
            tasks = set()
            source = aiter(requests)
            try:
                while await room.acquire() and (request := await anext(source, None)) is not None:
                    tasks.add(asyncio.create_task(answer(request)))
                await asyncio.gather(*tasks)
            finally:
                done.put_nowait(None)

        puller = asyncio.create_task(pull())
        while (completion := await done.get()) is not None:
            yield completion
            room.release()
        await puller

    def completion(self, request: Request) -> Completion:
        limit = request.sampling.max_new_tokens
        self.asked.append((request.prompt.text, request.sample, limit))
        text, finish = self.script(request.prompt, request.sample, limit)
        if text.startswith("!"):
            return Completion(request.key, error=text, finish_reason="error", retryable=text == "!later")
        return Completion(request.key, answer=text, raw=text, finish_reason=finish, usage=Usage(output=10))

    async def close(self) -> None:
        pass


class Store:
    """A folder with prompts and ledgers that outlives collections."""

    def __init__(self, folder: Path, count: int, **teacher: Any) -> None:
        self.folder = folder
        sampling = {"temperature": 1.0, "max_new_tokens": 100} | teacher.pop("sampling", {})
        self.teacher = TeacherConfig(engine="openai", model="m", sampling=sampling, **teacher)
        self.file = folder / "train.jsonl"
        write_records(self.file, problems(count))

    def collect(
        self, script: Script, judge: Any = None, spec: VerifierSpec | None = None, ask: bool = True, **engine: Any
    ) -> tuple[Collection, Scripted, list[tuple[str, list[str]]]]:
        """One attempt: the collection, its engine, and the view (problem, its answers by sample and rung)."""
        scripted = Scripted(script, **engine)
        rungs = []
        for number, sampling in enumerate(samplings(self.teacher)):
            folder = self.folder / f"ledger-{number}"
            folder.mkdir(exist_ok=True)
            rungs.append(Rung(sampling, f"cfg-{number}", Ledger(folder)))
        ladder = Ladder(tuple(rungs))
        purse = Purse(self.teacher.budget, {rung.cfg: rung.ledger for rung in rungs}, {})
        policy = policy_of(self.teacher)
        chosen = spec or resolve("number")
        with VerifierPool(1) as pool:
            judging = Judging(judge or pool.verify, lambda _: chosen)
            bar = Bar("test", None)
            work = Collection(
                scripted, self.teacher, policy, ladder, Wanted(self.file), purse, bar, Stop(), judging, ask
            )
            try:
                asyncio.run(work.run())
                return work, scripted, list(self._view(work, ladder))
            finally:
                for rung in rungs:
                    rung.ledger.close()

    def _view(self, work: Collection, ladder: Ladder) -> Iterator[tuple[str, list[str]]]:
        for prompt in Wanted(self.file):
            course = replay(prompt, work.policy, ladder, work.correct)
            keys = [(prompt.prompt_id, sample) for sample in range(course.begun)]
            yield prompt.text, [trace.answer for key in keys for trace in ladder.traces(key)]


def by_dice(prompt: Prompt, sample: int, limit: int) -> tuple[str, FinishReason]:
    """Right or wrong by prompt and sample alone; a third is cut off below 400 tokens."""
    dice = random.Random(f"{prompt.text}/{sample}")
    right, long = dice.random() < 0.4, dice.random() < 0.3
    if long and limit < 400:
        return f"cut at {limit}", "length"
    return ("1" if right else f"0.{sample}5"), "stop"


@pytest.mark.parametrize("batch_size", [None, 5])
def test_the_view_of_until_depends_on_the_answers_alone_and_asks_for_what_the_ideal_policy_asks(
    tmp_path: Path, batch_size: int | None
) -> None:
    views = []
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        store = Store(tmp_path / str(seed), 30, until={"correct": 2, "tries": 6}, escalate=[200, 400])
        work, engine, view = store.collect(by_dice, batch_size=batch_size, seed=seed)
        assert work.finished
        views.append(view)
        answers = {p.text: [by_dice(p, s, 400)[0] == "1" for s in range(6)] for p in problems(30)}
        samples = {(text, sample) for text, sample, _ in engine.asked}
        policy = Until(correct=2, tries=6)
        assert samples == {(text, s) for text, right in answers.items() for s in range(ideal(right, policy))}
        if batch_size is None:
            assert len(engine.asked) == len(set(engine.asked))  # batches are generated again as a whole
    assert views[0] == views[1] == views[2]


def test_a_cut_off_sample_climbs_until_it_is_whole_or_the_ladder_ends(tmp_path: Path) -> None:
    def script(prompt: Prompt, sample: int, limit: int) -> tuple[str, FinishReason]:
        needed = {"problem 0": 50, "problem 1": 150, "problem 2": 10_000}[prompt.text]
        return ("1", "stop") if needed <= limit else (f"cut at {limit}", "length")

    store = Store(tmp_path, 3, escalate=[200, 400])
    _, engine, view = store.collect(script)
    assert view == [
        ("problem 0", ["1"]),
        ("problem 1", ["cut at 100", "1"]),
        ("problem 2", ["cut at 100", "cut at 200", "cut at 400"]),
    ]
    assert sorted(engine.asked)[1:3] == [("problem 1", 0, 100), ("problem 1", 0, 200)]
    _, again, same = store.collect(script)
    assert (again.asked, same) == ([], view)


def test_without_escalation_a_cut_off_sample_stays_as_it_is(tmp_path: Path) -> None:
    _, engine, view = Store(tmp_path, 1).collect(lambda *_: ("cut", "length"))
    assert (len(engine.asked), view) == (1, [("problem 0", ["cut"])])


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_resume_of_until_asks_only_for_what_is_missing_and_ends_with_the_same_view(
    tmp_path: Path, batch_size: int | None
) -> None:
    (tmp_path / "whole").mkdir()
    fields: dict[str, Any] = {"until": {"correct": 1, "tries": 5}, "escalate": [400]}
    _, _, whole = Store(tmp_path / "whole", 20, **fields).collect(by_dice, batch_size=batch_size)
    store = Store(tmp_path, 20, **fields)
    asked: list[tuple[str, int, int]] = []

    class KilledError(Exception):
        pass

    def dying(prompt: Prompt, sample: int, limit: int) -> tuple[str, FinishReason]:
        if len(asked) >= 9:
            raise KilledError
        asked.append((prompt.text, sample, limit))
        return by_dice(prompt, sample, limit)

    if batch_size is None:
        _, engine, _ = store.collect(lambda *key: ("!later", "error") if key[1] > 0 else by_dice(*key))
        asked = [key for key in engine.asked if key[1] == 0]
    else:
        with pytest.raises(KilledError):
            store.collect(dying, batch_size=batch_size)
    _, resumed, view = store.collect(by_dice, batch_size=batch_size)
    assert view == whole
    if batch_size is None:
        assert not set(asked) & set(resumed.asked)


def test_a_refused_prompt_gets_no_further_sample_but_an_outage_is_asked_again(tmp_path: Path) -> None:
    state = {"problem 0": "!refused", "problem 1": "!later"}
    store = Store(tmp_path, 3, until={"correct": 1, "tries": 4})
    work, engine, view = store.collect(lambda prompt, *_: (state.get(prompt.text, "1"), "stop"))
    assert sorted(engine.asked) == [("problem 0", 0, 100), ("problem 1", 0, 100), ("problem 2", 0, 100)]
    assert (work.progress.failed, work.progress.retryable) == (2, 1)
    state.clear()
    _, again, view = store.collect(lambda prompt, *_: (state.get(prompt.text, "1"), "stop"))
    assert sorted(again.asked) == [("problem 0", 0, 100), ("problem 1", 0, 100)]
    assert view == [(f"problem {n}", ["1"]) for n in range(3)]


def test_raising_tries_reuses_every_answer(tmp_path: Path) -> None:
    wrong_first = lambda _, sample, __: ("1" if sample == 3 else f"0.{sample}5", "stop")  # noqa: E731
    _, engine, _ = Store(tmp_path, 2, until={"correct": 1, "tries": 2}).collect(wrong_first)
    assert len(engine.asked) == 4
    _, more, view = Store(tmp_path, 2, until={"correct": 1, "tries": 9}).collect(wrong_first)
    assert sorted({sample for _, sample, _ in more.asked}) == [2, 3]
    assert view[0] == ("problem 0", ["0.05", "0.15", "0.25", "1"])


def test_verdicts_that_take_a_process_are_made_once_and_found_again(tmp_path: Path) -> None:
    heavy = VerifierSpec("slow", "1", "nowhere:at_all")
    calls: list[str] = []

    async def judge(prompt: Prompt, trace: Any) -> Verdict:
        calls.append(trace.trace_id)
        await asyncio.sleep(0)
        outcome = "correct" if trace.answer == "1" else "wrong"
        return Verdict(trace_id=trace.trace_id, gold=prompt.gold, verifier=heavy.label, outcome=outcome)

    store = Store(tmp_path, 10, until={"correct": 1, "tries": 5})
    _, engine, view = store.collect(by_dice_short, judge, heavy)
    assert len(calls) == len(engine.asked) > 10
    _, again, same = store.collect(by_dice_short, judge, heavy)
    assert (again.asked, same, len(calls)) == ([], view, len(engine.asked))


def by_dice_short(prompt: Prompt, sample: int, limit: int) -> tuple[str, FinishReason]:
    return by_dice(prompt, sample, 400)


def test_a_verifier_that_cannot_go_on_ends_the_run(tmp_path: Path) -> None:
    async def broken(prompt: Prompt, trace: Any) -> Verdict:
        await asyncio.sleep(0)
        raise RuntimeError("no workers")

    store = Store(tmp_path, 3, until={"correct": 1, "tries": 5})
    with pytest.raises(RuntimeError, match="no workers"):
        store.collect(by_dice, broken, VerifierSpec("slow", "1", "nowhere:at_all"))


def test_without_asking_only_what_is_there_is_judged(tmp_path: Path) -> None:
    store = Store(tmp_path, 6, until={"correct": 1, "tries": 5})
    _, engine, before = store.collect(lambda p, s, _: ("!later", "error") if s > 1 else (f"0.{s}5", "stop"))
    asked = len(engine.asked)
    _, silent, view = store.collect(by_dice, ask=False)
    assert (silent.asked, view, asked) == ([], before, 18)
