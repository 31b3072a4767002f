"""Local generation: a batch writes what each prompt would get alone, and stops where the model's ends say."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import FormatConfig, Sampling, TeacherConfig
from distill.engines import Completion, Request, open_engine, stream
from distill.engines.continuous import ContinuousEngine
from distill.engines.transformers import (
    TransformersEngine,
    batch_seed,
    completion_of,
    cut_after_end,
    end_ids,
    generate_ids,
    roots,
)
from distill.errors import EngineError
from distill.format import set_template
from distill.models import find_model, load_model, load_tokenizer
from distill.records import Message, Prompt
from distill.runs import DigestCache, RunOptions

TinyModel = Callable[[str], Path]
QUESTIONS = [
    "2?",
    "What is 12 + 30?",
    "State the final answer to the following arithmetic problem: 7 + 8 =",
    "Why?",
    "40 + 2",
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def lively(tiny_model: TinyModel) -> Callable[..., Any]:
    """A function that loads a tiny model whose weights are so large that its texts vary."""

    def load(family: str = "llama", dtype: str = "float32") -> Any:
        model = load_model(find_model(str(tiny_model(family))))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
        return model

    return load


@pytest.fixture
def tokenizer(tiny_model: TinyModel) -> Any:
    return load_tokenizer(find_model(str(tiny_model("llama"))))


@pytest.fixture
def prompts(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(question)["input_ids"] for question in QUESTIONS]


def greedy(model: Any, prompt: list[int], most: int) -> list[int]:
    """Greedy decoding from the definition: the whole text through the model for every token, no cache, no padding."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(most):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in end_ids(model):
                break
    return ids[len(prompt) :]


# --- ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_padded_batch_writes_what_each_prompt_gets_alone(
    lively: Callable[..., Any], prompts: list[list[int]], family: str
) -> None:
    model = lively(family)
    expected = [greedy(model, prompt, 24) for prompt in prompts]
    assert len({tuple(text) for text in expected}) == len(prompts) and len({len(p) for p in prompts}) > 3
    assert generate_ids(model, prompts, 24) == expected
    assert [generate_ids(model, [prompt], 24)[0] for prompt in prompts] == expected
    # a pad id that occurs in prompts changes nothing: what is padding goes by position
    assert generate_ids(model, prompts, 24, pad_id=prompts[1][0]) == expected


def test_a_text_ends_at_any_of_the_models_ends(lively: Callable[..., Any], prompts: list[list[int]]) -> None:
    model = lively()
    full = generate_ids(model, prompts, 24)
    ends = [full[0][5], full[1][9]]
    for given in (ends, ends[0]):
        model.generation_config.eos_token_id = given
        stops = [given] if isinstance(given, int) else given
        for text, cut in zip(full, generate_ids(model, prompts, 24), strict=True):
            first = next((place for place, token in enumerate(text) if token in stops), 23)
            assert cut == text[: first + 1]


def test_ends_come_from_generation_config_and_else_from_the_configuration(lively: Callable[..., Any]) -> None:
    model = lively()
    for generation, config, expected in ((5, 6, [5]), ([5, 7], 6, [5, 7]), (None, 6, [6]), (None, [6, 7], [6, 7])):
        model.generation_config.eos_token_id, model.config.eos_token_id = generation, config
        assert end_ids(model) == expected
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert end_ids(model) == []
    assert len(generate_ids(model, [[3, 4]], 7)[0]) == 7, "a model without ends writes to the limit"
    assert cut_after_end([4, 5, 6], {5, 6}) == [4, 5] and cut_after_end([4], ()) == [4]


def test_what_the_models_generation_config_recommends_does_not_count(
    lively: Callable[..., Any], prompts: list[list[int]]
) -> None:
    """Greedy is greedy: a penalty that transformers would take from the checkpoint is in no exported variant."""
    model = lively()
    expected = generate_ids(model, prompts, 24)
    advice = model.generation_config
    advice.repetition_penalty, advice.no_repeat_ngram_size, advice.suppress_tokens = 3.0, 2, [expected[0][0]]
    assert generate_ids(model, prompts, 24) == expected
    assert model.generation_config is advice, "and it is left as it was"


def test_samples_follow_their_seed_and_leave_the_random_state_alone(
    lively: Callable[..., Any], prompts: list[list[int]]
) -> None:
    model = lively()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = generate_ids(model, prompts, 16, temperature=1.5, top_p=0.95, seed=4)
    torch.manual_seed(99)
    assert generate_ids(model, prompts, 16, temperature=1.5, top_p=0.95, seed=4) == one
    assert generate_ids(model, prompts, 16, temperature=1.5, top_p=0.95, seed=5) != one
    torch.manual_seed(1)
    generate_ids(model, prompts, 4, temperature=1.5, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_samples_have_the_models_probabilities(lively: Callable[..., Any]) -> None:
    model = lively()
    prompt = [3, 4, 5]
    with torch.inference_mode():
        expected = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / 2.0, -1)
    drawn = [ids[0] for ids in generate_ids(model, [prompt] * 4000, 1, temperature=2.0, seed=0)]
    counts = torch.bincount(torch.tensor(drawn), minlength=512).double()
    likely = expected * 4000 >= 5
    z = (counts - 4000 * expected)[likely] / (4000 * expected * (1 - expected))[likely].sqrt()
    assert int(likely.sum()) > 20 and float(z.abs().max()) < 5
    # top_p: only the fewest tokens that reach it together
    nucleus = [ids[0] for ids in generate_ids(model, [prompt] * 2000, 1, temperature=2.0, top_p=0.3, seed=0)]
    ranked = expected.sort(descending=True)
    allowed = ranked.indices[: int((ranked.values.cumsum(0) < 0.3).sum()) + 1].tolist()
    assert set(nucleus) <= set(allowed) and len(set(nucleus)) > 1


def test_a_text_ends_where_the_context_does(lively: Callable[..., Any]) -> None:
    model = lively()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.config.max_position_embeddings = 20
    written = generate_ids(model, [[3] * 18, [3, 4, 5], [6] * 10], 100)
    assert [len(ids) for ids in written] == [2, 17, 10]
    assert written[1] == greedy(model, [3, 4, 5], 17)


def test_a_prompt_without_room_for_an_answer_is_refused(lively: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="the prompt has 512 tokens; between 1 and 511 fit"):
        generate_ids(lively(), [[3], [3] * 512], 4)
    with pytest.raises(ValueError, match="the prompt has 0 tokens"):
        generate_ids(lively(), [[]], 4)
    assert generate_ids(lively(), [], 4) == []


# --- completions ----------------------------------------------------------------------------------------------------


def request(text: str = "2?", sample: int = 0, seed: int = 0, **sampling: Any) -> Request:
    return Request(Prompt.of([Message(role="user", content=text)]), sample, Sampling(**sampling), seed)


def complete(
    tokenizer: Any, text: str, last: list[int], most: int, ends: list[int] | None, opened: bool = False
) -> Completion:
    ids = tokenizer(text)["input_ids"] + last
    prompt = "Assistant: <think>\n" if opened else "Assistant: "
    return completion_of(tokenizer, FormatConfig(), request(max_new_tokens=most), prompt, 5, ids, 0.5, ends)


def test_ids_are_parsed_into_fields_without_the_end(tokenizer: Any) -> None:
    text = "<think>\nAdd.\n</think>\n\n4"
    found = complete(tokenizer, text, [2], 100, [2])
    assert (found.reasoning, found.answer, found.raw, found.think) == ("Add.", "4", text, "closed")
    assert found.finish_reason == "stop" and found.token_ids == (*tokenizer(text)["input_ids"], 2)
    assert found.usage.input == 5 and found.usage.output == len(found.token_ids)
    assert found.usage.reasoning == len(tokenizer("Add.")["input_ids"])
    opened = complete(tokenizer, "Add.\n</think>\n\n4", [2], 100, [2], opened=True)
    assert (opened.reasoning, opened.answer, opened.think) == ("Add.", "4", "closed")
    assert complete(tokenizer, "Add", [2], 100, [2], opened=True).think == "unclosed"


def test_only_an_end_of_the_model_is_a_stop(tokenizer: Any) -> None:
    length = len(tokenizer("abc")["input_ids"]) + 1
    assert complete(tokenizer, "abc", [2], length, [2]).finish_reason == "stop", "at the limit, but by itself"
    assert complete(tokenizer, "abc", [0], length, [2, 0]).finish_reason == "stop", "any of several ends"
    # a special token that is no end, last at the limit: the text was cut, and the token is part of it
    cut = complete(tokenizer, "abc", [1], length, [2])
    assert cut.finish_reason == "length" and cut.raw == "abc<|im_start|>"
    assert complete(tokenizer, "abc", [], 100, [2]).finish_reason == "length", "cut by the context"
    assert complete(tokenizer, "abc", [2], 100, None).finish_reason == "stop", "the tokenizer's end where none is given"
    assert complete(tokenizer, "", [], 100, [2]).finish_reason == "length"


# --- the engine -----------------------------------------------------------------------------------------------------


def engine_of(model: Any, tokenizer: Any, batch_size: int = 2, **format: Any) -> TransformersEngine:
    config = FormatConfig(**format)
    set_template(tokenizer, config)
    return TransformersEngine(model, tokenizer, config, batch_size)


def answers(engine: Any, requests: list[Request]) -> list[Completion]:
    pulled: Iterator[Request] = iter(requests)

    async def collect() -> list[Completion]:
        found = [completion async for completion in engine.generate(stream(pulled))]
        await engine.close()
        return found

    return asyncio.run(collect())


@pytest.mark.parametrize("template", ["keep", "r1"])
def test_the_engine_answers_in_order_with_the_recipes_template(
    lively: Callable[..., Any], tokenizer: Any, template: str
) -> None:
    model = lively()
    requests = [request(question, max_new_tokens=16) for question in QUESTIONS]
    found = answers(engine_of(model, tokenizer, template=template), requests)
    assert [answer.key for answer in found] == [r.key for r in requests]
    for question, answer in zip(QUESTIONS, found, strict=True):
        sent = {
            "keep": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
            "r1": f"<|im_start|>User: {question}\n\nAssistant: <think>\n",
        }[template]
        ids = tokenizer(sent)["input_ids"]
        assert answer.usage.input == len(ids)
        assert list(answer.token_ids or ()) == greedy(model, ids, 16)
        assert answer.latency_s > 0 and answer.error is None
        assert (answer.think == "absent") is (template == "keep")


def test_a_system_prompt_of_the_request_is_sent(lively: Callable[..., Any], tokenizer: Any) -> None:
    [plain, told] = answers(
        engine_of(lively(), tokenizer),
        [request(max_new_tokens=4), request(max_new_tokens=4)._replace(system="Be brief.")],
    )
    extra = len(tokenizer("<|im_start|>system\nBe brief.<|im_end|>\n")["input_ids"])
    assert told.usage.input == plain.usage.input + extra


def test_a_prompt_that_does_not_fit_is_a_failed_answer_and_its_batch_goes_on(
    lively: Callable[..., Any], tokenizer: Any
) -> None:
    long = request("why " * 600, max_new_tokens=4)
    found = answers(engine_of(lively(), tokenizer), [request("2?", max_new_tokens=4), long, long])
    assert found[0].error is None and found[0].usage.output == 4
    assert all("fit the model's context of 512" in str(answer.error) for answer in found[1:])


def test_samples_of_a_prompt_differ_and_repeat(lively: Callable[..., Any], tokenizer: Any) -> None:
    def draw() -> list[tuple[int, ...] | None]:
        drawn = [request(sample=n, seed=n, temperature=1.0, max_new_tokens=12) for n in range(4)]
        return [answer.token_ids for answer in answers(engine_of(lively(), tokenizer), drawn)]

    assert draw() == draw() and len(set(draw())) == 4


def test_a_batch_is_seeded_by_its_requests() -> None:
    one, two = request(seed=1), request(seed=2)
    assert batch_seed([one, two]) == batch_seed([one, two]) != batch_seed([two, one])


def test_the_teacher_is_loaded_in_bf16_and_known_by_its_content(tiny_model: TinyModel, tmp_path: Path) -> None:
    teacher = TeacherConfig(engine="transformers", model=str(tiny_model("qwen2")), batch_size=3)
    engine: Any = open_engine(teacher, FormatConfig(), RunOptions(device="cpu", threads=1))
    assert engine.model.dtype == torch.bfloat16 and engine.batch_size == 3
    assert len(answers(engine, [request(max_new_tokens=2)])) == 1
    assert engine.model is None, "closed"
    cache = DigestCache(tmp_path / "digests.json")
    assert roots(teacher, cache) == {"model": cache.of(tiny_model("qwen2"))}


# --- continuous batching --------------------------------------------------------------------------------------------


def continuous(model: Any, tokenizer: Any, texts: int = 2, **format: Any) -> ContinuousEngine:
    config = FormatConfig(**format)
    set_template(tokenizer, config)
    return ContinuousEngine(model, tokenizer, config, texts)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_texts_that_come_and_go_get_what_each_gets_alone(
    lively: Callable[..., Any], tokenizer: Any, family: str
) -> None:
    model = lively(family)
    requests = [request(question, max_new_tokens=30 - 5 * n) for n, question in enumerate(QUESTIONS)]
    ids = [tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"] for text in QUESTIONS]
    # an end that comes early in some of the texts only
    model.generation_config.eos_token_id = [greedy(model, ids[0], 30)[9], greedy(model, ids[3], 15)[4]]
    expected = {r.key: greedy(model, prompt, r.sampling.max_new_tokens) for r, prompt in zip(requests, ids)}
    assert len({len(text) for text in expected.values()}) > 2
    settings = model.generation_config
    found = answers(continuous(model, tokenizer), requests)
    assert {answer.key: list(answer.token_ids or ()) for answer in found} == expected
    for answer in found:
        stopped = expected[answer.key][-1] in settings.eos_token_id
        assert answer.finish_reason == ("stop" if stopped else "length") and answer.error is None
        assert answer.usage.input > 0 and answer.latency_s > 0
    assert model.generation_config is settings, "the model's own settings are back"
    assert generate_ids(model, ids[:2], 10) == [greedy(model, prompt, 10) for prompt in ids[:2]], (
        "and so is its attention"
    )


def test_continuous_texts_end_where_the_context_does_and_what_does_not_fit_fails(
    lively: Callable[..., Any], tokenizer: Any
) -> None:
    model = lively()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    found = {
        answer.key: answer
        for answer in answers(
            continuous(model, tokenizer), [request("2?", max_new_tokens=2000), request("why " * 600), request("Why?")]
        )
    }
    short, long = found[request("2?").key], found[request("why " * 600).key]
    assert short.usage.input + short.usage.output == 512 and short.finish_reason == "length"
    assert "fit the model's context of 512" in str(long.error)
    assert len(found) == 3


def test_continuous_draws_follow_temperature_and_top_p(lively: Callable[..., Any], tokenizer: Any) -> None:
    model, prompt = lively(), "State"
    ids = tokenizer(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    with torch.inference_mode():
        expected = torch.softmax(model(torch.tensor([ids])).logits[0, -1].double() / 2.0, -1)

    def draw(count: int, **sampling: Any) -> list[int]:
        asked = [request(prompt, sample=n, max_new_tokens=1, temperature=2.0, **sampling) for n in range(count)]
        return [(answer.token_ids or ())[0] for answer in answers(continuous(model, tokenizer, 64), asked)]

    counts = torch.bincount(torch.tensor(draw(1500)), minlength=512).double()
    likely = expected * 1500 >= 5
    z = (counts - 1500 * expected)[likely] / (1500 * expected * (1 - expected))[likely].sqrt()
    assert int(likely.sum()) > 10 and float(z.abs().max()) < 5
    ranked = expected.sort(descending=True)
    allowed = ranked.indices[: int((ranked.values.cumsum(0) < 0.3).sum()) + 1].tolist()
    nucleus = set(draw(300, top_p=0.3))
    assert nucleus <= set(allowed) and len(nucleus) > 1


def test_a_scheduler_that_dies_stops_the_run(lively: Callable[..., Any], tokenizer: Any) -> None:
    class Broken(torch.nn.Module):
        def forward(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("out of memory")

    model = lively()
    model.model.layers[0] = Broken()
    with pytest.raises(EngineError, match="scheduler has stopped"):
        answers(continuous(model, tokenizer), [request(str(number), max_new_tokens=3) for number in range(5)])


def test_continuous_batching_is_chosen_in_the_recipe(tiny_model: TinyModel) -> None:
    teacher = TeacherConfig(engine="transformers", model=str(tiny_model("llama")), continuous_batching=True)
    engine: Any = open_engine(teacher, FormatConfig(), RunOptions(device="cpu", threads=1))
    assert (engine.name, engine.batch_size, engine.texts, engine.model.dtype) == (
        "transformers",
        None,
        16,
        torch.bfloat16,
    )
    found = answers(engine, [request(str(number), max_new_tokens=3) for number in range(20)])
    assert len(found) == 20 and not any(answer.error for answer in found)
    with pytest.raises(ValueError, match="continuous_batching is for engine: transformers, not vllm"):
        TeacherConfig(engine="vllm", model="m", continuous_batching=True)


def test_nothing_is_drawn_from_the_random_state_of_others(lively: Callable[..., Any], tokenizer: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    answers(continuous(lively(), tokenizer), [request(max_new_tokens=3, temperature=1.0)])
    assert torch.equal(torch.rand(3), expected)
