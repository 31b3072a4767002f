"""The vLLM engine against a small stand-in with vLLM's asynchronous interface; vLLM itself is in test_real_engines."""

import asyncio
import importlib.machinery
import multiprocessing
import signal
import subprocess
import sys
import types
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.config import FormatConfig, Sampling, TeacherConfig, VllmOptions, hashed_fields
from distill.engines import Completion, Request, open_engine, stream
from distill.engines.in_flight import at_most
from distill.engines.vllm import (
    VllmEngine,
    end_with_us,
    own_interrupts,
    preflight,
    read_ends,
    roots,
    start_vllm,
)
from distill.errors import EngineError, MissingExtraError, ModelError
from distill.format import set_template
from distill.models import find_model, load_tokenizer
from distill.records import Message, Prompt
from distill.runs import DigestCache, RunOptions

TinyModel = Callable[[str], Path]
END = 2
"""The tiny tokenizer's <|im_end|>."""


@dataclass
class Llm:
    """vLLM's engine as far as it is used: answers with scripted ids."""

    write: Callable[[Sequence[int], Any], Any] = lambda ids, params: [5, 6, END]
    """Ids written after a prompt, or an exception to raise."""
    finish: str = "stop"
    context: int = 512
    errored: bool = False
    asked: list[tuple[Any, Any, str]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    shut_down: int = 0
    logprobs: Any = None

    @property
    def model_config(self) -> Any:
        return SimpleNamespace(max_model_len=self.context)

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        self.asked.append((prompt, params, request_id))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0.001)
        self.in_flight -= 1
        new = self.write(prompt["prompt_token_ids"], params)
        if isinstance(new, Exception):
            raise new
        output = SimpleNamespace(token_ids=tuple(new), finish_reason=self.finish)
        yield SimpleNamespace(outputs=[output], prompt_logprobs=self.logprobs)

    def shutdown(self) -> None:
        self.shut_down += 1


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module `vllm` for this process; `started` holds the arguments that engines were started with."""
    module: Any = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.__version__ = "1.2.3"
    module.started = []
    module.llm = Llm()
    module.SamplingParams = lambda **given: SimpleNamespace(**given)
    module.AsyncEngineArgs = dict

    def from_engine_args(arguments: dict[str, Any]) -> Any:
        module.started.append(arguments)
        if isinstance(module.llm, Exception):
            raise module.llm
        return module.llm

    module.AsyncLLMEngine = SimpleNamespace(from_engine_args=from_engine_args)
    platforms: Any = types.ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(device_type="cpu")
    params: Any = types.ModuleType("vllm.sampling_params")
    params.RequestOutputKind = SimpleNamespace(FINAL_ONLY="final")
    for name, part in (("vllm", module), ("vllm.platforms", platforms), ("vllm.sampling_params", params)):
        monkeypatch.setitem(sys.modules, name, part)
    return module


@pytest.fixture
def tokenizer(tiny_model: TinyModel) -> Any:
    return load_tokenizer(find_model(str(tiny_model("llama"))))


def engine_of(llm: Any, tokenizer: Any, most: int = 4, **format: Any) -> VllmEngine:
    config = FormatConfig(**format)
    set_template(tokenizer, config)
    return VllmEngine(lambda: llm, tokenizer, config, [END], most)


def request(text: str = "2?", sample: int = 0, seed: int = 0, **sampling: Any) -> Request:
    return Request(Prompt.of([Message(role="user", content=text)]), sample, Sampling(**sampling), seed)


def answers(engine: VllmEngine, requests: list[Request]) -> list[Completion]:
    async def collect() -> list[Completion]:
        found = [completion async for completion in engine.generate(stream(requests))]
        await engine.close()
        return sorted(found, key=lambda completion: [r.key for r in requests].index(completion.key))

    return asyncio.run(collect())


# --- what is sent and what comes back -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "sent"),
    [
        ("keep", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"),
        ("r1", "<|im_start|>Be brief.\n\nUser: 2?\n\nAssistant: <think>\n"),
    ],
)
def test_vllm_gets_the_ids_of_the_recipes_template_and_each_requests_own_seed(
    tokenizer: Any, template: str, sent: str
) -> None:
    llm = Llm()
    asked = request(seed=41, temperature=0.6, top_p=0.9, max_new_tokens=7)._replace(system="Be brief.")
    answers(engine_of(llm, tokenizer, template=template), [asked, asked._replace(sample=1, seed=42)])
    (prompt, params, first_id), (_, other, second_id) = llm.asked
    assert prompt == {"type": "token", "prompt_token_ids": tokenizer(sent)["input_ids"]}
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.6, 0.9, 7, 41)
    assert params.stop_token_ids == [END] and params.detokenize is False and params.output_kind == "final"
    assert other.seed == 42 and first_id != second_id


def test_ids_come_back_as_fields(tokenizer: Any) -> None:
    written = tokenizer("<think>\nAdd.\n</think>\n\n4")["input_ids"]
    [found] = answers(engine_of(Llm(lambda ids, params: [*written, END]), tokenizer), [request()])
    assert (found.reasoning, found.answer, found.think, found.finish_reason) == ("Add.", "4", "closed", "stop")
    assert found.token_ids == (*written, END) and found.usage.output == len(written) + 1
    assert found.usage.input > 0 and found.usage.reasoning == len(tokenizer("Add.")["input_ids"])
    assert found.latency_s > 0 and found.error is None
    [cut] = answers(engine_of(Llm(lambda ids, params: written, "length"), tokenizer), [request()])
    assert cut.finish_reason == "length" and cut.token_ids == tuple(written)


def test_an_answer_never_outgrows_the_context(tokenizer: Any) -> None:
    llm = Llm(context=32)
    found = answers(engine_of(llm, tokenizer), [request(max_new_tokens=100), request("why " * 40)])
    [(prompt, params, _)] = llm.asked
    assert params.max_tokens == 32 - len(prompt["prompt_token_ids"])
    assert found[0].error is None and "fit the model's context of 32" in str(found[1].error)
    assert not found[1].retryable


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_one_failed_request_is_a_record_and_the_others_go_on(tokenizer: Any) -> None:
    def write(ids: Sequence[int], params: Any) -> Any:
        return {1: ValueError("no such parameter"), 2: RuntimeError("odd")}.get(params.seed, [5, END])

    found = answers(engine_of(Llm(write), tokenizer), [request(str(seed), seed=seed) for seed in range(4)])
    assert [completion.error for completion in found] == [
        None,
        "vLLM: ValueError: no such parameter",
        "vLLM: RuntimeError: odd",
        None,
    ]
    assert [completion.retryable for completion in found] == [False, False, True, False]


def test_an_answer_that_vllm_gave_up_is_a_failure_that_may_pass(tokenizer: Any) -> None:
    [found] = answers(engine_of(Llm(finish="abort"), tokenizer), [request()])
    assert found.error == "vLLM ended the answer: abort" and found.retryable


def test_an_engine_that_has_died_stops_the_run(tokenizer: Any) -> None:
    llm = Llm(lambda ids, params: RuntimeError("out of memory"), errored=True)
    with pytest.raises(EngineError, match="RuntimeError: out of memory; its log above says why"):
        answers(engine_of(llm, tokenizer), [request()])


def test_nothing_is_asked_for_before_the_model_is_loaded(tokenizer: Any, tiny_model: TinyModel, fake: Any) -> None:
    fake.llm = ValueError("no memory\nand more")
    pulled = []

    async def requests() -> AsyncIterator[Request]:
        pulled.append(1)
        yield request()

    async def first(engine: Any) -> Any:
        return await anext(engine.generate(requests()))

    teacher = TeacherConfig(engine="vllm", model=str(tiny_model("llama")))
    engine = open_engine(teacher, FormatConfig(), RunOptions())
    with pytest.raises(EngineError, match=r"vLLM cannot start with .*: ValueError: no memory; its log above"):
        asyncio.run(first(engine))
    assert not pulled


# --- requests in flight ---------------------------------------------------------------------------------------------


def test_few_requests_are_in_flight_and_pulled_only_as_there_is_room(tokenizer: Any) -> None:
    llm, pulled = Llm(), 0
    engine = engine_of(llm, tokenizer, most=3)

    async def requests() -> AsyncIterator[Request]:
        nonlocal pulled
        for number in range(20):
            pulled += 1
            yield request(str(number))

    async def collect() -> int:
        done = 0
        async for _ in engine.generate(requests()):
            done += 1
            assert pulled - done <= 3
        return done

    assert asyncio.run(collect()) == 20 and llm.most_in_flight == 3


def test_answers_come_while_the_next_request_waits_for_them() -> None:
    answered: list[int] = []

    async def one_after_the_other() -> AsyncIterator[Request]:
        for number in range(3):
            while len(answered) < number:
                await asyncio.sleep(0.001)
            yield request(str(number), number)

    async def answer(asked: Request) -> Completion:
        return Completion(asked.key)

    async def collect() -> None:
        async for completion in at_most(8, one_after_the_other(), answer):
            answered.append(completion.key[1])

    asyncio.run(asyncio.wait_for(collect(), 10))
    assert answered == [0, 1, 2]


def test_what_stops_one_answer_stops_the_others_and_comes_out() -> None:
    cancelled = []

    async def answer(asked: Request) -> Completion:
        if asked.sample == 1:
            raise EngineError("dead")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(asked.sample)
            raise
        return Completion(asked.key)

    async def collect() -> None:
        async for _ in at_most(2, stream([request(sample=0), request(sample=1)]), answer):
            pass

    with pytest.raises(EngineError, match="dead"):
        asyncio.run(collect())
    assert cancelled == [0]


def test_an_engine_that_is_used_in_another_event_loop_starts_anew(tokenizer: Any) -> None:
    llm = Llm()
    engine = engine_of(llm, tokenizer)

    async def ask() -> int:
        return len([completion async for completion in engine.generate(stream([request()]))])

    assert asyncio.run(ask()) == asyncio.run(ask()) == 1
    assert llm.shut_down == 1
    asyncio.run(engine.close())
    asyncio.run(engine.close())
    assert llm.shut_down == 2


# --- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_arrays_by_place_most_likely_first(tokenizer: Any) -> None:
    def place(**logprobs: float) -> dict[int, Any]:
        return {int(token[1:]): SimpleNamespace(logprob=value) for token, value in logprobs.items()}

    # vLLM puts the token that stands there first, whether or not it is among the most likely
    rows = [None, place(t7=-5.0, t1=-0.1, t2=-2.0), place(t8=-0.2, t3=-3.0), place(t9=-0.5, t4=-0.4)]
    engine = engine_of(Llm(logprobs=rows), tokenizer)

    async def score(*given: Any) -> Any:
        return await engine.score([6, 7, 8, 9], *given)

    found = asyncio.run(score([1, 2, 3], 2))
    assert found.token_logprobs_P.tolist() == pytest.approx([-5.0, -0.2, -0.5])
    assert found.top_ids_PK.tolist() == [[1, 2], [8, 3], [4, 9]]
    assert found.top_logprobs_PK == pytest.approx(np.array([[-0.1, -2.0], [-0.2, -3.0], [-0.4, -0.5]]))
    assert found.top_ids_PK.dtype == np.int32 and found.top_logprobs_PK.dtype == np.float32
    assert asyncio.run(score([2], 2)).top_ids_PK.shape == (1, 2)
    assert asyncio.run(score([], 2)).top_ids_PK.shape == (0, 2)
    for positions, top_k in (([0], 1), ([4], 1), ([1], 0), ([1], 1025)):
        with pytest.raises(ValueError, match="positions are 1 to 3 and top_k 1 to 1024"):
            asyncio.run(score(positions, top_k))


# --- the recipe -----------------------------------------------------------------------------------------------------


def test_options_reach_vllm_by_its_own_names(tiny_model: TinyModel, fake: Any) -> None:
    options = VllmOptions(tensor_parallel_size=2, data_parallel_size=3, quantization="fp8", max_model_len=99)
    start_vllm(find_model(str(tiny_model("llama"))), options)
    start_vllm(find_model("some/model", "v2"), VllmOptions(kv_cache_gb=1.5))
    local, hub = fake.started
    assert local["model"] == str(tiny_model("llama")) and local["revision"] is None
    assert (hub["model"], hub["revision"]) == ("some/model", "v2")
    assert {name: local[name] for name in ("tensor_parallel_size", "data_parallel_size", "max_model_len")} == {
        "tensor_parallel_size": 2,
        "data_parallel_size": 3,
        "max_model_len": 99,
    }
    assert local["quantization"] == "fp8" and local["skip_tokenizer_init"] is True
    assert "kv_cache_memory_bytes" not in local and hub["kv_cache_memory_bytes"] == 1_500_000_000
    assert local["enable_chunked_prefill"] is False, "on a processor"
    sys.modules["vllm.platforms"].current_platform.device_type = "cuda"
    start_vllm(find_model("some/model"), VllmOptions())
    assert "enable_chunked_prefill" not in fake.started[-1]


def test_only_what_changes_text_is_part_of_the_identity() -> None:
    def identity(**options: Any) -> Any:
        return hashed_fields(TeacherConfig(engine="vllm", model="m", vllm=VllmOptions(**options)))

    plain = identity()
    speed = {"tensor_parallel_size": 8, "pipeline_parallel_size": 2, "data_parallel_size": 2, "max_num_seqs": 9}
    memory = {"gpu_memory_utilization": 0.5, "kv_cache_gb": 2, "enforce_eager": True, "enable_prefix_caching": False}
    assert identity(**speed, **memory) == plain
    for text in ({"dtype": "float16"}, {"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}, {"max_model_len": 99}):
        assert identity(**text) != plain
    assert "vllm" not in plain


def test_the_teacher_is_opened_with_room_for_each_copy_and_known_by_its_content(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model("qwen2")
    options = VllmOptions(max_num_seqs=5, data_parallel_size=2)
    teacher = TeacherConfig(engine="vllm", model=str(folder), vllm=options)
    engine: Any = open_engine(teacher, FormatConfig(), RunOptions())
    assert (engine.name, engine.version, engine.batch_size, engine.most) == ("vllm", "1.2.3", None, 10)
    assert engine.ends == [END] == read_ends(find_model(str(folder)))
    [found] = answers(engine, [request()])
    assert found.error is None
    cache = DigestCache(tmp_path / "digests.json")
    assert roots(teacher, cache) == {"model": cache.of(folder)}


def test_what_vllm_cannot_do_is_refused_before_anything_is_loaded(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF....")
    with pytest.raises(ModelError, match="not GGUF files"):
        preflight(TeacherConfig(engine="vllm", model=str(gguf)), FormatConfig(), RunOptions())
    teacher = TeacherConfig(engine="vllm", model=str(tiny_model("llama")))
    with pytest.raises(EngineError, match="--device cuda: the vLLM that is installed runs on 'cpu'"):
        open_engine(teacher, FormatConfig(), RunOptions(device="cuda"))
    with pytest.raises(ValueError, match="engine: vllm takes a model"):
        TeacherConfig(engine="vllm")
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "vllm")
    with pytest.raises(MissingExtraError, match=r"vllm is not installed; add it with: pip install 'distill\[vllm\]'"):
        preflight(teacher, FormatConfig(), RunOptions())


def blocks_ctrl_c() -> bool:
    """Whether this process would not be told of Ctrl-C."""
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_ctrl_c_does_not_reach_what_is_started_inside() -> None:
    def ask() -> bool:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(blocks_ctrl_c)

    with own_interrupts():
        assert ask()
    assert not ask() and not blocks_ctrl_c()


def test_what_was_started_ends_with_the_process_that_is_killed() -> None:
    held = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ours = f"""if 1:
        import time, types
        from distill.engines.vllm import end_with_us
        watcher = end_with_us([types.SimpleNamespace(pid={held.pid})])
        print("watched", flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", ours], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "watched\n"
        assert held.poll() is None
        process.kill()
    assert held.wait(30) == -signal.SIGTERM
    assert end_with_us([]) is None
