"""Streams of text: characters whole, reasoning apart, cut at stop sequences, whatever the portions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import ModelError
from distill.export.chat_template import Chat
from distill.export.text_stream import Detokenizer, ReasoningSplitter, StopFinder, overlap
from distill.format import parse_completion

TEMPLATES = Path(__file__).parents[1] / "chat_templates"
SPOKEN = st.text(alphabet=st.sampled_from("ab\n <>/think"), max_size=40)


@pytest.fixture(scope="module")
def chat(tiny_model: Callable[[str], Path]) -> Chat:
    return Chat(tiny_model("llama"))


def portions(text: str, cuts: Sequence[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in zip(places, places[1:])]


# --- characters -------------------------------------------------------------------------------------------------------


@given(text=st.text(max_size=30) | st.sampled_from(["🏳️‍🌈 思 é ", "a\u0301👩‍👩‍👧‍👧", "\ufffd"]))
def test_streamed_text_is_the_whole_text_and_never_half_a_character(chat: Chat, text: str) -> None:
    ids = chat.encode(text)
    stream = Detokenizer(chat.decode)
    parts = [stream.push(token) for token in ids]
    assert chat.decode(ids) == text
    assert "".join([*parts, stream.end()]) == text.rstrip("\ufffd")
    if "\ufffd" not in text:
        assert all("\ufffd" not in part for part in parts)


def test_a_token_inside_a_character_is_held_until_the_character_is_whole(chat: Chat) -> None:
    ids = chat.encode("a🙂b")
    assert len(ids) == 6, "one letter, four bytes, one letter"
    stream = Detokenizer(chat.decode)
    assert [stream.push(token) for token in ids] == ["a", "", "", "", "🙂", "b"]


def test_half_a_character_at_the_end_is_left_out_and_an_endless_row_of_them_is_not_held(chat: Chat) -> None:
    half = chat.encode("🙂")[:2]
    stream = Detokenizer(chat.decode)
    assert [stream.push(token) for token in [*chat.encode("a"), *half]] == ["a", "", ""]
    assert chat.decode(half) == "\ufffd" and stream.end() == "" and stream.end() == ""
    assert "".join(stream.push(token) for token in half * 20).count("\ufffd") > 10, (
        "an endless row is not held for ever"
    )


# --- reasoning --------------------------------------------------------------------------------------------------------


def split(text: str, cuts: Sequence[int], opened: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter("<think>", "</think>", opened)
    parts = [splitter.push(part) for part in portions(text, cuts)] + [splitter.end()]
    return "".join(part.reasoning for part in parts), "".join(part.answer for part in parts)


@given(reasoning=SPOKEN, answer=SPOKEN, closed=st.booleans(), opened=st.booleans(), cuts=st.lists(st.integers(0, 99)))
def test_a_stream_is_split_as_the_whole_text_is_parsed(
    reasoning: str, answer: str, closed: bool, opened: bool, cuts: list[int]
) -> None:
    text = ("" if opened else "<think>\n") + reasoning + ("\n</think>\n\n" + answer if closed else "")
    inner = text.removeprefix("<think>")
    if inner.count("</think>") != closed or "<think>" in inner:
        return  # what a stream cannot know: which marker is the last
    parsed = parse_completion(text, opened=opened)
    found = split(text, cuts, opened)
    assert (found[0], found[1].rstrip()) == (parsed.reasoning or "", parsed.answer)


@given(text=SPOKEN, cuts=st.lists(st.integers(0, 99)))
def test_a_text_without_markers_is_the_answer(text: str, cuts: list[int]) -> None:
    if "think>" not in text:
        assert split(text, cuts, opened=False) == ("", text.lstrip())


@pytest.mark.parametrize("cut", range(1, 24))
def test_markers_are_found_over_any_border(cut: int) -> None:
    text = "<think>\nSo 4.\n</think>\n\n4"
    assert split(text, [cut], opened=False) == ("So 4.", "4")


def test_the_marker_that_the_prompt_holds_may_come_once_more() -> None:
    assert split("<think>\nSo 4.\n</think>\n\n4", [3], opened=True) == ("So 4.", "4")
    assert split("So 4.</think>4", [3], opened=True) == ("So 4.", "4")


def test_what_only_looks_like_a_marker_is_text() -> None:
    assert split("a </thin b", [5, 7], opened=True) == ("a </thin b", "")
    assert split("<thank you", [4], opened=False) == ("", "<thank you")


# --- stop sequences ---------------------------------------------------------------------------------------------------


@given(
    text=st.text(alphabet="ab🙂\n", max_size=30),
    stops=st.lists(st.text(alphabet="ab🙂\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 99)),
)
def test_a_text_ends_before_the_stop_sequence_that_is_complete_first_whatever_the_portions(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    finder = StopFinder(stops)
    found = "".join(finder.push(part) for part in portions(text, cuts))
    found += finder.end()
    ends = (end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops))
    first = text[: next(ends, None)]
    assert finder.found == any(stop in text for stop in stops)
    longest = max((len(stop) for stop in stops if first.endswith(stop)), default=0)
    assert found == (first[: len(first) - longest] if finder.found else text)


def test_nothing_is_given_out_that_a_stop_sequence_could_take_back() -> None:
    finder = StopFinder(["END", "ENOUGH"])
    assert [finder.push(part) for part in ("fin E", "N", "OU", "x E")] == ["fin ", "", "", "ENOUx "]
    assert finder.push("ND more") == "" and finder.found and finder.push("more") == "" and finder.end() == ""


def test_the_overlap_is_the_longest_and_never_the_whole_marker() -> None:
    assert [overlap(text, "aab") for text in ("", "a", "aa", "aaa", "aab", "b")] == [0, 1, 2, 2, 0, 0]


# --- chat templates ---------------------------------------------------------------------------------------------------

CHATS = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": " Be short. "}, {"role": "user", "content": "Hi 🙂\n"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nWell.\n</think>\n\nHello <b>&amp;</b>"},
        {"role": "user", "content": "<|im_end|> or </s>?"},
    ],
]


@pytest.fixture(scope="module")
def with_template(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a template's text to a tokenizer's folder as transformers saves it."""
    from transformers import AutoTokenizer

    def save(template: str, inline: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("template")
        tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model("llama"))
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder, save_jinja_files=not inline)
        return folder

    return save


@pytest.mark.parametrize("name", ["llama-3.2", "qwen2.5", "qwen3", "r1-distill", "smollm2"])
def test_prompts_are_rendered_and_tokenized_as_training_did(with_template: Callable[..., Path], name: str) -> None:
    from transformers import AutoTokenizer

    folder = with_template((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    ours, theirs = Chat(folder), AutoTokenizer.from_pretrained(folder)
    for messages in CHATS:
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.render(messages) == expected
        assert ours.encode(expected) == theirs(expected, add_special_tokens=False)["input_ids"]


def test_a_template_has_what_transformers_gives_it(with_template: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    template = (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n"
        "  {% generation %}{{ m | tojson }}{% set inside = 1 %}{% endgeneration %}{{ eos_token }}\n{% endfor %}"
        "{{ inside is defined }}{{ strftime_now('%Y')[:2] }}"
    )
    folder = with_template(template, inline=True)
    assert not (folder / "chat_template.jinja").exists()
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(CHATS[2], tokenize=False)
    assert Chat(folder).render(CHATS[2]) == expected and "<b>" in expected


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}",
     "{% for i in range(10 ** 9) %}x{% endfor %}"],
)  # fmt: skip
def test_a_template_that_refuses_or_reaches_out_is_an_error_of_the_users(
    with_template: Callable[..., Path], template: str
) -> None:
    with pytest.raises(ModelError, match="cannot render these messages"):
        Chat(with_template(template)).render(CHATS[0])


def test_a_folder_without_a_template_or_a_tokenizer_is_refused(
    with_template: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"tokenizer.json: cannot be read"):
        Chat(tmp_path)
    with pytest.raises(ModelError, match="is not valid"):
        Chat(with_template("{% if %}"))
    folder = with_template("x")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template"):
        Chat(folder)


def test_half_a_character_is_refused(chat: Chat) -> None:
    with pytest.raises(ModelError, match="lone surrogate"):
        chat.encode("a\ud800b")
