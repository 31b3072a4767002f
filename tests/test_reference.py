"""The generated references: complete, current, and seen to be stale when they are."""

from pathlib import Path

import pytest

from distill.cli import STAGE_VERBS
from distill.config import Recipe
from distill.reference import main, pages, sections


def test_every_field_of_every_section_is_documented() -> None:
    bare = [
        f"{section.__name__}.{name}"
        for _, section in sections(Recipe)
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert not bare


def test_the_recipe_reference_names_every_key() -> None:
    text = pages()["config.md"]
    assert all(f"| `{name}` |" in text for _, section in sections(Recipe) for name in section.model_fields)
    assert "## `student.phases.0`" in text and "## `evaluate.sets.NAME.source`" in text


def test_the_command_reference_names_every_verb() -> None:
    text = pages()["cli.md"]
    assert all(f"## distill {verb}\n" in text for verb in (*STAGE_VERBS, "init", "train", "inspect", "verify", "serve"))


def test_pages_that_were_just_written_are_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--write", str(tmp_path)]) == 0
    assert main(["--check", str(tmp_path)]) == 0
    (tmp_path / "cli.md").write_text("old")
    assert main(["--check", str(tmp_path)]) == 1
    assert "cli.md" in capsys.readouterr().err


def test_anything_else_is_a_usage_error() -> None:
    assert main(["--write"]) == main([]) == 2
