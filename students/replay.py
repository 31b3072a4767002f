"""Replay sets: other people's chats as supervised turns, so that a student keeps what it knew."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from distill.config import FormatConfig, Replay
from distill.errors import DataError
from distill.format import Turn, parse_completion
from distill.records import Message
from distill.rows import Row, read_hub, read_rows


def write_chats(replay: Replay, config: FormatConfig, path: Path) -> int:
    """Write a replay set's supervised turns as JSON Lines that `tokenize` takes; returns the number of chats.

    Raises DataError naming the row that is no chat.
    """
    part = path.with_name(path.name + ".part")
    count = 0
    with part.open("w", encoding="utf-8") as out:
        for row in islice(_rows(replay), replay.limit):
            turns = chat_turns(row, replay, config)
            plain = [[[m.model_dump() for m in turn.messages], turn.reasoning, turn.answer] for turn in turns]
            out.write(json.dumps(plain, ensure_ascii=False) + "\n")
            count += 1
    os.replace(part, path)
    if not count:
        raise DataError(f"replay set {replay.name!r} has no rows")
    return count


def chat_turns(row: Row, replay: Replay, config: FormatConfig) -> list[Turn]:
    """The assistant turns of one row, each with the messages before it."""
    messages = _messages(row, replay)
    turns = []
    for place, message in enumerate(messages):
        if message.role == "assistant":
            if not message.content.strip():
                raise DataError(f"{row.where}: an assistant's turn is empty; leave such rows out")
            parsed = parse_completion(message.content, config.open_marker, config.close_marker)
            turns.append(Turn(messages[:place], parsed.reasoning, parsed.answer))
    if not turns or not any(message.role == "user" for message in turns[0].messages):
        raise DataError(f"{row.where}: a chat takes a user's message and an assistant's answer after it")
    return turns


def _messages(row: Row, replay: Replay) -> list[Message]:
    values = row.values
    wanted = [replay.prompt_column, replay.response_column] if replay.prompt_column else [replay.messages_column]
    if missing := [name for name in wanted if name not in values]:
        has = ", ".join(values)
        raise DataError(f"{row.where}: no column {missing[0]!r} for replay set {replay.name!r}; it has {has}")
    if replay.prompt_column:
        if empty := [name for name in wanted if values[name] is None]:
            raise DataError(f"{row.where}: no text in column {empty[0]!r}; leave such rows out")
        user, assistant = (str(values[name]) for name in wanted if name)
        return [Message(role="user", content=user), Message(role="assistant", content=assistant)]
    given = values[replay.messages_column]
    try:
        given = json.loads(given) if isinstance(given, str) else given
        return [Message(role=one["role"], content=one["content"]) for one in given]
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(
            f"{row.where}: {replay.messages_column} is not a list of {{role: system|user|assistant, content: text}}"
        ) from error


def _rows(replay: Replay) -> Iterator[Row]:
    return read_rows(replay.file) if replay.file else read_hub(_hub(replay))


def _hub(replay: Replay) -> Any:
    assert replay.hub is not None  # the recipe's own validation
    return replay.hub
