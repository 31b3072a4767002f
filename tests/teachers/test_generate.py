"""The generate stage against a server that counts what it is asked, and engines small enough to read."""

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.config import Budget, Prices, Sampling, TeacherConfig
from distill.engines import Completion, Request
from distill.errors import BudgetError, DataError, EngineError, IncompleteError, LockedError, RunError
from distill.interrupts import Stop
from distill.progress import Bar
from distill.records import Message, Prompt, Trace, Usage, read_records, write_records
from distill.runs import RunOptions, SealedRun, Shard, Step, open_sealed
from distill.teachers import generate
from distill.teachers.budget import Purse, cost_usd
from distill.teachers.collection import Collection, trace_of
from distill.teachers.forgetting import forget
from distill.teachers.ledger import Ledger
from distill.teachers.sampling import Ladder, Rung, Wanted, policy_of

SECRET = "sk-very-secret-0123456789"
CONCURRENCY = 4


def problems(count: int, first: int = 0) -> list[Prompt]:
    texts = [f"problem {number}" for number in range(first, first + count)]
    return [Prompt.of([Message(role="user", content=t)], gold=str(len(t)), source="sums") for t in texts]


def asking(server: Any, n: int = 1, **more: Any) -> dict[str, Any]:
    """A teacher section that asks a test server."""
    endpoint = {"base_url": server.base_url, "concurrency": CONCURRENCY, "max_retries": 0, "timeout_s": 20}
    sampling = {"n": n, "temperature": 0.6, "max_new_tokens": 64}
    return {"engine": "openai", "model": "r1", "endpoint": endpoint, "sampling": sampling, "probe": False} | more


def traces_of(sealed: SealedRun, name: str = "traces.jsonl") -> list[Trace]:
    return list(read_records(sealed.path(name), Trace))


def picked(counts: Mapping[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(counts[name] for name in names)


# --- the view -------------------------------------------------------------------------------------------------------


def test_every_prompt_is_answered_as_often_as_wanted_and_written_in_order(chat: Any, lab: Any) -> None:
    with chat.ChatServer(lambda *_: chat.Reply(delay_s=random.random() / 50)) as server:
        sealed = lab.generate(problems(10), asking(server, n=3))
    expected = [(prompt.prompt_id, sample) for prompt in problems(10) for sample in range(3)]
    assert [(trace.prompt_id, trace.sample) for trace in traces_of(sealed)] == expected
    assert traces_of(sealed, "failed.jsonl") == []
    assert len(server.asked) == len(server.requests) == 30  # every sample has a seed of its own, each is asked once
    assert picked(sealed.counts, "prompts", "samples", "answered", "failed", "reused", "asked") == (
        10, 30, 30, 0, 0, 30,
    )  # fmt: skip
    assert picked(sealed.counts, "input_tokens", "output_tokens", "reasoning_tokens") == (210, 600, 360)
    assert picked(sealed.counts, "think", "finish_reasons") == ({"closed": 30}, {"stop": 30})


def test_a_trace_says_who_answered_what_was_sent_and_what_it_cost(chat: Any, lab: Any) -> None:
    body = chat.completion(
        {"content": "\\boxed{9}", "reasoning": "nine"}, model="r1-0528", system_fingerprint="fp_7"
    )  # fmt: skip
    prices = {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 2.0}
    with chat.ChatServer(answer=lambda _: body) as server:
        sealed = lab.generate(problems(1), asking(server, prices=prices, licence="MIT", system="be brief"))
    (trace,) = traces_of(sealed)
    (sent,) = server.requests
    assert trace.teacher.model_dump() == {
        "engine": "openai", "engine_version": "1", "model": "r1-0528", "revision": "fp_7", "licence": "MIT",
    }  # fmt: skip
    assert trace.sampling == {"temperature": 0.6, "top_p": 1.0, "max_new_tokens": 64, "seed": sent["seed"]}
    assert sent["messages"][0] == {"role": "system", "content": "be brief"}
    assert trace.cost_usd == pytest.approx((7 * 1.0 + 20 * 2.0) / 1e6)
    assert sealed.counts["usd"] == pytest.approx(47e-6)
    assert trace.cfg == sealed.document["cfg"]


def test_a_trace_is_known_by_what_it_is(tmp_path: Path) -> None:
    request = Request(problems(1)[0], 0, Sampling(), seed=1)
    engine, teacher_config = BatchEngine(1), TeacherConfig(engine="solver")

    def trace_id(sample: int = 0, cfg: str = "cfg", attempt: int = 0, **said: Any) -> str:
        asked = request._replace(sample=sample)
        return trace_of(asked, attempt, Completion(asked.key, **said), teacher_config, engine, cfg).trace_id

    assert trace_id(raw="a") == trace_id(raw="a", attempt=3, latency_s=9.0)
    different = [
        trace_id(raw="a"),
        trace_id(raw="b"),
        trace_id(1, raw="a"),
        trace_id(0, "c", raw="a"),
        trace_id(error="a b"),
    ]
    assert len(set(different)) == len(different)


def test_the_digest_depends_on_the_answers_and_not_on_when_or_in_which_order_they_came(chat: Any, lab: Any) -> None:
    def digest(name: str, answer: Any = chat.answer_of) -> str:
        with chat.ChatServer(lambda *_: chat.Reply(delay_s=random.random() / 50), answer) as server:
            return str(replace(lab, runs=lab.runs / name).generate(problems(8), asking(server)).digest)

    assert digest("a") == digest("b")
    assert digest("c", lambda body: chat.answer_of(body | {"seed": 0})) != digest("a2")


def test_without_training_prompts_there_is_nothing_to_seal(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server, pytest.raises(DataError, match="no training prompts"):
        lab.generate([], asking(server))


def test_the_stage_runs_in_a_notebook_too_where_an_event_loop_is_running_already(chat: Any, lab: Any) -> None:
    async def cell(server: Any) -> SealedRun:
        return lab.generate(problems(5), asking(server))

    with chat.ChatServer() as server:
        assert asyncio.run(cell(server)).counts["answered"] == 5


# --- no answer is bought twice --------------------------------------------------------------------------------------


def test_growing_the_prompts_or_n_asks_only_for_what_is_new(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server:
        first = lab.generate(problems(10), asking(server))
        assert len(server.requests) == 10
        grown = lab.generate(problems(15), asking(server))
        assert len(server.requests) == 15
        assert picked(grown.counts, "reused", "asked") == (10, 5)
        more = lab.generate(problems(15), asking(server, n=3))
        assert len(server.requests) == 45
        assert picked(more.counts, "reused", "asked") == (15, 30)
        assert max(server.asked.values()) == 1
    assert traces_of(grown)[:10] == traces_of(first)
    assert [trace for trace in traces_of(more) if trace.sample == 0] == traces_of(grown)


def test_reordered_and_shrunken_prompt_files_ask_for_nothing(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server:
        lab.generate(problems(12), asking(server))
        shuffled = lab.generate(problems(12)[::-1], asking(server))
        lab.generate(problems(5, first=3), asking(server))
        assert len(server.requests) == 12
    assert [trace.prompt_id for trace in traces_of(shuffled)] == [p.prompt_id for p in problems(12)[::-1]]


def test_raising_prices_or_changing_the_endpoint_asks_for_nothing(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as old:
        lab.generate(problems(4), asking(old))
    with chat.ChatServer() as new:
        prices = {"input_usd_per_mtok": 9, "output_usd_per_mtok": 9}
        lab.generate(problems(4), asking(new, prices=prices))
        assert new.requests == []
        lab.generate(problems(4), asking(new, model="another"))
        assert len(new.requests) == 4  # what is sent does count


# --- failures -------------------------------------------------------------------------------------------------------


def test_failures_are_listed_counted_and_asked_again_by_the_next_run_only(
    chat: Any, lab: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = {"problem 2", "problem 5"}

    def plan(number: int, body: dict[str, Any]) -> Any:
        bad = body["messages"][-1]["content"] in broken
        return chat.Reply(500, b'{"error": {"message": "boom"}}') if bad else chat.Reply()

    with chat.ChatServer(plan) as server:
        recipe = lab.recipe(asking(server))
        step = lab.step(recipe, lab.prompts(problems(8)))
        with pytest.raises(IncompleteError, match=r"2 requests failed .* most often with: 500 boom") as caught:
            generate.run(recipe, step, lab.options)
        assert caught.value.exit_code == 3 and not step.sealed
        failures = list(read_records(step.folder / "failed.jsonl", Trace))  # listed though nothing is sealed
        assert [failure.prompt_id for failure in failures] == [problems(8)[i].prompt_id for i in (2, 5)]
        assert {failure.error for failure in failures} == {"500 boom (tried 1 times)"}
        broken.clear()
        mended = generate.run(recipe, step, lab.options)
        assert picked(mended.counts, "answered", "failed", "reused", "asked") == (8, 0, 6, 2)
    assert [trace.attempt for trace in traces_of(mended)] == [0, 0, 1, 0, 0, 1, 0, 0]


def test_a_partial_run_is_sealed_on_request_only_and_says_what_is_missing(
    chat: Any, lab: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = lambda number, _: chat.Reply(500, b"boom") if number % 4 == 0 else chat.Reply()  # noqa: E731
    with chat.ChatServer(plan) as server:
        recipe = lab.recipe(asking(server))
        step = lab.step(recipe, lab.prompts(problems(8)))
        with pytest.raises(IncompleteError):
            generate.run(recipe, step, lab.options)
        asked = len(server.requests)
        partial = generate.run(recipe, step, replace(lab.options, accept_partial=True, ask=False))
        assert len(server.requests) == asked  # nothing is asked for
    assert picked(partial.counts, "answered", "failed", "missing") == (6, 2, 2)
    assert "sealed with 2 wanted samples missing" in capfd.readouterr().err


def test_a_failure_is_part_of_the_digest(chat: Any, lab: Any) -> None:
    def digest(name: str, bad: int, message: str = "boom") -> str:
        reply = chat.Reply(413, message.encode())  # a refusal: an outage would not be sealed
        plan = lambda _, body: reply if body["messages"][-1]["content"] == f"problem {bad}" else chat.Reply()  # noqa: E731
        with chat.ChatServer(plan) as server:
            return str(replace(lab, runs=lab.runs / name).generate(problems(4), asking(server)).digest)

    assert digest("a", 2) == digest("b", 2)
    assert len({digest("c", 2), digest("d", 3), digest("e", 99), digest("f", 2, "bang")}) == 4


def test_when_every_request_fails_nothing_is_sealed_and_the_same_command_finishes_later(chat: Any, lab: Any) -> None:
    state = {"broken": True}
    plan = lambda *_: chat.Reply(503, b"down for repair") if state["broken"] else chat.Reply()  # noqa: E731
    with chat.ChatServer(plan) as server:
        recipe = lab.recipe(asking(server))
        step = lab.step(recipe, lab.prompts(problems(5)))
        with pytest.raises(EngineError, match="every request failed, most often with: 503 down for repair"):
            generate.run(recipe, step, lab.options)
        assert not step.sealed
        state["broken"] = False
        assert generate.run(recipe, step, lab.options).counts["answered"] == 5


def test_an_error_that_most_of_the_first_requests_share_is_said_at_once(
    chat: Any, lab: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = lambda number, _: chat.Reply(500, b"no capacity") if number % 4 else chat.Reply()  # noqa: E731
    with chat.ChatServer(plan) as server, pytest.raises(IncompleteError):
        lab.generate(problems(40), asking(server))
    assert "of the first 20 requests failed: 500 no capacity" in capfd.readouterr().err


def test_a_few_failures_raise_no_alarm(chat: Any, lab: Any, capfd: pytest.CaptureFixture[str]) -> None:
    plan = lambda number, _: chat.Reply() if number % 4 else chat.Reply(500, b"no capacity")  # noqa: E731
    with chat.ChatServer(plan) as server, pytest.raises(IncompleteError):
        lab.generate(problems(40), asking(server))
    assert "of the first" not in capfd.readouterr().err


def test_a_refused_key_stops_at_once_and_keeps_what_had_come(chat: Any, lab: Any) -> None:
    state = {"refuse_from": 6}
    reply = chat.Reply(401, b"no")
    with chat.ChatServer(lambda number, _: reply if number >= state["refuse_from"] else chat.Reply()) as server:
        recipe = lab.recipe(asking(server))
        step = lab.step(recipe, lab.prompts(problems(30)))
        with pytest.raises(EngineError, match="401"):
            generate.run(recipe, step, lab.options)
        asked_before = len(server.requests)
        assert asked_before <= 5 + CONCURRENCY
        state["refuse_from"] = 10**6
        sealed = generate.run(recipe, step, lab.options)
        assert sealed.counts["answered"] == 30
        assert sealed.counts["reused"] >= 5 - CONCURRENCY
        assert len(server.requests) == asked_before + 30 - sealed.counts["reused"]


def test_reasoning_that_was_billed_but_not_sent_is_said_and_counted(
    chat: Any, lab: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with chat.ChatServer(answer=lambda _: chat.completion({"content": "9"})) as server:
        sealed = lab.generate(problems(3), asking(server))
    assert sealed.counts["reasoning_lost"] == 3
    assert "3 of 3 answers were billed for reasoning" in capfd.readouterr().err


# --- preflight, secrets, locks --------------------------------------------------------------------------------------


def test_preflight_refuses_a_missing_key_and_writes_nothing(lab: Any, tmp_path: Path) -> None:
    recipe = lab.recipe({"engine": "openai", "model": "r1"})
    step = Step("generate", "generate", "r", "0" * 16, {}, {}, lab.runs)
    with pytest.raises(EngineError, match="OPENAI_API_KEY"):
        generate.preflight(recipe, step, lab.options)
    assert list(tmp_path.iterdir()) == []


def test_preflight_of_an_engine_without_one_passes(lab: Any) -> None:
    step = Step("generate", "generate", "r", "0" * 16, {}, {}, lab.runs)
    generate.preflight(lab.recipe({"engine": "solver"}), step, lab.options)


def test_the_key_reaches_no_file_and_no_output_even_if_the_server_echoes_it(
    chat: Any, lab: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    echo = chat.completion({"content": f"key {SECRET}", "reasoning": SECRET}, model=SECRET)
    error = chat.Reply(500, json.dumps({"error": {"message": f"bad {SECRET}"}}).encode())
    with chat.ChatServer(lambda number, _: error if number % 2 else chat.Reply(), lambda _: echo) as server:
        with pytest.raises(IncompleteError, match="<OPENAI_API_KEY>") as caught:
            lab.generate(problems(30), asking(server))
        assert server.authorizations[0] == f"Bearer {SECRET}"  # it was there to leak
    files = [path for path in lab.runs.rglob("*") if path.is_file()]
    assert len(files) >= 8
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    said = capfd.readouterr()
    assert SECRET not in said.err + said.out + str(caught.value)


def test_a_second_process_is_refused_while_the_ledger_is_being_written(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server:
        sealed = lab.generate(problems(2), asking(server))
        ledger = lab.runs / "ledger" / sealed.document["cfg"]
        holder = (
            f"import fcntl, sys; f = open(r'{ledger / '.lock'}', 'a'); fcntl.flock(f, 2); print(1, flush=True); input()"
        )
        with subprocess.Popen([sys.executable, "-c", holder], stdin=-1, stdout=-1, text=True) as process:
            assert process.stdout and process.stdin
            process.stdout.readline()
            with pytest.raises(RunError, match="the ledger is being written"):
                lab.generate(problems(3), asking(server))
            process.communicate("\n")
        assert lab.generate(problems(3), asking(server)).counts["answered"] == 3


# --- budgets --------------------------------------------------------------------------------------------------------


def test_a_token_budget_stops_before_its_limit_and_a_higher_one_goes_on(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server:
        with pytest.raises(BudgetError, match=r"teacher\.budget\.output_tokens of 200 is reached") as caught:
            lab.generate(problems(40), asking(server, budget={"output_tokens": 200}))
        assert caught.value.exit_code == 3
        assert "200 output tokens on 10 answers" in str(caught.value) and "30 of 40 samples" in str(caught.value)
        assert len(server.requests) == 10  # at 20 tokens each, those in flight included
        with pytest.raises(BudgetError):
            lab.generate(problems(40), asking(server, budget={"output_tokens": 310}))
        assert len(server.requests) == 15  # what earlier attempts of this run spent still counts
        sealed = lab.generate(problems(40), asking(server, budget={"output_tokens": 1000}))
        assert len(server.requests) == 40
    assert picked(sealed.counts, "answered", "spent_output_tokens") == (40, 800)


def test_a_dollar_budget_stops_and_says_what_was_spent(chat: Any, lab: Any) -> None:
    prices = {"input_usd_per_mtok": 0, "output_usd_per_mtok": 1000}  # two cents an answer
    with chat.ChatServer() as server:
        with pytest.raises(BudgetError, match=r"budget\.usd of 0\.1 .* spent \$0\.1000"):
            lab.generate(problems(20), asking(server, budget={"usd": 0.1}, prices=prices))
        assert len(server.requests) == 5


def test_answers_found_in_the_ledger_cost_this_run_nothing(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server:
        lab.generate(problems(20), asking(server))
        sealed = lab.generate(problems(25), asking(server, budget={"output_tokens": 100}))
        assert picked(sealed.counts, "answered", "spent_output_tokens") == (25, 100)
        assert lab.generate(problems(25), asking(server, budget={"output_tokens": 1})).counts["asked"] == 0


def test_a_server_that_counts_no_tokens_cannot_outrun_a_budget(chat: Any, lab: Any) -> None:
    body = chat.completion({"content": "x" * 400}) | {"usage": None}
    with chat.ChatServer(answer=lambda _: body) as server:
        with pytest.raises(BudgetError):
            lab.generate(problems(20), asking(server, budget={"output_tokens": 500}))
        assert len(server.requests) == 5  # 400 characters are taken for 100 tokens


def test_hours_are_those_of_the_clock(tmp_path: Path) -> None:
    ledger, now = Ledger(tmp_path), [1000.0]
    purse = Purse(Budget(hours=0.5), {"cfg": ledger}, {}, clock=lambda: now[0])
    assert purse.fits(in_flight=100)
    now[0] += 1799
    assert purse.fits(in_flight=100) and purse.reached() is None
    now[0] += 2
    limit = purse.reached()
    assert not purse.fits(in_flight=0) and limit is not None and limit.key == "hours"
    ledger.close()


def test_before_the_first_answer_only_one_request_goes_out_under_a_budget(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    purse = Purse(Budget(output_tokens=10), {"cfg": ledger}, {})
    assert purse.fits(in_flight=0) and not purse.fits(in_flight=1)
    ledger.close()


def test_cost_is_by_the_recipes_prices() -> None:
    priced = TeacherConfig(engine="solver", prices=Prices(input_usd_per_mtok=0.55, output_usd_per_mtok=2.19))
    usage = Usage(input=1_000_000, output=2_000_000)
    assert cost_usd(priced, Completion(("p", 0), usage=usage)) == pytest.approx(0.55 + 2 * 2.19)
    assert cost_usd(TeacherConfig(engine="solver"), Completion(("p", 0), usage=usage)) == 0


# --- token limits, adaptive sampling, probes ------------------------------------------------------------------------


def test_a_cut_off_answer_is_asked_again_with_a_higher_limit_and_both_are_kept(chat: Any, lab: Any) -> None:
    def answer(body: Mapping[str, Any]) -> Any:
        enough = body["max_tokens"] >= 200
        return chat.completion({"content": "9" if enough else "9 and"}, finish="stop" if enough else "length")

    with chat.ChatServer(answer=answer) as server:
        sealed = lab.generate(problems(3), asking(server, escalate=[100, 200, 400]))
        assert sorted(body["max_tokens"] for body in server.requests) == [64] * 3 + [100] * 3 + [200] * 3
        assert len({body["seed"] for body in server.requests}) == 3  # a longer answer has the same seed
        assert [trace.finish_reason for trace in traces_of(sealed)] == ["length", "length", "stop"] * 3
        assert picked(sealed.counts, "samples", "answered", "escalated", "asked") == (3, 9, 6, 9)
        # what was bought with a limit is found again by a recipe that begins with it
        sampling = {"temperature": 0.6, "max_new_tokens": 200}
        again = lab.generate(problems(3), asking(server, sampling=sampling))
        assert picked(again.counts, "answered", "asked") == (3, 0)


def test_until_stops_a_prompt_once_enough_verify_and_says_how_many_were_satisfied(chat: Any, lab: Any) -> None:
    hopeless = "problem 1"

    def answer(body: Mapping[str, Any]) -> Any:
        text = body["messages"][-1]["content"]
        right = text != hopeless and (text != "problem 2" or body["seed"] % 2)
        return chat.completion({"content": f"\\boxed{{{len(text) if right else 0}}}", "reasoning": "so"})

    with chat.ChatServer(answer=answer) as server:
        sealed = lab.generate(problems(4), asking(server, until={"correct": 1, "tries": 5}))
        by_prompt = [[t.sample for t in traces_of(sealed) if t.prompt_id == p.prompt_id] for p in problems(4)]
        assert (by_prompt[0], by_prompt[1], by_prompt[3]) == ([0], [0, 1, 2, 3, 4], [0])
        assert by_prompt[2] == list(range(len(by_prompt[2])))
        assert sealed.counts["satisfied"] == 3
        assert sealed.counts["asked"] == len(server.requests) == sum(map(len, by_prompt))


def test_each_server_is_tried_before_the_work_but_not_when_there_is_none(
    chat: Any, lab: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = lambda _: chat.completion({"content": "9", "reasoning": "so"}, model="another-model")  # noqa: E731
    with chat.ChatServer(answer=answer) as server:
        sealed = lab.generate(problems(3), asking(server, probe=True))
        assert len(server.requests) == 4 and sealed.counts["asked"] == 3
        assert "another-model" in capfd.readouterr().err
        lab.generate(problems(2), asking(server, probe=True))
        assert len(server.requests) == 4


def test_a_server_that_keeps_its_reasoning_to_itself_is_refused_before_the_work(chat: Any, lab: Any) -> None:
    with chat.ChatServer(answer=lambda _: chat.completion({"content": "9"})) as server:
        with pytest.raises(EngineError, match=r"reasoning: .*; select\.reasoning is required"):
            lab.generate(problems(3), asking(server, probe=True))
        assert len(server.requests) == 1
        relaxed = lab.recipe(asking(server, probe=True), select={"reasoning": "optional"})
        sealed = generate.run(relaxed, lab.step(relaxed, lab.prompts(problems(3))), lab.options)
        assert sealed.counts["reasoning_lost"] == 3


# --- removal on request ---------------------------------------------------------------------------------------------


def test_a_removed_prompt_leaves_the_ledger_and_every_later_view_and_is_never_asked_again(chat: Any, lab: Any) -> None:
    gone = problems(3)[1]
    with chat.ChatServer() as server:
        sealed = lab.generate(problems(3), asking(server, n=2))
        done = forget(lab.runs, [gone.prompt_id], "asked by the author")
        assert (done.prompts, done.lines, done.stages, done.purged) == (1, 4, (sealed.folder,), False)
        for path in lab.runs.glob("ledger/*/*.jsonl"):
            assert gone.prompt_id not in path.read_text()
        assert '"reason":"asked by the author"' in (lab.runs / "ledger" / "tombstones.jsonl").read_text()
        later = lab.generate(problems(4), asking(server, n=2))
        assert {trace.prompt_id for trace in traces_of(later)} == {problems(4)[i].prompt_id for i in (0, 2, 3)}
        assert len(server.requests) == 8
        again = forget(lab.runs, [gone.prompt_id], "again", purge=True)
        assert (again.prompts, again.lines, again.stages) == (0, 0, (sealed.folder,))
        assert not sealed.folder.exists() and later.folder.exists()


@pytest.mark.parametrize("prompt_id", ["", "xyz", "0123456789abcde", "0123456789ABCDEF", "../../../../etc"])
def test_an_id_that_is_none_removes_nothing(lab: Any, prompt_id: str) -> None:
    with pytest.raises(DataError, match="16 hex digits"):
        forget(lab.runs, [prompt_id], "why")
    assert not lab.runs.exists()


# --- shards ---------------------------------------------------------------------------------------------------------


def sharded(lab: Any, index: int, of: int) -> RunOptions:
    return replace(lab.options, shard=Shard(index, of))


def test_shards_answer_their_parts_and_together_they_are_the_whole(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server:
        whole = replace(lab, runs=lab.runs / "whole").generate(problems(20), asking(server))
        server.requests.clear()
        recipe = lab.recipe(asking(server))
        step = lab.step(recipe, lab.prompts(problems(20)))
        with pytest.raises(IncompleteError, match="20 wanted samples have no answer"):
            generate.run(recipe, step, replace(lab.options, ask=False))
        for index in (3, 1, 2):
            generate.run_shard(recipe, step, sharded(lab, index, 3))
        assert len(server.requests) == 20 and not step.sealed
        merged = generate.run(recipe, step, replace(lab.options, ask=False))
        assert len(server.requests) == 20
    assert merged.digest == whole.digest
    assert picked(merged.counts, "answered", "reused", "asked") == (20, 20, 0)


def test_answers_of_one_sharding_are_found_by_another_and_by_none(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server:
        recipe = lab.recipe(asking(server))
        step = lab.step(recipe, lab.prompts(problems(20)))
        generate.run_shard(recipe, step, sharded(lab, 1, 2))
        half = len(server.requests)
        assert 0 < half < 20
        for index in range(1, 5):
            generate.run_shard(recipe, step, sharded(lab, index, 4))
        assert len(server.requests) == 20
        assert generate.run(recipe, step, lab.options).counts["asked"] == 0


def test_a_shard_and_another_number_of_shards_or_the_whole_never_write_at_once(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server:
        recipe = lab.recipe(asking(server))
        step = lab.step(recipe, lab.prompts(problems(3)))
        with generate.open_work(recipe, step, sharded(lab, 1, 2)):
            with pytest.raises(LockedError, match="shard 1/2 of the ledger is being written"):
                generate.run_shard(recipe, step, sharded(lab, 1, 2))
            with pytest.raises(LockedError, match="the ledger is being written"):
                generate.run(recipe, step, lab.options)
            with pytest.raises(RunError, match="all shards of one run must give the same N"):
                generate.run_shard(recipe, step, sharded(lab, 1, 3))
            generate.run_shard(recipe, step, sharded(lab, 2, 2))
        assert generate.run(recipe, step, lab.options).counts["answered"] == 3


def test_answers_of_another_machine_are_taken_over_once(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server:
        recipe = lab.recipe(asking(server))
        here, there = lab, replace(lab, runs=lab.runs / "there")
        steps = [one.step(recipe, one.prompts(problems(20))) for one in (here, there)]
        generate.run_shard(recipe, steps[0], sharded(here, 1, 2))
        generate.run_shard(recipe, steps[1], sharded(there, 2, 2))
        came = generate.take_over(recipe, steps[0], here.options, [there.runs])
        assert came == len(server.requests) - 20 + sum(Shard(2, 2).has(p.prompt_id) for p in problems(20)) > 0
        assert generate.take_over(recipe, steps[0], here.options, [there.runs]) == 0
        assert generate.run(recipe, steps[0], here.options).counts["asked"] == 0
        with pytest.raises(DataError, match="no answers to this recipe's teacher"):
            generate.take_over(recipe, steps[0], here.options, [lab.runs / "nowhere"])


def test_shards_share_a_budget(chat: Any, lab: Any) -> None:
    with chat.ChatServer() as server:
        recipe = lab.recipe(asking(server, budget={"output_tokens": 200}))  # ten answers
        step = lab.step(recipe, lab.prompts(problems(60)))
        for index in (1, 2):
            with pytest.raises(BudgetError):
                generate.run_shard(recipe, step, sharded(lab, index, 2))
        assert len(server.requests) == 10


# --- kills and signals ----------------------------------------------------------------------------------------------

CHILD = """
import json, sys
from pathlib import Path
from distill.config import recipe_from
from distill.errors import DistillError, Interrupted
from distill.runs import RunOptions, Step
from distill.teachers import generate

job = json.loads(sys.argv[1])
runs = Path(job["runs"])
prompts = Step("prompts", "prompts", "r", job["prompts"], {}, {}, runs)
step = Step("generate", "generate", "r", job["step"], job["fields"], {"prompts": prompts}, runs)
try:
    generate.run(recipe_from(job["recipe"]), step, RunOptions(runs=runs, quiet=True))
except Interrupted as stop:
    print(stop, file=sys.stderr)
    sys.exit(stop.exit_code)
"""


class Job:
    """A generate step that runs in a process of its own, to be killed."""

    def __init__(self, lab: Any, server: Any, count: int, n: int = 1) -> None:
        recipe = lab.recipe(asking(server, n=n))
        self.lab, self.prompts = lab, lab.prompts(problems(count))
        self.step = lab.step(recipe, self.prompts)
        self.ledger: Path | None = None
        self.argument = json.dumps(
            {
                "runs": str(lab.runs),
                "prompts": self.prompts.identity,
                "step": self.step.identity,
                "fields": dict(self.step.fields),
                "recipe": recipe.model_dump(mode="json"),
            }
        )

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-P", "-c", CHILD, self.argument], stderr=subprocess.PIPE, text=True)

    def answers(self) -> set[tuple[str, int]]:
        """Whole lines of the ledger, read from outside."""
        found = set()
        for path in self.lab.runs.glob("ledger/*/answers.jsonl"):
            for line in path.read_bytes().split(b"\n")[:-1]:
                row = json.loads(line)
                found.add((row["prompt_id"], row["sample"]))
        return found


def wait_for(condition: Any, timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def test_a_run_that_is_killed_again_and_again_ends_equal_and_buys_no_received_answer_twice(chat: Any, lab: Any) -> None:
    dice, kills = random.Random(7), 5
    slow = lambda number, _: chat.Reply(delay_s=0.004 * (number % 7))  # noqa: E731
    with chat.ChatServer(slow) as server:
        whole = replace(lab, runs=lab.runs / "whole").generate(problems(60), asking(server, n=2))
        server.requests.clear()
        job = Job(lab, server, 60, n=2)
        at_kill: list[tuple[int, set[tuple[str, int]]]] = []
        for _ in range(kills):
            before = len(server.requests)
            process = job.start()
            target = before + dice.randrange(10, 20)
            wait_for(lambda target=target: len(server.requests) >= target)
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            wait_for(lambda: server.in_flight == 0)  # what was in flight has reached the server by now
            at_kill.append((len(server.requests), job.answers()))
        resumed = generate.run(lab.recipe(asking(server, n=2)), job.step, lab.options)
        keys = {trace.sampling["seed"]: (trace.prompt_id, trace.sample) for trace in traces_of(resumed)}
    assert resumed.digest == whole.digest
    assert resumed.counts["answered"] == 120
    for asked, answered in at_kill:
        assert answered, "the kill came before anything was kept: the test shows nothing"
        later = {keys[body["seed"]] for body in server.requests[asked:]}
        assert later.isdisjoint(answered)
    twice = sum(server.asked.values()) - len(server.asked)
    assert 0 < twice <= kills * CONCURRENCY
    assert resumed.counts["possibly_paid_twice"] <= CONCURRENCY


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_two_hundred_kills_at_random_moments_lose_nothing_and_buy_nothing_received_twice(chat: Any, lab: Any) -> None:
    dice, kills, prompts = random.Random(11), 200, 2000
    life = {"answered": 0, "most": 10**9}

    def plan(number: int, body: Mapping[str, Any]) -> Any:
        life["answered"] += 1  # so that the run does not end before the last kill
        hang = life["answered"] > life["most"]
        return chat.Reply(how="hang") if hang else chat.Reply(delay_s=random.random() / 20)

    with chat.ChatServer(plan) as server:
        whole = replace(lab, runs=lab.runs / "whole").generate(problems(prompts), asking(server))
        server.requests.clear()
        job = Job(lab, server, prompts)
        known: set[tuple[str, int]] = set()
        seed_of = {trace.sampling["seed"]: (trace.prompt_id, trace.sample) for trace in traces_of(whole)}
        for _ in range(kills):
            before = len(server.requests)
            life |= {"answered": 0, "most": 9}
            process = job.start()
            if dice.random() < 0.9:  # the others are killed while they start
                wait_for(lambda before=before: len(server.requests) > before, timeout_s=60)
            time.sleep(dice.random() * 0.3)
            process.kill()
            process.communicate()
            asked_now = {seed_of[body["seed"]] for body in server.requests[before:]}
            assert asked_now.isdisjoint(known)  # whatever had been received is not asked for again
            assert len(server.requests) - before - len(job.answers() - known) <= CONCURRENCY
            known = job.answers()
        life["most"] = 10**9
        before = len(server.requests)
        resumed = generate.run(lab.recipe(asking(server)), job.step, lab.options)
        assert {seed_of[body["seed"]] for body in server.requests[before:]}.isdisjoint(known)
    assert kills < len(known) < prompts
    assert resumed.digest == whole.digest
    twice = sum(server.asked.values()) - len(server.asked)
    assert 0 < twice <= kills * CONCURRENCY
    assert resumed.counts["possibly_paid_twice"] <= CONCURRENCY * kills


def test_with_a_fifth_of_the_requests_going_wrong_every_prompt_is_answered_once_or_listed_as_failed(
    chat: Any, lab: Any
) -> None:
    dice = random.Random(5)
    faults = [
        lambda: chat.Reply(429, b"slow down", {"Retry-After": "0"}),
        lambda: chat.Reply(500, b"boom"),
        lambda: chat.Reply(how="reset"),
        lambda: chat.Reply(200, b""),
        lambda: chat.Reply(200, b'{"choices": [{"mess'),
    ]
    refused = "problem 77"

    def plan(number: int, body: Mapping[str, Any]) -> Any:
        if body["messages"][-1]["content"] == refused:
            return chat.Reply(413, b"too large")
        return dice.choice(faults)() if dice.random() < 0.2 else chat.Reply()

    with chat.ChatServer(plan) as server:
        recipe = lab.recipe(asking(server))  # no retries: what fails is left to the next run
        step = lab.step(recipe, lab.prompts(problems(200)))
        runs = 0
        while not step.sealed and (runs := runs + 1) < 20:
            try:
                generate.run(recipe, step, lab.options)
            except IncompleteError:
                failed = list(read_records(step.folder / "failed.jsonl", Trace))
                assert len({trace.prompt_id for trace in failed}) == len(failed) > 1
    sealed = open_sealed(step.folder)
    assert runs > 1 and picked(sealed.counts, "answered", "failed") == (199, 1)
    assert [trace.prompt_id for trace in traces_of(sealed)] == [
        prompt.prompt_id for prompt in problems(200) if prompt.text != refused
    ]


def test_the_first_signal_waits_for_what_is_in_flight_and_the_run_goes_on_later(chat: Any, lab: Any) -> None:
    with chat.ChatServer(lambda *_: chat.Reply(delay_s=0.3)) as server:
        job = Job(lab, server, 12)
        process = job.start()
        wait_for(lambda: len(server.requests) >= CONCURRENCY + 2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "waiting for" in said and "run the same command to continue" in said
        assert len(job.answers()) == len(server.requests) < 12
        assert not job.step.sealed
        sealed = generate.run(lab.recipe(asking(server)), job.step, lab.options)
        assert len(server.requests) == 12
    assert picked(sealed.counts, "answered", "possibly_paid_twice") == (12, 0)


def test_the_second_signal_stops_at_once_and_loses_no_finished_answer(chat: Any, lab: Any) -> None:
    with chat.ChatServer(lambda number, _: chat.Reply(how="hang") if number > 3 else chat.Reply()) as server:
        job = Job(lab, server, 12)
        process = job.start()
        wait_for(lambda: len(job.answers()) == 3 and len(server.requests) == 3 + CONCURRENCY)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 143
        assert len(job.answers()) == 3
        server.plan = lambda *_: chat.Reply()
        sealed = generate.run(lab.recipe(asking(server)), job.step, lab.options)
    assert picked(sealed.counts, "answered", "reused", "possibly_paid_twice") == (12, 3, CONCURRENCY)


# --- engines that answer in batches ---------------------------------------------------------------------------------


class BatchEngine:
    """Its text depends on who shares the batch, as padding makes it depend in a real one."""

    name, version = "transformers", "test"

    def __init__(self, size: int, die_after: int = 10**9) -> None:
        self.batch_size: int | None = size
        self.die_after = die_after
        self.batches: list[list[str]] = []

    async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        batch = [request async for request in requests]
        members = [request.prompt.text.removeprefix("problem ") for request in batch]
        self.batches.append(members)
        for request in batch:
            self.die_after -= 1
            if self.die_after < 0:
                raise KeyboardInterrupt
            yield Completion(request.key, answer=" ".join(members), raw=" ".join(members), finish_reason="stop")

    async def close(self) -> None:
        pass


def collect(engine: Any, prompts: Path, ledger: Ledger, purse: Purse | None = None, n: int = 1) -> Collection:
    teacher = TeacherConfig(engine="transformers", model="m", sampling={"n": n})
    purse = purse or Purse(teacher.budget, {"cfg": ledger}, {})
    ladder = Ladder((Rung(teacher.sampling, "cfg", ledger),))
    work = Collection(engine, teacher, policy_of(teacher), ladder, Wanted(prompts), purse, Bar("test", None), Stop())
    asyncio.run(work.run())
    return work


def answers(ledger: Ledger, prompts: Path, n: int = 1) -> list[str | None]:
    found = [ledger.get((p.prompt_id, sample)) for p in read_records(prompts, Prompt) for sample in range(n)]
    return [trace and trace.answer for trace in found]


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    write_records(tmp_path / "train.jsonl", problems(10))
    return tmp_path / "train.jsonl"


def open_at(folder: Path) -> Ledger:
    folder.mkdir(exist_ok=True)
    return Ledger(folder)


@pytest.mark.parametrize("die_after", range(10))
def test_batches_are_cut_from_the_whole_list_so_a_resume_gives_equal_text(
    ten: Path, tmp_path: Path, die_after: int
) -> None:
    whole = open_at(tmp_path / "whole")
    collect(BatchEngine(4), ten, whole)
    ledger = open_at(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        collect(BatchEngine(4, die_after), ten, ledger)
    kept = answers(ledger, ten)
    assert sum(answer is not None for answer in kept) == die_after
    engine = BatchEngine(4)
    collect(engine, ten, ledger)
    assert answers(ledger, ten) == answers(whole, ten)
    assert answers(ledger, ten)[:die_after] == kept[:die_after]
    assert engine.batches == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9"]][die_after // 4 :]
    whole.close()
    ledger.close()


def test_cutting_batches_from_what_is_left_would_give_other_text(ten: Path, tmp_path: Path) -> None:
    ledger = open_at(tmp_path / "l")
    with pytest.raises(KeyboardInterrupt):
        collect(BatchEngine(4, 5), ten, ledger)
    left = [p for p in problems(10) if not ledger.answered((p.prompt_id, 0))]
    write_records(tmp_path / "left.jsonl", left)
    collect(BatchEngine(4), tmp_path / "left.jsonl", ledger)
    whole = open_at(tmp_path / "whole")
    collect(BatchEngine(4), ten, whole)
    assert answers(ledger, ten) != answers(whole, ten)
    whole.close()
    ledger.close()


def test_a_batch_with_nothing_owed_is_skipped_and_members_that_were_there_are_not_journalled_again(
    ten: Path, tmp_path: Path
) -> None:
    ledger = open_at(tmp_path / "l")
    with pytest.raises(KeyboardInterrupt):
        collect(BatchEngine(4, 6), ten, ledger)
    before = (tmp_path / "l" / "journal.jsonl").read_text().count("\n")
    work = collect(BatchEngine(4), ten, ledger)
    assert work.progress.asked == 4 and work.finished
    assert (tmp_path / "l" / "journal.jsonl").read_text().count("\n") == before + 4
    ledger.close()


def test_a_budget_stops_a_batch_engine_between_batches(ten: Path, tmp_path: Path) -> None:
    ledger = open_at(tmp_path / "l")
    purse = Purse(Budget(output_tokens=10), {"cfg": ledger}, {})  # a batch of four is guessed at 8 tokens
    work = collect(BatchEngine(4), ten, ledger, purse)
    assert (work.progress.asked, work.finished) == (4, False)
    ledger.close()


class ForgetfulEngine(BatchEngine):
    """Gives no completion at all for some requests."""

    async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        async for request in requests:
            if not request.prompt.text.endswith("3"):
                yield Completion(request.key, answer="x", raw="x", finish_reason="stop")


def test_requests_that_an_engine_forgets_stay_owed_and_known_as_in_doubt(ten: Path, tmp_path: Path) -> None:
    ledger = open_at(tmp_path / "l")
    engine = ForgetfulEngine(4)
    engine.batch_size = None
    work = collect(engine, ten, ledger)
    assert work.finished
    assert answers(ledger, ten).count(None) == 1
    assert ledger.possibly_paid((problems(10)[3].prompt_id, 0))
    ledger.close()


def test_requests_are_pulled_one_by_one_and_journalled_before_they_are_sent(ten: Path, tmp_path: Path) -> None:
    ledger = open_at(tmp_path / "l")
    journal = tmp_path / "l" / "journal.jsonl"

    class Watching(BatchEngine):
        async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
            number = 0
            async for request in requests:
                number += 1
                lines = journal.read_text().splitlines()
                assert len(lines) == number and json.loads(lines[-1])["prompt_id"] == request.prompt.prompt_id
                yield Completion(request.key, answer="x", raw="x")

    engine = Watching(1)
    engine.batch_size = None
    assert collect(engine, ten, ledger).progress.asked == 10
    ledger.close()


# --- the built-in solver through the whole stage --------------------------------------------------------------------


def sums(count: int) -> Iterator[Prompt]:
    for number in range(count):
        expression = f"{number} + 5"
        row = {"task": "chain_sum", "entry": {"metadata": {"expression": expression}}}
        yield Prompt.of([Message(role="user", content=expression)], gold=str(number + 5), source="sums", row=row)


def test_the_solver_answers_through_the_same_stage(lab: Any) -> None:
    sealed = lab.generate(list(sums(5)), {"engine": "solver"})
    assert [trace.answer for trace in traces_of(sealed)] == [f"\\boxed{{{number + 5}}}" for number in range(5)]
    assert {trace.think for trace in traces_of(sealed)} == {"closed"}


def test_a_problem_the_solver_does_not_know_is_a_failure_not_a_crash(lab: Any) -> None:
    sealed = lab.generate([*sums(2), *problems(1)], {"engine": "solver"})
    (failure,) = traces_of(sealed, "failed.jsonl")
    assert "no worked solution" in str(failure.error)


def test_progress_is_silent_when_quiet_and_plain_otherwise(
    lab: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lab.generate(list(sums(3)), {"engine": "solver"})
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    recipe = lab.recipe({"engine": "solver"})
    step = lab.step(recipe, lab.prompts(list(sums(4))))
    generate.run(recipe, step, RunOptions(runs=lab.runs))
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == "generate: 3 of 4 answers are in the ledger already\n"
