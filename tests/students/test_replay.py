"""Replay sets: other people's chats become supervised turns, and a row that is no chat is named."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import FormatConfig, HubSource, Replay
from distill.documents import Documents
from distill.errors import DataError
from distill.format import ANSWER, THINK, Document, Turn
from distill.models import find_model, load_tokenizer
from distill.records import Message
from distill.rows import Row
from distill.runs import RunOptions
from distill.students.replay import chat_turns, write_chats
from distill.token_store import tokenize, turns_of

TinyModel = Callable[[str], Path]
HI, HELLO = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
SUM = {"role": "user", "content": "2 + 2?"}
FOUR = {"role": "assistant", "content": "<think>\nAdd them.\n</think>\n\n4"}
BRIEF = {"role": "system", "content": "Be brief."}


@pytest.fixture
def tokenizer(tiny_model: TinyModel) -> Any:
    return load_tokenizer(find_model(str(tiny_model("llama"))))


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def turns_in(path: Path, replay: Replay, **config: Any) -> list[list[Turn]]:
    """The chats that `write_chats` leaves for tokenization."""
    count = write_chats(replay, FormatConfig(**config), path)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == "" and len(lines) == count
    return [turns_of(json.loads(line)) for line in lines]


def refused(tmp_path: Path, *rows: Any, **replay: Any) -> str:
    """What is said of a set that cannot be taken."""
    file = write_lines(tmp_path / "chats.jsonl", rows)
    with pytest.raises(DataError) as error:
        write_chats(Replay(name="old", file=file, **replay), FormatConfig(), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    return str(error.value).removeprefix(f"{tmp_path}/")


# --- what is read ---------------------------------------------------------------------------------------------------


def test_every_assistant_turn_is_supervised_with_the_messages_before_it_as_they_are(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "chats.jsonl", [{"messages": [BRIEF, HI, HELLO, SUM, FOUR], "source": "x"}])
    [turns] = turns_in(tmp_path / "out.jsonl", Replay(name="old", file=file))
    assert turns == [
        Turn([Message(**BRIEF), Message(**HI)], None, "Hello."),
        Turn([Message(**m) for m in (BRIEF, HI, HELLO, SUM)], "Add them.", "4"),
    ]


def test_a_chat_that_ends_with_a_question_keeps_its_answers(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "chats.jsonl", [{"messages": [HI, HELLO, SUM]}])
    [turns] = turns_in(tmp_path / "out.jsonl", Replay(name="old", file=file))
    assert turns == [Turn([Message(**HI)], None, "Hello.")]


def test_the_columns_may_be_called_otherwise(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "chats.jsonl", [{"chat": [HI, HELLO]}])
    [turns] = turns_in(tmp_path / "out.jsonl", Replay(name="old", file=file, messages_column="chat"))
    assert [turn.answer for turn in turns] == ["Hello."]


def test_sets_of_one_turn_have_a_column_for_each_side(tmp_path: Path) -> None:
    rows = [{"q": "2 + 2?", "a": "<think>Add them.</think>4"}, {"q": "Hi?", "a": "Hello."}, {"q": 5, "a": 6}]
    file = write_lines(tmp_path / "chats.jsonl", rows)
    replay = Replay(name="old", file=file, prompt_column="q", response_column="a")
    assert turns_in(tmp_path / "out.jsonl", replay) == [
        [Turn([Message(**SUM)], "Add them.", "4")],
        [Turn([Message(**HI)], None, "Hello.")],
        [Turn([Message(role="user", content="5")], None, "6")],
    ]


def test_the_recipes_own_markers_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 2?", "response": "[why]Add them.[/why]4"}]
    replay = Replay(name="old", file=write_lines(tmp_path / "chats.jsonl", rows), prompt_column="prompt")
    own = turns_in(tmp_path / "own.jsonl", replay, open_marker="[why]", close_marker="[/why]")
    others = turns_in(tmp_path / "others.jsonl", replay)
    assert own == [[Turn([Message(**SUM)], "Add them.", "4")]]
    assert others == [[Turn([Message(**SUM)], None, "[why]Add them.[/why]4")]]


def test_csv_and_parquet_may_hold_the_messages_as_json_text(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    chats = [[HI, HELLO], [BRIEF, SUM, FOUR, HI, HELLO]]
    expected = turns_in(
        tmp_path / "plain.jsonl",
        Replay(name="old", file=write_lines(tmp_path / "c.jsonl", [{"messages": c} for c in chats])),
    )
    texts = [json.dumps(chat) for chat in chats]
    with (tmp_path / "c.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["messages"], *([text] for text in texts)])
    pq.write_table(pa.table({"messages": texts}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"messages": chats}), tmp_path / "lists.parquet")
    for name in ("c.csv", "text.parquet", "lists.parquet"):
        assert turns_in(tmp_path / "out.jsonl", Replay(name="old", file=tmp_path / name)) == expected
    assert len(expected) == 2


def test_a_set_may_be_one_of_the_hub(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"messages": [HI, HELLO]}, {"messages": [SUM, FOUR]}]).save_to_disk(tmp_path / "saved")
    replay = Replay(name="old", hub=HubSource(id=str(tmp_path / "saved")))
    assert [[t.answer for t in turns] for turns in turns_in(tmp_path / "out.jsonl", replay)] == [["Hello."], ["4"]]


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (3, 3), (5, 5), (9, 5), (None, 5)])
def test_a_limit_takes_the_first_rows(tmp_path: Path, limit: int | None, count: int) -> None:
    rows = [{"prompt": f"{n}?", "response": f"{n}."} for n in range(5)]
    file = write_lines(tmp_path / "chats.jsonl", rows)
    made = turns_in(tmp_path / "out.jsonl", Replay(name="old", file=file, prompt_column="prompt", limit=limit))
    assert [turns[0].answer for turns in made] == [f"{n}." for n in range(count)]


def test_rows_after_the_limit_are_not_read(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "chats.jsonl", [{"messages": [HI, HELLO]}, {"messages": "broken"}])
    file.write_text(file.read_text() + "{broken\n")
    assert write_chats(Replay(name="old", file=file, limit=1), FormatConfig(), tmp_path / "out.jsonl") == 1
    with pytest.raises(DataError, match=r"chats\.jsonl:2: messages is not"):
        write_chats(Replay(name="old", file=file, limit=2), FormatConfig(), tmp_path / "out.jsonl")
    file.write_text(json.dumps({"messages": [HI, HELLO]}) + "\n{broken\n")
    assert write_chats(Replay(name="old", file=file, limit=1), FormatConfig(), tmp_path / "out.jsonl") == 1


SIDES = st.text(min_size=1, max_size=20).filter(lambda text: text.strip() and "think" not in text.casefold())


@given(st.lists(st.tuples(SIDES, st.none() | SIDES, SIDES), min_size=1, max_size=4), st.none() | SIDES, st.booleans())
def test_the_fields_of_any_chat_come_back_from_its_line(
    exchanges: list[tuple[str, str | None, str]], system: str | None, as_text: bool
) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, reasoning, answer in exchanges:
        content = answer if reasoning is None else f"<think>{reasoning}</think>{answer}"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
    row = Row("f:1", {"messages": json.dumps(messages) if as_text else messages})
    turns = chat_turns(row, Replay(name="old", file=Path("f")), FormatConfig())
    assert [(turn.messages[-1].content, turn.reasoning, turn.answer) for turn in turns] == [
        (question, None if reasoning is None else reasoning.strip(), answer.strip())
        for question, reasoning, answer in exchanges
    ]
    plain = [[[m.model_dump() for m in turn.messages], turn.reasoning, turn.answer] for turn in turns]
    assert turns_of(json.loads(json.dumps(plain))) == turns


# --- what is refused ------------------------------------------------------------------------------------------------

NO_CHATS: dict[str, Any] = {
    "a text": "Hello.",
    "half of a JSON text": '[{"role": "user", ',
    "a number": 4,
    "nothing": None,
    "texts": ["Hi?", "Hello."],
    "an object": {"role": "user", "content": "Hi?"},
    "messages without roles": [{"from": "human", "value": "Hi?"}],
    "a role that is none of ours": [HI, {"role": "tool", "content": "4"}, HELLO],
    "parts instead of text": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}, HELLO],
    "no text": [HI, {"role": "assistant", "content": None}],
}


@pytest.mark.parametrize("kind", NO_CHATS)
def test_a_row_that_is_no_chat_is_named_with_file_and_line(tmp_path: Path, kind: str) -> None:
    said = refused(tmp_path, {"messages": [HI, HELLO]}, {"messages": NO_CHATS[kind]})
    assert said == "chats.jsonl:2: messages is not a list of {role: system|user|assistant, content: text}"


@pytest.mark.parametrize(
    "messages",
    [[], [HI], [BRIEF], [BRIEF, HI], [HELLO, HI], [HELLO], [BRIEF, HELLO], [HELLO, HI, HELLO]],
    ids=lambda messages: " ".join(one["role"] for one in messages) or "empty",
)
def test_a_chat_without_an_answer_after_a_question_is_named(tmp_path: Path, messages: list[Any]) -> None:
    said = refused(tmp_path, {"messages": [HI, HELLO]}, {"messages": messages})
    assert said == "chats.jsonl:2: a chat takes a user's message and an assistant's answer after it"


@pytest.mark.parametrize("turns", [[HI, {**HELLO, "content": " \n"}], [HI, HELLO, SUM, {**HELLO, "content": ""}]])
def test_an_answer_without_text_is_named(tmp_path: Path, turns: list[Any]) -> None:
    said = refused(tmp_path, {"messages": turns})
    assert said == "chats.jsonl:1: an assistant's turn is empty; leave such rows out"


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    rows = [{"messages": [HI, HELLO]}, {"message": [HI, HELLO], "id": 3}]
    assert refused(tmp_path, *rows) == "chats.jsonl:2: no column 'messages' for replay set 'old'; it has message, id"
    sides = [{"prompt": "Hi?", "answer": "Hello."}]
    said = refused(tmp_path, *sides, prompt_column="prompt")
    assert said == "chats.jsonl:1: no column 'response' for replay set 'old'; it has prompt, answer"
    said = refused(tmp_path, *sides, prompt_column="question", response_column="answer")
    assert said == "chats.jsonl:1: no column 'question' for replay set 'old'; it has prompt, answer"


@pytest.mark.parametrize("empty", ["prompt", "response"])
def test_a_missing_text_is_not_taught_as_a_word(tmp_path: Path, empty: str) -> None:
    row = {"prompt": "Hi?", "response": "Hello.", empty: None}
    said = refused(tmp_path, {"prompt": "Hi?", "response": "Hello."}, row, prompt_column="prompt")
    assert said == f"chats.jsonl:2: no text in column {empty!r}; leave such rows out"


def test_a_set_without_rows_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path).startswith("chats.jsonl: no rows in it")


# --- documents ------------------------------------------------------------------------------------------------------


def test_chats_become_documents_whose_every_answer_is_supervised(tmp_path: Path, tokenizer: Any) -> None:
    chats = [[BRIEF, HI, HELLO, SUM, FOUR], [SUM, {"role": "assistant", "content": "<think>Add.</think>4"}, HI, HELLO]]
    file = write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    write_chats(Replay(name="old", file=file), FormatConfig(), tmp_path / "turns.jsonl")

    def made(threads: int) -> Documents:
        options = RunOptions(runs=tmp_path / "runs", threads=threads, quiet=True)
        config = FormatConfig(max_tokens=512)
        return tokenize(tmp_path / "turns.jsonl", "chats", tokenizer, config, [2], options, "replay set old")

    documents = made(1)
    # the second chat's reasoning is written otherwise than the student would, so its turns stand apart
    assert documents.counts == {"documents": 3, "too_long": 0, "seam_differs": 0}
    whole, first, second = (
        Document(documents.ids(i).tolist(), documents.segments(i).tobytes(), False) for i in range(3)
    )
    assert whole.text(tokenizer, THINK) == "<think>\nAdd them.\n</think>"
    assert whole.text(tokenizer, ANSWER) == "Hello.\n\n4"
    assert tokenizer.decode(whole.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?")
    assert first.text(tokenizer, ANSWER) == "\n\n4" and second.text(tokenizer, ANSWER) == "Hello."
    assert "<think>Add.</think>4<|im_end|>" in tokenizer.decode(second.ids[: second.prompt_tokens])
    assert made(2).digest == documents.digest


def test_the_same_rows_are_another_set_as_chats_and_as_examples(tmp_path: Path, tokenizer: Any) -> None:
    file = write_lines(tmp_path / "chats.jsonl", [{"messages": [HI, HELLO]}])
    write_chats(Replay(name="old", file=file), FormatConfig(), tmp_path / "turns.jsonl")
    options = RunOptions(runs=tmp_path / "runs", threads=1, quiet=True)
    config = FormatConfig(max_tokens=512)
    tokenize(tmp_path / "turns.jsonl", "chats", tokenizer, config, [2], options, "replay set old")
    with pytest.raises(ValueError, match="validation error"):
        tokenize(tmp_path / "turns.jsonl", "examples", tokenizer, config, [2], options, "examples")
