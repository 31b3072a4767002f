"""The artifact's card: no name breaks it, and nothing of this machine is in it."""

from pathlib import Path
from typing import Any

import pytest

from distill.config import recipe_from
from distill.export.card import write_card
from distill.export.manifest import GateEntry
from distill.runs import Step


@pytest.fixture
def step(tmp_path: Path) -> Step:
    return Step("export", "export", "r", "0" * 16, {}, {}, tmp_path)


def card(step: Step, system: str | None = None, detail: str = "", **student: Any) -> str:
    recipe = recipe_from(
        {
            "name": "r",
            "prompts": [{"name": "own", "file": "own.jsonl", "heldout": 2}],
            "teacher": {"engine": "transformers", "model": "/home/ada lovelace/r1", "licence": "MIT"},
            "format": {"system": system},
            "student": {"init": "/home/ada lovelace/base.gguf", **student},
            "evaluate": {},
            "export": {},
        }
    )
    gates = [GateEntry(name="mean_kl", variant="int4", status="not_run", limit=0.5, detail=detail)]
    return write_card(recipe, step, gates, {}, {"fp32": 10**6, "int4": 10**5})


def test_the_artifacts_card_names_origins_without_their_folders(step: Step) -> None:
    text = card(step, licence="Apache-2.0")
    assert "from `base.gguf`, as ONNX" in text and "- base: `base.gguf`, licence: Apache-2.0" in text
    assert "- teacher: `transformers` r1, licence: MIT" in text and "lovelace" not in text
    assert "| int4 | mean_kl | not run |  | 0.5 |  |" in text and 'og.Model(".")' in text
    assert "licence: not stated in the recipe" in card(step)


def test_no_text_breaks_the_artifacts_card(step: Step) -> None:
    from markdown_it import MarkdownIt

    evil = "``` `x` | <b>\n# [y](http://z)"
    text = card(step, evil, evil, licence=evil)
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inside = [one for token in tokens for one in (token.children or ())]
    assert {token.content for token in inside if token.type == "html_inline"} <= {"<code>", "</code>"}
    assert not [token for token in inside if token.type == "link_open"]
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == ["r", "Gates", "Use", "Origin"]
