"""Training documents: what is supervised is exactly what the student should write, and the rest is refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import FormatConfig
from distill.errors import FormatError, TrainingError
from distill.format import R1_TEMPLATE, Document
from distill.models import find_model, load_tokenizer
from distill.records import Example, Message, Prompt
from distill.students.data import Documents, check_document, check_vocabulary, documents_digest, encode_examples

TinyModel = Callable[[str], Path]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As SmolLM2 and Qwen2.5 have it."""
STRIPPING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and '</think>' in m['content'] %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3 has it: the reasoning of assistant turns is taken out."""
OPENING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% else %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
"""As R1's distilled models have it: the generation prompt opens the reasoning, and assistant turns lose theirs."""
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""As Llama 3 has it."""

REASONING, ANSWER = "2 and 2 are 4.\n\nCheck: 4 - 2 = 2.", "The answer is \\boxed{4}."
WHOLE = f"<think>\n{REASONING}\n</think>\n\n{ANSWER}<|im_end|>"
REST = f"{REASONING}\n</think>\n\n{ANSWER}<|im_end|>"
GOLDEN = {
    "chatml": (CHATML, "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", WHOLE),
    "stripping": (STRIPPING, "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", WHOLE),
    "headers": (
        HEADERS,
        "<|im_start|><|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        WHOLE,
    ),
    "opening": (OPENING, "<|im_start|><|User|>2 + 2?<|Assistant|><think>\n", REST),
    "r1": (R1_TEMPLATE, "<|im_start|>User: 2 + 2?\n\nAssistant: <think>\n", REST),
}  # fmt: skip


def example(reasoning: str | None = REASONING, answer: str = ANSWER, question: str = "2 + 2?") -> Example:
    return Example(
        prompt=Prompt.of([Message(role="user", content=question)]), trace_id="t", reasoning=reasoning, answer=answer
    )


@pytest.fixture
def tokenizer(tiny_model: TinyModel) -> Any:
    return load_tokenizer(find_model(str(tiny_model("llama"))))


@pytest.fixture(params=["as text", "as tokens"])
def marking(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    """A tokenizer that spells the markers out, and one that has a token for each, as Qwen3's does."""
    if request.param == "as tokens":
        tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def encode(tokenizer: Any, *examples: Example, **config: Any) -> Documents:
    return encode_examples(examples, tokenizer, FormatConfig(**({"max_tokens": 512} | config)), 512, [2])


# --- what is supervised ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"], ids=["pad", "pad is eos"])
def test_the_supervised_text_is_exactly_reasoning_answer_and_end(marking: Any, name: str, pad: str) -> None:
    marking.chat_template, prompt, supervised = GOLDEN[name]
    marking.pad_token = pad
    made = encode(marking, example())
    [ids], [cut] = made.ids, made.prompt_tokens
    assert marking.decode(ids[:cut]) == prompt
    assert marking.decode(ids[cut:]) == supervised
    # what inference sends, by transformers alone
    asked = [{"role": "user", "content": "2 + 2?"}]
    sent = marking.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids[:cut].tolist() == sent
    assert ids[-1] == marking.eos_token_id


@pytest.mark.parametrize("name", ["stripping", "opening"])
def test_rendering_the_answer_through_such_a_template_would_lose_the_reasoning(tokenizer: Any, name: str) -> None:
    """What trainers do that render whole conversations; why the completion is rendered from the fields."""
    tokenizer.chat_template = GOLDEN[name][0]
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": f"<think>\n{REASONING}\n</think>\n\n{ANSWER}"},
    ]
    assert REASONING not in tokenizer.apply_chat_template(turns, tokenize=False)


def test_an_answer_without_reasoning_is_supervised_alone(tokenizer: Any) -> None:
    made = encode(tokenizer, example(reasoning=None))
    assert tokenizer.decode(made.ids[0][made.prompt_tokens[0] :]) == f"{ANSWER}<|im_end|>"


def test_the_system_prompt_of_the_recipe_is_in_the_prefix(tokenizer: Any) -> None:
    made = encode(tokenizer, example(), system="Be brief.")
    assert tokenizer.decode(made.ids[0]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_lengths_and_counts_add_up(tokenizer: Any) -> None:
    made = encode(tokenizer, example(), example(answer="4"), example(reasoning="x" * 3000))
    assert made.counts == {"documents": 2, "too_long": 1, "seam_differs": 0}
    assert made.lengths == [len(ids) for ids in made.ids]
    assert [a + b for a, b in zip(made.prompt_tokens, made.supervised, strict=True)] == made.lengths
    assert all(ids.dtype == np.int32 for ids in made.ids)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_no_examples_are_refused(tokenizer: Any) -> None:
    with pytest.raises(TrainingError, match="no examples to train on"):
        encode(tokenizer)


def test_an_empty_trace_is_refused(tokenizer: Any) -> None:
    with pytest.raises(TrainingError, match="no supervised tokens: its trace is empty"):
        encode(tokenizer, example(reasoning=None, answer=""))


def test_a_template_that_renders_no_prompt_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(FormatError, match="renders an empty prompt"):
        encode(tokenizer, example())


def test_an_end_that_generation_does_not_stop_at_is_refused(tokenizer: Any) -> None:
    with pytest.raises(FormatError, match=r"ends documents with token 2, but generation stops at \[0, 5\]"):
        encode_examples([example()], tokenizer, FormatConfig(max_tokens=512), 512, [0, 5])
    assert encode_examples([example()], tokenizer, FormatConfig(max_tokens=512), 512, [0, 2]).ids


def test_a_document_whose_end_is_cut_off_is_refused(tokenizer: Any) -> None:
    with pytest.raises(FormatError, match="ends documents with token 9"):
        check_document(Document([5, 6, 7, 8, 9], 2, False), tokenizer, [2])


def test_a_tokenizer_without_end_token_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(FormatError, match="no end token"):
        encode(tokenizer, example())


def test_a_limit_beyond_the_context_is_refused(tokenizer: Any) -> None:
    message = r"max_tokens is 4,096, but the model's context is 512 tokens; set format\.max_tokens=512"
    with pytest.raises(TrainingError, match=message):
        encode(tokenizer, example(), max_tokens=4096)


def test_documents_that_are_all_too_long_are_refused_and_a_few_are_counted(tokenizer: Any) -> None:
    long = example(reasoning="x " * 400)
    with pytest.raises(TrainingError, match=r"2 of 2 documents are longer than format\.max_tokens=512"):
        encode(tokenizer, long, long)
    with pytest.raises(TrainingError, match="2 of 3 documents"):
        encode(tokenizer, long, long, example())
    assert encode(tokenizer, long, example()).counts["too_long"] == 1


class Forgetful:
    """A tokenizer that drops what it does not know, as one with a small word list does."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, text: str, **options: Any) -> Any:
        return self.inner(text.replace("4", ""), **options)


def test_text_that_the_tokenizer_does_not_give_back_is_refused(tokenizer: Any) -> None:
    with pytest.raises(FormatError, match="does not give back the training text: expected '4"):
        encode(Forgetful(tokenizer), example())


class Moody:
    """A tokenizer whose template depends on when it is asked, as one that prints the date does."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.calls = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, text: str, **options: Any) -> Any:
        return self.inner(text, **options)

    def apply_chat_template(self, *args: Any, **options: Any) -> str:
        self.calls += 1
        return f"Call {self.calls}. {self.inner.apply_chat_template(*args, **options)}"


def test_a_prefix_that_is_not_what_inference_sends_is_refused(tokenizer: Any) -> None:
    with pytest.raises(FormatError, match="training prefix differs from the generation prefix"):
        encode(Moody(tokenizer), example())


def test_ids_beyond_the_models_vocabulary_are_refused_and_a_padded_vocabulary_is_fine(tokenizer: Any) -> None:
    made = encode(tokenizer, example())
    highest = max(int(ids.max()) for ids in made.ids)
    with pytest.raises(TrainingError, match=f"writes token {highest}, but the model has embeddings for {highest} tok"):
        check_vocabulary(made, highest)
    check_vocabulary(made, highest + 1)
    check_vocabulary(made, 100_000)


# --- what a resume compares -----------------------------------------------------------------------------------------


def changes(documents: Documents) -> Iterator[Documents]:
    """Neighbours of a set of documents that train differently."""
    ids, prompts = documents.ids, documents.prompt_tokens
    yield Documents([*ids[1:], ids[0]], [*prompts[1:], prompts[0]], {})
    yield Documents(ids, [prompts[0] + 1, *prompts[1:]], {})
    yield Documents(ids[:-1], prompts[:-1], {})
    yield Documents([np.append(ids[0], ids[1][:1]), ids[1][1:], *ids[2:]], prompts, {})
    yield Documents([*ids[:-1], ids[-1] + 1], prompts, {})


@given(st.lists(st.lists(st.integers(0, 50_000), min_size=2, max_size=6, unique=True), min_size=2, max_size=5))
def test_the_digest_of_documents_sees_order_boundaries_and_every_id(rows: list[list[int]]) -> None:
    made = Documents([np.asarray([n, *row], dtype=np.int32) for n, row in enumerate(rows)], [1] * len(rows), {})
    again = Documents([ids.copy() for ids in made.ids], [1] * len(rows), {"documents": 3})
    assert documents_digest(made) == documents_digest(again)
    assert all(documents_digest(other) != documents_digest(made) for other in changes(made))
