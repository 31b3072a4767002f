"""The batch engine against a real local server that counts what is paid for and kills its client on request."""

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.config import BatchOptions, Endpoint, FormatConfig, Prices, Sampling, TeacherConfig
from distill.engines import Completion, Request, Stateful, open_engine, stream
from distill.engines.batch_state import custom_id
from distill.engines.openai_batch import OpenAIBatchEngine, preflight
from distill.errors import EngineError, RecipeError, RunError
from distill.records import Message, Prompt
from distill.runs import RunOptions

spec = importlib.util.spec_from_file_location("batch_server", Path(__file__).parent / "batch_server.py")
assert spec and spec.loader
server_module: Any = importlib.util.module_from_spec(spec)
sys.modules["batch_server"] = server_module
spec.loader.exec_module(server_module)
BatchServer, Ending, Trick = server_module.BatchServer, server_module.Ending, server_module.Trick
answered, failed = server_module.answered, server_module.failed

SECRET = "sk-a-secret-of-forty-characters-0123456789"


def engine_of(
    server: Any, folder: Path, prices: Prices | None = None, retries: int = 3, quiet_s: float = 30.0, **batch: Any
) -> Any:
    options = BatchOptions(poll_s=0.02, **batch)
    endpoint = Endpoint(base_url=server.base_url, timeout_s=5, max_retries=retries, prices=prices)
    engine = OpenAIBatchEngine(
        "r1", endpoint, options, FormatConfig(), first_delay_s=0.01, first_poll_s=0.01, in_doubt_s=0.2, quiet_s=quiet_s
    )
    engine.keep_state_in(folder)
    return engine


def requests(count: int, first: int = 0, **sampling: Any) -> list[Request]:
    texts = [f"question {number}" for number in range(first, first + count)]
    prompts = [Prompt.of([Message(role="user", content=text)]) for text in texts]
    return [Request(p, 0, Sampling(**sampling), 100 + number, "be brief") for number, p in enumerate(prompts, first)]


def ask(engine: Any, wanted: list[Request] | AsyncIterator[Request]) -> dict[str, Completion]:
    """Completions by prompt id."""

    async def collect() -> dict[str, Completion]:
        source = stream(wanted) if isinstance(wanted, list) else wanted
        found = [completion async for completion in engine.generate(source)]
        assert len({completion.key for completion in found}) == len(found), "nothing comes twice"
        return {completion.key[0]: completion for completion in found}

    return asyncio.run(collect())


def state(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "batches").glob("*.json"))]


# --- what is sent and what comes back -------------------------------------------------------------------------------


def test_a_batch_is_uploaded_created_and_collected_at_its_price(tmp_path: Path) -> None:
    prices = Prices(input_usd_per_mtok=1.0, output_usd_per_mtok=2.0)
    wanted = requests(3, temperature=0.6, top_p=0.95, max_new_tokens=77)
    with BatchServer() as server:
        found = ask(engine_of(server, tmp_path, prices), wanted)
        [batch] = server.batches.values()
    assert list(found) == [request.prompt.prompt_id for request in wanted]
    first = found[wanted[0].prompt.prompt_id]
    assert (first.reasoning, first.answer, first.think) == ("I count 'question 0'.", "\\boxed{10}", "closed")
    assert (first.finish_reason, first.usage.output, first.usage.reasoning) == ("stop", 1000, 900)
    assert first.cost_usd == pytest.approx(0.5 * (100 * 1.0 + 1000 * 2.0) / 1e6)
    assert first.model == "r1-2025" and first.latency_s > 0 and first.error is None
    assert batch.items[0] == {
        "custom_id": f"{wanted[0].prompt.prompt_id}:0:77",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "r1",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "question 0"}],
            "temperature": 0.6,
            "top_p": 0.95,
            "max_tokens": 77,
            "seed": 100,
        },
    }
    [remembered] = state(tmp_path)
    assert batch.document["completion_window"] == "24h"
    assert batch.document["metadata"] == {"distill_batch": remembered["name"]}
    assert (remembered["batch_id"], remembered["ended"]) == ("batch_1", "completed")


def test_a_price_ratio_of_one_costs_as_much_as_single_requests_and_no_prices_leave_it_open(tmp_path: Path) -> None:
    prices = Prices(input_usd_per_mtok=1.0, output_usd_per_mtok=2.0)
    with BatchServer() as server:
        [full] = ask(engine_of(server, tmp_path / "1", prices, price_ratio=1.0), requests(1)).values()
        [unknown] = ask(engine_of(server, tmp_path / "2"), requests(1)).values()
    assert full.cost_usd == pytest.approx(2100 / 1e6) and unknown.cost_usd is None


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / name).mkdir()


def test_batches_are_cut_by_number_and_by_size_and_few_are_open_at_once(tmp_path: Path) -> None:
    with BatchServer() as server:
        found = ask(engine_of(server, tmp_path, max_requests=4, max_open=2), requests(18))
        sizes = [len(batch.items) for batch in server.batches.values()]
        assert len(found) == 18 and sizes == [4, 4, 4, 4, 2]
        assert max(batch.others_open for batch in server.batches.values()) == 1
    line = 360
    with BatchServer() as server:
        ask(engine_of(server, tmp_path / "1", max_mb=3.5 * line / 1e6), requests(7))
        sizes = [len(batch.items) for batch in server.batches.values()]
        assert sum(sizes) == 7 and 1 < len(sizes) < 7
    with BatchServer() as server:
        ask(engine_of(server, tmp_path / "2", max_mb=1e-6), requests(3))
        assert [len(batch.items) for batch in server.batches.values()] == [1, 1, 1], "one always fits"


def test_a_batch_that_is_not_full_is_handed_in_when_the_next_request_waits_for_an_answer(tmp_path: Path) -> None:
    first, second = requests(2), requests(2, first=2)
    came = asyncio.Event()

    async def one_after_the_other() -> AsyncIterator[Request]:
        for request in first:
            yield request
        await came.wait()
        for request in second:
            yield request

    async def collect(engine: Any) -> int:
        number = 0
        async for completion in engine.generate(one_after_the_other()):
            assert completion.error is None
            number += 1
            if number == 2:
                came.set()
        return number

    with BatchServer() as server:
        assert asyncio.run(collect(engine_of(server, tmp_path, quiet_s=0.5))) == 4
        assert [len(batch.items) for batch in server.batches.values()] == [2, 2]


def test_a_sample_that_is_asked_again_with_a_higher_limit_is_another_request(tmp_path: Path) -> None:
    with BatchServer() as server:
        engine = engine_of(server, tmp_path)
        ask(engine, requests(1, max_new_tokens=10))
        ask(engine, requests(1, max_new_tokens=20))
        assert sorted(server.bought.values()) == [1, 1]
    assert custom_id(requests(1, max_new_tokens=10)[0]) != custom_id(requests(1, max_new_tokens=20)[0])


def test_the_probe_is_one_ordinary_request(tmp_path: Path) -> None:
    with BatchServer() as server:
        probe = asyncio.run(engine_of(server, tmp_path).probe(requests(1)[0]))
        assert server.calls["chat"] >= 1 and not server.batches
    assert probe.usage.output >= 1000


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_what_an_ended_batch_has_answered_is_kept_and_only_the_rest_is_bought_again(
    status: str, tmp_path: Path
) -> None:
    expiry = {"code": "batch_expired", "message": "the window has passed"}

    def ending(number: int, items: list[Any]) -> Any:
        if number > 1:
            return Ending()
        return Ending(
            status,
            lambda items: [answered(item) for item in items[:3]],
            lambda items: [{"custom_id": items[3]["custom_id"], "response": None, "error": expiry}],
        )

    wanted = requests(5)
    with BatchServer(ending) as server:
        found = ask(engine_of(server, tmp_path), wanted)
        errors = [found[request.prompt.prompt_id].error for request in wanted]
        assert errors[:3] == [None] * 3
        assert errors[3] == f"batch batch_1 {status}: the window has passed"
        assert errors[4] == f"batch batch_1 {status}: no answer in it"
        assert all(completion.retryable for completion in found.values() if completion.error)
        # a later process is told that two failed, and asks for all that it has no answer to
        engine = engine_of(server, tmp_path)
        assert [engine.holds(request) for request in wanted] == [True] * 3 + [False] * 2
        again = ask(engine, wanted)
        assert all(completion.error is None for completion in again.values()) and len(again) == 5
        assert [server.bought[custom_id(request)] for request in wanted] == [1, 1, 1, 2, 2]


def test_failures_of_single_requests_say_whether_asking_again_may_help(tmp_path: Path) -> None:
    filtered = {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}

    def ending(number: int, items: list[Any]) -> Any:
        def failures(items: list[Any]) -> list[Any]:
            return [
                failed(items[0], 500, "the server failed"),
                failed(items[1], 400, "the prompt is too long"),
                {"custom_id": items[2]["custom_id"], "response": {"status_code": 200, "body": filtered}},
                {"custom_id": items[3]["custom_id"], "response": {"status_code": 200, "body": {"error": "odd"}}},
                {"custom_id": items[4]["custom_id"], "response": {"status_code": 200, "body": [1]}},
                {"no": "result"},
            ]

        return Ending(answers=lambda items: [answered(item) for item in items[5:]], failures=failures)

    wanted = requests(6)
    with BatchServer(ending) as server:
        found = ask(engine_of(server, tmp_path), wanted)
    told = [(found[r.prompt.prompt_id].error or "", found[r.prompt.prompt_id].retryable) for r in wanted]
    assert told[0] == ("500 the server failed", True)
    assert told[1] == ("400 the prompt is too long", False)
    assert "content filter" in told[2][0] and not told[2][1]
    assert "odd" in told[3][0] and told[3][1]
    assert "not a chat completion" in told[4][0] and told[4][1]
    assert told[5] == ("", False)


def test_a_batch_that_is_refused_as_a_whole_stops_the_run_and_its_requests_are_free_again(tmp_path: Path) -> None:
    def ending(number: int, items: list[Any]) -> Any:
        return Ending("failed", refusal=("model_not_found", "no batches of r1")) if number == 1 else Ending()

    with BatchServer(ending) as server:
        with pytest.raises(
            EngineError, match="refused batch batch_1: model_not_found: no batches of r1; check teacher"
        ):
            ask(engine_of(server, tmp_path), requests(2))
        found = ask(engine_of(server, tmp_path), requests(2))
    assert [completion.error for completion in found.values()] == [None, None]


def test_a_batch_that_is_too_much_for_now_waits_until_another_has_ended(tmp_path: Path) -> None:
    def ending(number: int, items: list[Any]) -> Any:
        refusal = ("token_limit_exceeded", "Enqueued token limit reached")
        return Ending("failed", refusal=refusal) if number == 2 else Ending()

    with BatchServer(ending, looks=lambda number: 12 if number == 1 else 1) as server:
        found = ask(engine_of(server, tmp_path, max_requests=2), requests(4))
        assert len(found) == 4 and not any(completion.error for completion in found.values())
        assert set(server.questions.values()) == {1}
        assert [batch.others_open for batch in server.batches.values()] == [0, 1, 0]


def test_too_much_for_now_with_no_other_batch_stops_with_the_remedy(tmp_path: Path) -> None:
    refusal = ("token_limit_exceeded", "Enqueued token limit reached")
    with BatchServer(lambda number, items: Ending("failed", refusal=refusal)) as server:
        with pytest.raises(EngineError, match=r"Enqueued token limit reached; .*lower teacher.batch.max_requests"):
            ask(engine_of(server, tmp_path), requests(2))


@pytest.mark.parametrize("what", ["upload", "look", "list", "download"])
@pytest.mark.parametrize(
    "trick", [Trick(500), Trick(429, {"Retry-After": "0"}), Trick(how="reset"), Trick(how="half"), Trick(how="torn")]
)
def test_trouble_that_passes_is_tried_again(what: str, trick: Any, tmp_path: Path) -> None:
    def once(did: str, number: int) -> Any:
        if did == "create" and what == "list" and number == 1:
            return Trick(how="reset")  # in doubt, so that it has to be looked for
        return trick if did == what and number == 1 else Trick()

    with BatchServer(trick=once) as server:
        found = ask(engine_of(server, tmp_path), requests(3))
        assert len(found) == 3 and not any(completion.error for completion in found.values())
        assert server.calls[what] >= 2 and set(server.bought.values()) == {1}


def test_trouble_that_stays_stops_with_a_word_on_what_stays_at_the_server(tmp_path: Path) -> None:
    with BatchServer(trick=lambda what, number: Trick(503) if what == "look" else Trick()) as server:
        with pytest.raises(EngineError, match=r"503 scripted trouble \(tried 2 times\); batches .* stay at the server"):
            ask(engine_of(server, tmp_path, retries=1), requests(2))
        server.trick = lambda what, number: Trick()
        assert len(ask(engine_of(server, tmp_path), requests(2))) == 2
        assert set(server.bought.values()) == {1}


def test_a_server_without_batches_is_named_with_the_remedy(tmp_path: Path) -> None:
    with BatchServer(trick=lambda what, number: Trick(404)) as server:
        with pytest.raises(EngineError, match=r"has no batch interface .*use engine: openai"):
            ask(engine_of(server, tmp_path), requests(1))
        server.trick = lambda what, number: Trick(401)
        with pytest.raises(EngineError, match="it was sent no key; set OPENAI_API_KEY"):
            ask(engine_of(server, tmp_path), requests(1))
        server.trick = lambda what, number: Trick(413)
        with pytest.raises(EngineError, match=r"too large .*max_mb"):
            ask(engine_of(server, tmp_path), requests(1))


@pytest.mark.parametrize("what", ["look", "download"])
def test_a_batch_that_the_server_has_forgotten_is_named_with_the_file_to_delete(what: str, tmp_path: Path) -> None:
    with BatchServer(trick=lambda did, number: Trick(404 if did == what else 200)) as server:
        with pytest.raises(EngineError, match=r"does not know batch batch_1.*404 scripted.*or delete") as refusal:
            ask(engine_of(server, tmp_path), requests(1))
        [path] = (tmp_path / "batches").glob("*.json")
        assert str(path) in str(refusal.value)
        path.unlink()
        server.trick = lambda did, number: Trick()
        assert len(ask(engine_of(server, tmp_path), requests(1))) == 1


# --- creation in doubt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trick", [Trick(how="reset"), Trick(how="half")])
def test_a_batch_whose_creation_is_in_doubt_is_found_by_its_name_and_not_created_again(
    trick: Any, tmp_path: Path
) -> None:
    with BatchServer(trick=lambda what, number: trick if (what, number) == ("create", 1) else Trick()) as server:
        found = ask(engine_of(server, tmp_path), requests(3))
        assert server.calls["create"] == 1 and server.calls["list"] >= 1
        assert set(server.bought.values()) == {1}
    assert len(found) == 3


@pytest.mark.parametrize("trick", [Trick(how="reset-before"), Trick(500), Trick(429, {"Retry-After": "0"})])
def test_a_batch_that_was_not_created_is_created_once(trick: Any, tmp_path: Path) -> None:
    with BatchServer(trick=lambda what, number: trick if (what, number) == ("create", 1) else Trick()) as server:
        found = ask(engine_of(server, tmp_path), requests(3))
        assert server.calls["create"] == 2 and server.calls["upload"] == 1
        assert set(server.bought.values()) == {1}
    assert len(found) == 3


def test_a_server_that_never_creates_stops_the_run_and_nothing_is_bought(tmp_path: Path) -> None:
    with BatchServer(trick=lambda what, number: Trick(500) if what == "create" else Trick()) as server:
        with pytest.raises(EngineError, match=r"could not be created: 500 scripted trouble \(tried 2 times\)"):
            ask(engine_of(server, tmp_path, retries=1), requests(2))
        server.trick = lambda what, number: Trick()
        found = ask(engine_of(server, tmp_path), requests(2))
        assert len(found) == 2 and set(server.bought.values()) == {1}


def test_a_batch_is_found_behind_many_others(tmp_path: Path) -> None:
    with BatchServer() as server:
        ask(engine_of(server, tmp_path, max_requests=1), requests(7))
        assert len(server.batches) == 7, "pages hold two"
        [oldest, *_] = sorted(state(tmp_path), key=lambda batch: batch["batch_id"])
        path = tmp_path / "batches" / f"{oldest['name']}.json"
        path.write_text(json.dumps(oldest | {"batch_id": None, "ended": None}))
        held = {item.split(":")[0] for item in oldest["items"]}
        [answer] = ask(engine_of(server, tmp_path), [r for r in requests(7) if r.prompt.prompt_id in held]).values()
        assert answer.error is None and len(server.batches) == 7


# --- what is remembered ---------------------------------------------------------------------------------------------


def test_a_later_process_waits_for_what_an_earlier_one_handed_in(tmp_path: Path) -> None:
    wanted = requests(5)

    async def hand_in_and_die(engine: Any) -> None:
        async def some() -> AsyncIterator[Request]:
            for request in wanted[:3]:
                yield request
            await asyncio.Event().wait()

        task = asyncio.create_task(anext(engine.generate(some())))
        while server.calls["look"] < 3:
            await asyncio.sleep(0.01)
        task.cancel()

    with BatchServer() as server:
        server.hold.clear()
        asyncio.run(hand_in_and_die(engine_of(server, tmp_path, quiet_s=0.5)))
        server.hold.set()
        engine = engine_of(server, tmp_path)
        assert [engine.holds(request) for request in wanted] == [True] * 3 + [False] * 2
        assert len(ask(engine, wanted)) == 5
        assert [len(batch.items) for batch in server.batches.values()] == [3, 2]
        assert all(engine.holds(request) for request in wanted), "their answers are on the disk"


def test_answers_that_were_downloaded_are_read_from_the_disk(tmp_path: Path) -> None:
    with BatchServer() as server:
        ask(engine_of(server, tmp_path), requests(4))
        calls = dict(server.calls)
        found = ask(engine_of(server, tmp_path), requests(2, first=1))
        assert len(found) == 2 and dict(server.calls) == calls, "the server was not asked at all"


def test_batches_of_shards_are_collected_by_the_whole_and_the_other_way_round(tmp_path: Path) -> None:
    shard = tmp_path / "shards" / "1-of-2"
    shard.mkdir(parents=True)
    with BatchServer() as server:
        ask(engine_of(server, shard), requests(2))
        ask(engine_of(server, tmp_path), requests(4))
        ask(engine_of(server, shard), requests(4))
        assert set(server.questions.values()) == {1} and len(server.questions) == 4


def test_unfinished_batches_at_another_server_are_not_bought_again_elsewhere(tmp_path: Path) -> None:
    with BatchServer() as server:
        ask(engine_of(server, tmp_path), requests(1))
        [batch] = state(tmp_path)
        path = tmp_path / "batches" / f"{batch['name']}.json"
        with BatchServer() as other:
            engine_of(other, tmp_path)  # what has ended is no matter
            path.write_text(json.dumps(batch | {"ended": None}))
            with pytest.raises(EngineError, match=f"a batch of 1 requests lies at {server.base_url}.*go back"):
                engine_of(other, tmp_path)
        path.write_text("{")
        with pytest.raises(RunError, match=r"damaged .*restore it, or delete it"):
            engine_of(server, tmp_path)


def test_the_key_is_sent_and_never_written_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)

    def ending(number: int, items: list[Any]) -> Any:
        return Ending(failures=lambda items: [failed(items[0], 400, f"key {SECRET} is odd")], answers=lambda items: [])

    with BatchServer(ending) as server:
        [refused] = ask(engine_of(server, tmp_path), requests(1)).values()
        assert server.authorizations == {f"Bearer {SECRET}"}
        refusal = ("bad", f"key {SECRET} is odd")
        server.ending = lambda number, items: Ending("failed", refusal=refusal)
        with pytest.raises(EngineError, match="key <OPENAI_API_KEY> is odd"):
            ask(engine_of(server, tmp_path), requests(1, first=1))
    assert refused.error == "400 key <OPENAI_API_KEY> is odd"
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    # what the server itself repeated lies in its file of results, which is kept as it came
    assert not [path for path in (tmp_path / "batches").glob("*.json") if SECRET in path.read_text()]


def test_a_teacher_without_a_folder_is_refused_and_so_are_two_servers_and_a_missing_key(tmp_path: Path) -> None:
    teacher = TeacherConfig(engine="openai_batch", model="r1", endpoint=Endpoint(base_url="http://127.0.0.1:9/v1"))
    engine = open_engine(teacher, FormatConfig(), RunOptions())
    assert isinstance(engine, Stateful) and engine.batch_size is None
    with pytest.raises(EngineError, match="take engine: openai here"):
        ask(engine, requests(1))
    with pytest.raises(ValueError, match="a batch lies at one server"):
        TeacherConfig(engine="openai_batch", model="r1", endpoints=[Endpoint()])
    with pytest.raises(EngineError, match="needs a key"):
        preflight(TeacherConfig(engine="openai_batch", model="r1"), FormatConfig(), RunOptions())


# --- kills, by the command line -------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[Any], Path]:
    """A function that writes a recipe for a server: 6 prompts, batches of 4."""

    def write(server: Any) -> Path:
        rows = [{"question": f"problem {number}", "answer": "9"} for number in range(6)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        teacher = {
            "engine": "openai_batch",
            "model": "r1",
            "probe": False,
            "endpoint": {"base_url": server.base_url},
            "batch": {"max_requests": 4, "poll_s": 0.05},
            "prices": {"input_usd_per_mtok": 1, "output_usd_per_mtok": 2},
        }
        path = tmp_path / "recipe.yaml"
        prompts = [{"name": "rows", "file": str(tmp_path / "rows.jsonl")}]
        path.write_text(json.dumps({"name": "r", "prompts": prompts, "teacher": teacher}))
        return path

    return write


def command(recipe: Path) -> list[str]:
    runs = str(recipe.parent / "runs")
    return [sys.executable, "-m", "distill.cli", "generate", str(recipe), "--runs", runs, "--threads", "1"]


@pytest.fixture
def started(recipe: Callable[[Any], Path]) -> Iterator[Callable[[Any], "subprocess.Popen[str]"]]:
    """A function that starts `distill generate` against a server, which may kill it."""
    processes = []

    def start(server: Any) -> "subprocess.Popen[str]":
        server.lock.acquire()  # it must know its victim before it answers
        process = subprocess.Popen(
            command(recipe(server)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment()
        )
        server.client = process.pid
        server.lock.release()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONWARNINGS": "ignore"}


def finish(recipe: Path) -> dict[str, Any]:
    """Run the command to its end; the counts of the sealed run."""
    result = subprocess.run(command(recipe), capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr
    [sealed] = (recipe.parent / "runs" / "generate").glob("*/stage.json")
    return dict(json.loads(sealed.read_text())["counts"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "how"),
    [("upload", "kill"), ("create", "kill"), ("look", "kill"), ("download", "half-kill"), ("download", "kill")],
)
def test_a_run_killed_anywhere_buys_nothing_twice_and_loses_nothing(
    what: str, how: str, recipe: Callable[[Any], Path], started: Callable[[Any], "subprocess.Popen[str]"]
) -> None:
    with BatchServer(trick=lambda did, number: Trick(how=how) if (did, number) == (what, 1) else Trick()) as server:
        assert started(server).wait(timeout=120) == -signal.SIGKILL
        bought = sum(server.bought.values())
        counts = finish(recipe(server))
        assert counts["answered"] == 6 and counts["failed"] == 0
        assert set(server.questions.values()) == {1} and len(server.questions) == 6
        assert counts["usd"] == pytest.approx(6 * 0.5 * 2100 / 1e6)
    assert bought == 0 if what == "upload" else bought > 0, "the kill came where it was meant to"


@pytest.mark.slow
def test_ctrl_c_leaves_the_batch_at_the_server_and_the_next_run_collects_it(
    recipe: Callable[[Any], Path], started: Callable[[Any], "subprocess.Popen[str]"]
) -> None:
    with BatchServer() as server:
        server.hold.clear()
        process = started(server)
        while server.calls["look"] < 6 or len(server.batches) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "stopping: 2 batches with 6 requests stay at" in said and "run the same command" in said
        server.hold.set()
        assert finish(recipe(server))["answered"] == 6
        assert set(server.questions.values()) == {1}


def test_recipe_mistakes_in_the_batch_section_are_named(write_recipe: Callable[..., Path]) -> None:
    from distill.config import load_recipe

    prompts = [{"name": "rows", "file": "rows.jsonl"}]
    teacher = {"engine": "openai_batch", "model": "r1", "batch": {"price_ration": 0.5}}
    with pytest.raises(RecipeError, match="did you mean 'price_ratio'"):
        load_recipe(write_recipe(prompts=prompts, teacher=teacher))
