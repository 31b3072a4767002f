"""Reasoning formats: every dialect is read into fields, and what is rendered reads back as the same fields."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from distill.config import FormatConfig
from distill.errors import FormatError, ModelError
from distill.format import (
    ANSWER,
    EOS,
    PROMPT,
    SEGMENTS,
    THINK,
    Document,
    Parsed,
    Turn,
    check_markers_survive,
    check_round_trip,
    encode_document,
    encode_prompt,
    encode_turns,
    opens_reasoning,
    parse_completion,
    parse_fields,
    render_completion,
    render_prompt,
    set_template,
)
from distill.records import Message

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
ASKED = [Message(role="user", content="What is 2 + 2?")]
TEXT = st.text(max_size=60).map(str.strip)
EDGES = st.sampled_from(["", "🙂", "🏳️‍🌈", "思", "答え", "é", "e\u0301", "\u200b", ">", "\\boxed{4}", "0", "- a\n"])
"""What tokenizers cut in unlike ways: characters of several bytes or of several code points, marks, digits."""
MARKERS = st.sampled_from([("<think>", "</think>"), ("<|begin|>", "<|end|>"), ("[思", "思]")])


def build_tokenizer(split_words: bool = True, template: str | None = CHATML, pad: str = "<|pad|>") -> Any:
    """A byte-level BPE of a few hundred merges, as real ones are; `split_words=False` lets merges cross words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    lines = [f"{a} + {b} = {a + b}\n\nThe answer is {a + b}.\n\n" for a in range(20) for b in range(20)]
    inner.train_from_iterator([*lines, "<think>\nAdd them.\n</think>\n\n"] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token=pad, chat_template=template
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def r1_tokenizer() -> Any:
    made = build_tokenizer(template=None)
    set_template(made, FormatConfig(template="r1"))
    return made


# --- parsing: the dialects ------------------------------------------------------------------------------------------

DIALECTS = {
    "opened and closed": ("<think>\nAdd.\n</think>\n\n4", Parsed("Add.", "4", "closed")),
    "opened by the prompt": ("Add.\n</think>\n\n4", Parsed("Add.", "4", "closed")),
    "prompt repeated before it": ("What is 2 + 2?\n<think>\nAdd.\n</think>4", Parsed("Add.", "4", "closed")),
    "nothing thought": ("<think>\n\n</think>\n\n4", Parsed("", "4", "empty")),
    "cut off while thinking": ("<think>\nAdd, and then", Parsed("Add, and then", "", "unclosed")),
    "split on the last closing marker": (
        "<think>a</think>b</think>c",
        Parsed("a</think>b", "c", "multiple"),
    ),
    "closed, but no answer": ("<think>Add.</think>", Parsed("Add.", "", "closed")),
    "words on lines of their own": ("think\nAdd.\nanswer\n4", Parsed("Add.", "4", "closed")),
    "words in capitals": ("Thinking\nAdd.\n\nAnswer\n4\n", Parsed("Add.", "4", "closed")),
    "no markers": ("The answer is 4.", Parsed(None, "The answer is 4.", "absent")),
    "words within a sentence are no markers": ("I think\nanswer\n4", Parsed(None, "I think\nanswer\n4", "absent")),
    "empty": ("", Parsed(None, "", "absent")),
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
def test_each_dialect_is_read_into_its_fields(name: str) -> None:
    text, expected = DIALECTS[name]
    assert parse_completion(text) == expected


def test_text_without_a_closing_marker_is_reasoning_if_the_prompt_opened_it() -> None:
    assert parse_completion("Add, and then", opened=True) == Parsed("Add, and then", "", "unclosed")
    assert parse_completion("Add, and then") == Parsed(None, "Add, and then", "absent")


def test_a_format_without_markers_is_all_answer() -> None:
    assert parse_completion("<think>a</think>b", markers=False) == Parsed(None, "<think>a</think>b", "absent")


def test_separate_fields_are_read_and_markers_in_the_content_are_a_fall_back() -> None:
    assert parse_fields(" Add. \n", " 4 ") == Parsed("Add.", "4", "closed")
    assert parse_fields("Add", None) == Parsed("Add", "", "unclosed")
    assert parse_fields(None, "<think>Add.</think>4") == Parsed("Add.", "4", "closed")
    assert parse_fields(None, "4") == Parsed(None, "4", "absent")
    assert parse_fields("", "4") == Parsed("", "4", "empty")


# --- rendering reads back -------------------------------------------------------------------------------------------


@given(TEXT, TEXT, MARKERS, st.booleans())
def test_what_is_rendered_reads_back_as_the_same_fields(
    reasoning: str, answer: str, markers: tuple[str, str], opened: bool
) -> None:
    assume(not any(marker in reasoning + answer for marker in markers))
    config = FormatConfig(open_marker=markers[0], close_marker=markers[1])
    prompt = f"User: 2 + 2?\n\nAssistant: {markers[0]}\n" if opened else "User: 2 + 2?\n\nAssistant: "
    text = render_completion(reasoning, answer, prompt, config)
    parsed = parse_completion(text, *markers, opened=opens_reasoning(prompt, config))
    assert parsed == Parsed(reasoning, answer, "closed" if reasoning else "empty")
    assert text.count(markers[0]) == (0 if opened else 1), "the opening marker is written once, by prompt or completion"


@given(TEXT)
def test_an_answer_without_reasoning_reads_back_as_it_is(answer: str) -> None:
    assume("think" not in answer.casefold())
    config = FormatConfig()
    assert parse_completion(render_completion(None, answer, "Assistant: ", config)) == Parsed(None, answer, "absent")


def test_a_completion_is_written_as_r1_writes_it() -> None:
    config = FormatConfig()
    assert render_completion("Add.", "4", "Assistant: ", config) == "<think>\nAdd.\n</think>\n\n4"
    assert render_completion("Add.", "4", "Assistant: <think>\n", config) == "Add.\n</think>\n\n4"
    assert render_completion("Add.", "4", "Assistant: <think>", config) == "\nAdd.\n</think>\n\n4"


def test_a_trace_without_reasoning_is_refused_where_the_prompt_opens_it() -> None:
    with pytest.raises(FormatError, match="opens the reasoning, but this trace has none"):
        render_completion(None, "4", "Assistant: <think>\n", FormatConfig())


# --- prompts and templates ------------------------------------------------------------------------------------------


def test_the_prompt_is_the_templates_own_text(tokenizer: Any, r1_tokenizer: Any) -> None:
    system = FormatConfig(system="Be brief.")
    chatml = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt(tokenizer, ASKED, FormatConfig()) == chatml
    assert render_prompt(tokenizer, ASKED, system) == "<|im_start|>system\nBe brief.<|im_end|>\n" + chatml
    r1 = "User: What is 2 + 2?\n\nAssistant: <think>\n"
    assert render_prompt(r1_tokenizer, ASKED, FormatConfig()) == "<|im_start|>" + r1
    assert render_prompt(r1_tokenizer, ASKED, system) == "<|im_start|>Be brief.\n\n" + r1


def test_a_template_comes_from_the_tokenizer_from_us_or_from_a_file(tmp_path: Path) -> None:
    bare = build_tokenizer(template=None)
    with pytest.raises(FormatError, match=r"no chat template; set format\.template=r1"):
        set_template(bare, FormatConfig())
    (tmp_path / "mine.jinja").write_text("Q: {{ messages[-1]['content'] }}\nA:")
    set_template(bare, FormatConfig(template=str(tmp_path / "mine.jinja")))
    assert render_prompt(bare, ASKED, FormatConfig()) == "Q: What is 2 + 2?\nA:"
    with pytest.raises(FormatError, match=r"none\.jinja cannot be read"):
        set_template(bare, FormatConfig(template=str(tmp_path / "none.jinja")))


def test_a_template_that_refuses_a_message_says_so() -> None:
    strict = build_tokenizer(template="{{ raise_exception('no system turns') }}")
    with pytest.raises(FormatError, match="no system turns"):
        render_prompt(strict, ASKED, FormatConfig())


# --- token ids ------------------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(max_size=40), TEXT, TEXT, st.sampled_from(["keep", "r1"]))
def test_a_document_starts_with_the_ids_that_inference_sends_and_ends_in_the_end_token(
    tokenizer: Any, r1_tokenizer: Any, question: str, reasoning: str, answer: str, template: str
) -> None:
    chosen, config = (r1_tokenizer if template == "r1" else tokenizer), FormatConfig(template=template)
    messages = [Message(role="user", content=question)]
    prompt = render_prompt(chosen, messages, config)
    document = encode_document(chosen, messages, reasoning, answer, config)
    assert document.ids[: document.prompt_tokens] == encode_prompt(chosen, prompt)
    assert document.ids[-1] == chosen.eos_token_id
    check_round_trip(chosen, document, render_completion(reasoning, answer, prompt, config))


@pytest.fixture(scope="module")
def merging() -> Any:
    """A tokenizer whose tokens cross words and lines."""
    return build_tokenizer(split_words=False)


@settings(max_examples=300)
@given(
    st.tuples(EDGES, TEXT, EDGES), st.tuples(EDGES, TEXT, EDGES), MARKERS, st.sampled_from(["words", "r1", "merging"])
)
def test_segments_follow_one_another_and_say_together_what_the_completion_says(
    tokenizer: Any, r1_tokenizer: Any, merging: Any, reasoning_parts: Any, answer_parts: Any, markers: Any, kind: str
) -> None:
    reasoning, answer = "".join(reasoning_parts), "".join(answer_parts)
    assume(answer == answer.strip())
    chosen = {"words": tokenizer, "r1": r1_tokenizer, "merging": merging}[kind]
    config = FormatConfig(open_marker=markers[0], close_marker=markers[1])
    prompt = render_prompt(chosen, ASKED, config)
    completion = render_completion(reasoning, answer, prompt, config)
    document = encode_document(chosen, ASKED, reasoning, answer, config)
    assert len(document.segments) == len(document.ids)
    assert list(document.segments) == sorted(document.segments), "prompt, reasoning, answer, end"
    assert document.segments.count(EOS) == 1
    assert document.text(chosen, PROMPT) == prompt
    think, said = document.text(chosen, THINK), document.text(chosen, ANSWER)
    assert think + said == completion
    end = completion.rindex(markers[1], 0, len(completion) - len(answer)) + len(markers[1])
    assert think.startswith(completion[:end]) and not think[end:].strip(), "up to and with the closing marker"
    if kind != "merging":
        assert think == completion[:end]


def test_an_answer_alone_has_no_segment_of_reasoning_even_where_it_speaks_of_the_markers(tokenizer: Any) -> None:
    document = encode_document(tokenizer, ASKED, None, "Close it with </think>.\n\nSo: 4", FormatConfig())
    assert document.text(tokenizer, ANSWER) == "Close it with </think>.\n\nSo: 4"
    assert THINK not in document.segments


def test_reasoning_ends_with_the_last_marker_before_the_answer(tokenizer: Any) -> None:
    for reasoning, answer in (("a</think>b", "4"), ("a", "4</think>"), ("a", ""), ("", "4")):
        document = encode_document(tokenizer, ASKED, reasoning, answer, FormatConfig())
        assert document.text(tokenizer, THINK) == f"<think>\n{reasoning}\n</think>"
        assert document.text(tokenizer, ANSWER) == f"\n\n{answer}"


def test_segments_are_named_in_the_order_of_their_numbers() -> None:
    assert [SEGMENTS[kind] for kind in (PROMPT, THINK, ANSWER, EOS)] == ["prompt", "think", "answer", "eos"]
    document = Document([7, 8, 9, 2, 7], bytes([PROMPT, PROMPT, ANSWER, EOS, PROMPT]), False)
    assert document.prompt_tokens == 2, "only those before the first supervised one"


def test_a_tokenizer_that_cannot_say_where_its_tokens_stand_is_refused() -> None:
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    slow.chat_template = CHATML
    with pytest.raises(FormatError, match=r"cannot say where its tokens stand in a text; take a fast one"):
        encode_document(slow, ASKED, "Add.", "4", FormatConfig())


# --- several turns --------------------------------------------------------------------------------------------------

STRIPPING = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1].lstrip() }}")
"""A template that takes the reasoning out of earlier turns."""
TWO_TURNS = [
    Turn(ASKED, "Add.", "4"),
    Turn(
        [
            *ASKED,
            Message(role="assistant", content="<think>\nAdd.\n</think>\n\n4"),
            Message(role="user", content="Sure?"),
        ],
        "Check.",
        "Yes.",
    ),
]


def test_turns_are_one_document_where_the_second_prompt_begins_with_the_first_document(tokenizer: Any) -> None:
    first, second = (encode_document(tokenizer, *turn, FormatConfig()) for turn in TWO_TURNS)
    [document] = encode_turns(tokenizer, TWO_TURNS, FormatConfig())
    assert document.ids == second.ids
    assert document.segments[: len(first.ids)] == first.segments
    assert document.segments[len(first.ids) :] == second.segments[len(first.ids) :]
    assert document.text(tokenizer, EOS) == "<|im_end|><|im_end|>", "each turn learns to end"
    assert document.text(tokenizer, ANSWER) == "\n\n4\n\nYes."
    between = document.ids[len(first.ids) : second.prompt_tokens]
    assert tokenizer.decode(between) == "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"


def test_turns_are_documents_of_their_own_where_the_template_takes_earlier_reasoning_out() -> None:
    stripping = build_tokenizer(template=STRIPPING)
    documents = encode_turns(stripping, TWO_TURNS, FormatConfig())
    assert documents == [encode_document(stripping, *turn, FormatConfig()) for turn in TWO_TURNS]
    # the negative control: what the second turn stands behind is not what the first document says
    assert "Add." not in documents[1].text(stripping, PROMPT)
    assert documents[1].ids[: len(documents[0].ids)] != documents[0].ids


def test_a_turn_whose_history_is_written_otherwise_than_the_student_would_is_a_document_of_its_own(
    tokenizer: Any,
) -> None:
    first, second = TWO_TURNS
    closer = [second.messages[0], Message(role="assistant", content="<think>Add.</think>4"), second.messages[2]]
    documents = encode_turns(tokenizer, [first, second._replace(messages=closer)], FormatConfig())
    assert [one.prompt_tokens for one in documents] == [
        len(encode_prompt(tokenizer, render_prompt(tokenizer, messages, FormatConfig())))
        for messages in (ASKED, closer)
    ]


def test_turns_whose_seam_differs_are_kept_apart_and_noticed(merging: Any) -> None:
    plain, torn = "4", "\nThe answer is 4."  # with the line break of the prompt: `\n\n` is one token

    def two(first: str, second: str) -> list[Turn]:
        history = [*ASKED, Message(role="assistant", content=first), *ASKED]
        return [Turn(ASKED, None, first), Turn(history, None, second)]

    [joined] = encode_turns(merging, two(plain, torn), FormatConfig())
    assert joined.seam_differs
    apart = encode_turns(merging, two(torn, plain), FormatConfig())
    assert [one.seam_differs for one in apart] == [True, False]
    assert apart[1].ids[: len(apart[0].ids)] != apart[0].ids


def test_padding_with_the_end_token_leaves_the_end_supervised(tokenizer: Any) -> None:
    same = build_tokenizer(pad="<|im_end|>")
    assert same.pad_token_id == same.eos_token_id != tokenizer.pad_token_id
    document = encode_document(same, ASKED, "Add.", "4", FormatConfig())
    assert document == encode_document(tokenizer, ASKED, "Add.", "4", FormatConfig())
    # the prompt holds the same token at the end of the user's turn: only the position tells the two apart
    places = [index for index, token in enumerate(document.ids) if token == same.eos_token_id]
    assert len(places) == 2
    assert places[0] < document.prompt_tokens <= places[1] == len(document.ids) - 1


def test_a_tokenizer_that_merges_across_the_seam_is_noticed_and_the_prefix_still_holds() -> None:
    merging = build_tokenizer(split_words=False)
    clean = encode_document(merging, ASKED, None, "4", FormatConfig())
    torn = encode_document(merging, ASKED, None, "\nThe answer is 4.", FormatConfig())  # joint: `\n\n` is one token
    assert not clean.seam_differs and torn.seam_differs
    assert torn.ids[: torn.prompt_tokens] == clean.ids[: clean.prompt_tokens]


def test_a_document_needs_an_end_token() -> None:
    endless = build_tokenizer()
    endless.eos_token = None
    with pytest.raises(FormatError, match="no end token"):
        encode_document(endless, ASKED, "Add.", "4", FormatConfig())


def test_text_that_does_not_come_back_from_its_ids_is_refused(tokenizer: Any) -> None:
    document = encode_document(tokenizer, ASKED, "Add.", "4", FormatConfig())
    check_round_trip(tokenizer, document, "<think>\nAdd.\n</think>\n\n4")
    with pytest.raises(FormatError, match="expected '5', decoded '4'"):
        check_round_trip(tokenizer, document, "<think>\nAdd.\n</think>\n\n5")


def test_a_tokenizer_that_holds_the_markers_as_special_tokens_is_refused(tokenizer: Any) -> None:
    import copy

    check_markers_survive(tokenizer, FormatConfig())
    special = copy.deepcopy(tokenizer)
    special.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    with pytest.raises(ModelError, match="holds it as a special token"):
        check_markers_survive(special, FormatConfig())


def test_a_marker_mentioned_inside_reasoning_that_the_prompt_opened_loses_nothing() -> None:
    parsed = parse_completion("first\nthe <think> tag\n</think>\n\n4", opened=True)
    assert parsed == ("first\nthe <think> tag", "4", "closed")
    assert parse_completion("echo <think>\nfirst\n</think>\n\n4").reasoning == "first"


def test_a_tokenizer_that_cannot_write_the_markers_is_refused(tokenizer: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    check_markers_survive(tokenizer, FormatConfig())
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="'</think>': the student's tokenizer cannot write it"):
        check_markers_survive(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]"), FormatConfig())
