"""The runtime: many texts at once, each with its own settings, and each what it would be alone."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.errors import EngineError
from distill.export.manifest import Draft, ModelOrigin, Origins, write_manifest
from distill.export.runtime import Delta, Request, Runtime
from distill.format import R1_TEMPLATE
from distill.onnx_batching import SHARED_LEAST, Batch, Cache, Row, common_start
from distill.onnx_decoding import OnnxDecoder, read_shape

NEW = 24
ASKED = [{"role": "user", "content": "Hi"}]


def some_ids(length: int, seed: int = 0) -> list[int]:
    return [int(one) for one in np.random.default_rng([seed, length]).integers(3, 512, length)]


PROMPTS = [some_ids(length) for length in (5, 300, 17, 1, 44, 257, 9)]


@pytest.fixture(scope="module")
def artifact(exported: Callable[..., Path]) -> Path:
    return exported()


@pytest.fixture(scope="module")
def decoder(artifact: Path) -> OnnxDecoder:
    return OnnxDecoder(artifact, threads=1)


@pytest.fixture(scope="module")
def runtime(artifact: Path) -> Iterator[Runtime]:
    with Runtime(artifact, threads=1, max_rows=4) as one:
        yield one


def shown(runtime: Runtime, ids: list[int]) -> str:
    """What is shown of an answer's tokens: no white space at its start, no half character at its end."""
    return runtime.chat.decode(ids).lstrip().rstrip("\ufffd")


def until(condition: Callable[[], bool]) -> None:
    patience = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < patience, "it never came true"
        time.sleep(0.002)


# --- the batch --------------------------------------------------------------------------------------------------------


def rows_of(prompts: list[list[int]], limit: int = NEW) -> list[Row]:
    return [Row(ids, limit, np.random.default_rng(0), frozenset(), index=place) for place, ids in enumerate(prompts)]


def run_out(batch: Batch, prefill_tokens: int | None = None) -> None:
    while batch.busy:
        for _ in batch.step(prefill_tokens):
            pass


@pytest.mark.parametrize("prefill_tokens", [None, 1, 7, 128])
def test_texts_are_the_same_however_their_prompts_are_cut_and_wherever_their_rows_move(
    decoder: OnnxDecoder, prefill_tokens: int | None
) -> None:
    expected = [decoder.generate([prompt], NEW, eos_ids=[])[0] for prompt in PROMPTS]
    rows = rows_of(PROMPTS)
    for row in rows:
        row.limit = 3 + 5 * row.index % NEW
    batch = decoder.open_batch(3, 330, kept=0)
    batch.waiting.extend(rows)
    run_out(batch, prefill_tokens)
    assert [row.tokens for row in rows] == [text[: row.limit] for text, row in zip(expected, rows)]


def test_a_row_leaves_at_any_time_and_the_others_do_not_notice(decoder: OnnxDecoder) -> None:
    expected = [decoder.generate([prompt], NEW, eos_ids=[])[0] for prompt in PROMPTS]
    for leaver in range(4):
        rows = rows_of(PROMPTS)
        batch = decoder.open_batch(3, 330, kept=0)
        batch.waiting.extend(rows)
        for _ in range(6):
            list(batch.step(50))
        assert rows[1] in batch.rows and not rows[1].tokens and rows[3] in batch.waiting, "each kind is among them"
        batch.remove(rows[leaver])
        batch.remove(rows[leaver])
        run_out(batch, 50)
        stayed = [row for row in rows if row is not rows[leaver]]
        assert [row.tokens for row in stayed] == [expected[row.index] for row in stayed]


def test_a_long_prompt_does_not_stop_the_others(decoder: OnnxDecoder) -> None:
    short, long = rows_of([PROMPTS[0], some_ids(300)], limit=60)
    batch = decoder.open_batch(2, 400, kept=0)
    batch.waiting.append(short)
    list(batch.step(32))
    batch.waiting.append(long)
    before = len(short.tokens)
    while not long.tokens:
        list(batch.step(32))
    assert len(short.tokens) - before == 10, "ten pieces of 32 tokens, and a token of the other after each"


def test_prompts_are_taken_in_the_order_they_came(decoder: OnnxDecoder) -> None:
    rows = rows_of(PROMPTS)
    batch = decoder.open_batch(2, 330, kept=0)
    batch.waiting.extend(rows)
    begun: list[int] = []
    while batch.busy:
        begun += [row.index for row in batch.step(64) if len(row.tokens) == 1]
    assert begun == list(range(len(PROMPTS)))


def test_a_shared_start_is_copied_and_changes_no_text(decoder: OnnxDecoder) -> None:
    start = some_ids(40)
    prompts = [start + some_ids(length, 1) for length in (3, 9, 5)] + [start, [*start[:SHARED_LEAST], 5]]
    expected = [decoder.generate([prompt], NEW, eos_ids=[])[0] for prompt in prompts]
    batch = decoder.open_batch(2, 100, kept=2)
    rows = rows_of(prompts)
    batch.waiting.extend(rows)
    run_out(batch, 64)
    assert [row.tokens for row in rows] == expected
    assert [row.shared for row in rows] == [0, 40, 40, 39, SHARED_LEAST]


def test_the_next_turn_of_a_chat_only_runs_what_is_new(decoder: OnnxDecoder) -> None:
    batch = decoder.open_batch(1, 300, kept=1)
    (first,) = rows_of([some_ids(100)])
    batch.waiting.append(first)
    run_out(batch, 64)
    (second,) = rows_of([[*first.prompt, *first.tokens, *some_ids(10, 3)]])
    batch.waiting.append(second)
    run_out(batch, 64)
    assert second.shared == 100 + NEW - 1, "all but the last token, which nothing ran"
    assert second.tokens == decoder.generate([second.prompt], NEW, eos_ids=[])[0]
    assert len(batch.kept) == 1, "a text replaces its own beginning"


def test_kept_texts_make_room_and_what_is_reserved_is_bounded(decoder: OnnxDecoder) -> None:
    cache = Cache(decoder.shape, 5, 100, decoder.dtype)
    batch = Batch(decoder._forward, cache, places=4, tokens=150)
    rows = rows_of([some_ids(40, seed) for seed in range(6)], limit=20)
    batch.waiting.extend(rows)
    most = 0
    while batch.busy:
        list(batch.step())
        held = sum(row.reserved for row in batch.rows) + sum(len(text.ids) for text in batch.kept)
        most = max(most, held)
    assert 120 <= most <= 150 and all(len(row.tokens) == 20 for row in rows)


def test_a_text_larger_than_the_budget_runs_alone(decoder: OnnxDecoder) -> None:
    batch = Batch(decoder._forward, Cache(decoder.shape, 2, 100, decoder.dtype), places=2, tokens=10)
    batch.waiting.extend(rows_of([some_ids(40), some_ids(41)], limit=5))
    list(batch.step())
    assert len(batch.rows) == 1 and len(batch.waiting) == 1
    run_out(batch)


def test_released_rows_give_their_memory_back(decoder: OnnxDecoder) -> None:
    def held() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    cache = Cache(read_shape(decoder.graph.root), rows=8, capacity=32_768)
    size = sum(array.nbytes for array in cache.arrays.values())
    before = held()
    assert size > 60e6 and before + size / 2 > held(), "what nobody wrote is not there"
    for array in cache.arrays.values():
        array[:] = 1
    assert held() - before > 0.9 * size
    for row in (0, 1, 2, 3, 5, 6, 7):
        cache.release(row)
    assert held() - before < 0.3 * size
    assert all((array[4] == 1).all() for array in cache.arrays.values()), "only theirs"


def test_the_common_start_of_two_texts() -> None:
    assert [common_start([1, 2, 3], other) for other in ([], [1], [1, 2, 3, 4], [1, 5, 3], [0])] == [0, 1, 3, 1, 0]


# --- requests ---------------------------------------------------------------------------------------------------------


def test_requests_with_settings_of_their_own_are_answered_as_each_would_be_alone(runtime: Runtime) -> None:
    requests = [
        Request(ids, 10 + place, temperature=0.5 * (place % 3), top_p=1 - 0.1 * (place % 2), seed=place)
        for place, ids in enumerate(PROMPTS)
    ]
    alone = [runtime.generate([request])[0] for request in requests]
    together = runtime.generate(requests)
    assert [one.ids for one in together] == [one.ids for one in alone]
    assert [one.content for one in together] == [one.content for one in alone]
    assert len({tuple(one.ids) for one in together}) == len(PROMPTS)


def test_a_stream_is_the_same_text_in_parts(runtime: Runtime, decoder: OnnxDecoder) -> None:
    request = Request(PROMPTS[4], NEW, ignore_end=True)
    parts = list(runtime.stream(request))
    ids = decoder.generate([PROMPTS[4]], NEW, eos_ids=[])[0]
    assert "".join(part.content for part in parts) == shown(runtime, ids)
    assert [bool(part.finish) for part in parts] == [False] * (len(parts) - 1) + [True]
    last = parts[-1]
    assert last.finish == "length" and last.usage and last.usage[:2] == (44, NEW)


def test_an_end_token_stops_and_is_counted_but_not_shown(altered: Callable[..., Path], decoder: OnnxDecoder) -> None:
    free = decoder.generate([PROMPTS[2]], NEW, eos_ids=[])[0]
    with Runtime(altered(end_ids=[free[5]]), threads=1) as one:
        (answer,) = one.generate([Request(PROMPTS[2], NEW)])
        end = free.index(free[5])
        assert answer.finish == "stop" and answer.ids == free[: end + 1]
        assert answer.content == shown(one, free[:end]) and answer.usage.completion == end + 1


def test_a_stop_sequence_over_a_token_border_ends_the_text_before_it(runtime: Runtime) -> None:
    whole = runtime.generate([Request(PROMPTS[0], NEW, ignore_end=True)])[0].content
    for start in (3, 7, 11):
        stop = whole[start : start + 4]
        (answer,) = runtime.generate([Request(PROMPTS[0], NEW, stop=("never there", stop), ignore_end=True)])
        assert answer.finish == "stop" and answer.content == whole[: whole.index(stop)]
        assert answer.usage.completion < NEW


def test_a_reasoning_budget_closes_the_reasoning_and_the_answer_goes_on(runtime: Runtime) -> None:
    closing = runtime.chat.encode("\n</think>\n\n")
    request = Request(PROMPTS[2], 40, think_budget=10, opened=True, ignore_end=True)
    (answer,) = runtime.generate([request])
    assert answer.ids[10 : 10 + len(closing)] == closing
    assert answer.reasoning and answer.content and "think>" not in answer.reasoning + answer.content
    marker = runtime.chat.encode("\n</think>")
    assert answer.usage.completion == 40 and answer.usage.reasoning == 10 + len(marker), "white space behind is neither"
    free = runtime.generate([Request(PROMPTS[2], 40, opened=True, ignore_end=True)])[0]
    assert free.ids[:10] == answer.ids[:10] and free.reasoning.startswith(answer.reasoning) and free.content == ""
    assert free.usage.reasoning == 40


def test_a_budget_of_nothing_answers_at_once_and_one_that_is_not_reached_changes_nothing(runtime: Runtime) -> None:
    none, large = runtime.generate(
        [Request(PROMPTS[2], 40, think_budget=budget, opened=True, ignore_end=True) for budget in (0, 50)]
    )
    closing = runtime.chat.encode("\n</think>\n\n")
    assert none.ids[1 : 1 + len(closing)] == closing and none.usage.reasoning <= 1 + len(closing)
    assert large == runtime.generate([Request(PROMPTS[2], 40, opened=True, ignore_end=True)])[0]._replace(
        usage=large.usage
    )


def test_a_prompt_says_whether_it_ends_inside_the_reasoning(runtime: Runtime, altered: Callable[..., Path]) -> None:
    assert runtime.prompt(ASKED)[1] is False
    with Runtime(altered(template=R1_TEMPLATE), threads=1) as one:
        ids, opened = one.prompt(ASKED)
        assert opened and one.chat.decode(ids).endswith("Assistant: <think>\n")


def test_an_artifact_brings_its_markers_and_system_prompt(altered: Callable[..., Path]) -> None:
    folder = altered()
    trained = {"system": "Be short.", "open_marker": "[[", "close_marker": "]]"}
    origin = ModelOrigin(id="x")
    write_manifest(
        folder,
        Draft(
            name="tiny",
            variants=("fp32",),
            default="fp32",
            origins=Origins(student=origin),
            options={"format": trained},
        ),
    )
    with Runtime(folder, threads=1) as one:
        assert one.name == "tiny" and one.format.close_marker == "]]"
        own = [{"role": "system", "content": "Be long."}, *ASKED]
        texts = [one.chat._tokenizer.decode(one.prompt(chat)[0], skip_special_tokens=False) for chat in (ASKED, own)]
        assert "Be short." in texts[0] and "Be short." not in texts[1] and "Be long." in texts[1]
        request = Request(PROMPTS[2], 20, think_budget=3, opened=True, ignore_end=True)
        closing = one.chat.encode("\n]]\n\n")
        assert one.generate([request])[0].ids[3 : 3 + len(closing)] == closing


def test_a_cancelled_request_frees_its_row_at_once(runtime: Runtime) -> None:
    got: list[Delta] = []
    ticket = runtime.submit(Request(PROMPTS[0], 500, ignore_end=True), got.append)
    until(lambda: len(got) > 3)
    runtime.cancel(ticket)
    until(lambda: ticket.ended)
    assert got[-1].finish == "cancelled" and runtime.running == 0
    count = len(got)
    runtime.generate([Request(PROMPTS[0], 3)])
    assert len(got) == count, "nothing more comes of it"
    runtime.cancel(ticket)


def test_leaving_a_stream_cancels_it(runtime: Runtime) -> None:
    for _ in runtime.stream(Request(PROMPTS[0], 500, ignore_end=True)):
        break
    until(lambda: runtime.running == 0)


def test_closing_ends_what_runs_and_takes_nothing_new(artifact: Path) -> None:
    one = Runtime(artifact, threads=1, max_rows=1)
    got: list[list[Delta]] = [[], []]
    for place in range(2):
        one.submit(Request(PROMPTS[0], 500, ignore_end=True), got[place].append)
    until(lambda: bool(got[0]))
    one.close()
    assert [parts[-1].finish for parts in got] == ["cancelled", "cancelled"]
    with pytest.raises(EngineError, match="closed"):
        one.submit(Request(PROMPTS[0], 5), got[0].append)


def test_a_failing_step_fails_its_requests_and_no_later_ones(artifact: Path) -> None:
    with Runtime(artifact, threads=1) as one:
        with pytest.raises(EngineError, match="could not answer"):
            one.generate([Request([5, 100_000], 5), Request(PROMPTS[0], 400, ignore_end=True)])
        assert one.generate([Request(PROMPTS[0], 5, ignore_end=True)])[0].usage.completion == 5


@pytest.mark.parametrize(("length", "count"), [(0, 5), (512, 5), (3, 0)])
def test_a_request_that_cannot_be_answered_is_refused(runtime: Runtime, length: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"a prompt of {length} tokens and max_new_tokens {count}"):
        runtime.submit(Request([5] * length, count), lambda part: None)


def test_neither_torch_nor_transformers_is_needed_to_serve(artifact: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "import distill.export.serve, distill.export.chat\n"
        "from distill.export.runtime import Request, Runtime\n"
        f"with Runtime(Path({str(artifact)!r}), threads=1) as one:\n"
        "    ids, _ = one.prompt([{'role': 'user', 'content': 'Hi'}])\n"
        "    print(one.generate([Request(ids, 5, ignore_end=True)])[0].usage.completion)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "5", done.stderr


# --- distill bench -----------------------------------------------------------------------------------


def test_bench_measures_in_a_process_of_its_own(artifact: Path, cli: Callable[..., Any]) -> None:
    said = cli("bench", artifact, "--threads", 1, "--rounds", 1, "--json", "--quiet")
    assert said.code == 0, said.err
    found = said.json
    assert set(found["ttft_s"]) == {"128"}, "1,024 tokens do not fit this model's context"
    assert set(found["tokens_per_s"]) == {"1", "8", "16", "32"}
    assert all(rate["low"] <= rate["median"] <= rate["high"] for rate in found["tokens_per_s"].values())
    assert found["threads"] == 1 and found["versions"]["onnxruntime"] and found["machine"]["processor"]
    assert 20e6 < found["peak_memory_bytes"] < 2e9


def test_bench_says_why_it_cannot(tmp_path: Path, cli: Callable[..., Any]) -> None:
    said = cli("bench", tmp_path, "--quiet")
    assert said.code == 2 and "genai_config.json" in said.error_line
