"""Scoring as a verb: a recipe, a file of traces, and what is refused before a model is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.documents import Documents
from distill.errors import EngineError
from distill.format import PROMPT, Document
from distill.logprobs import Facts, LogprobCache
from distill.teachers.score import batches, shards_of
from distill.teachers.served import rows_of

Cli = Callable[..., Any]
TinyModel = Callable[[str], Path]


def traces(folder: Path, column: str = "response") -> Path:
    path = folder / "my traces.jsonl"
    rows = [
        {"question": f"What is {a} + 2?", column: f"<think>\n{a} and 2 more.\n</think>\n\n{a + 2}"} for a in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_of_traces_is_scored_without_a_recipe(cli: Cli, tiny_model: TinyModel, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    said = cli(
        "score", traces(tmp_path, "text"), "teacher.recorded.response_column=text", "logprobs.form=topk",
        "logprobs.k=4", "format.max_tokens=256", "--teacher", tiny_model("llama"), "--runs", runs, "--threads", 1,
        "--quiet", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    [manifest] = list(runs.glob("score/*/manifest.json"))
    cache = LogprobCache(manifest.parent)
    assert len(cache) == 12 and cache.facts.form == "topk" and cache.facts.k == 4
    assert cache.manifest["teacher"]["model"] == tiny_model("llama").name, "a local folder's path is nobody's business"


def test_a_file_takes_a_teacher_and_a_recipe_names_its_own(cli: Cli, tmp_path: Path) -> None:
    assert "takes --teacher MODEL" in cli("score", traces(tmp_path), "--runs", tmp_path / "runs").error_line
    said = cli("score", tmp_path / "recipe.yaml", "--teacher", "a/b")
    assert said.code == 2 and "names its teachers in logprobs.teachers" in said.error_line
    said = cli("score", tmp_path / "none.jsonl", "--teacher", "a/b", "--runs", tmp_path / "runs")
    assert said.code == 2 and not (tmp_path / "runs").exists()


# --- how documents are cut ------------------------------------------------------------------------------------------


def documents_of(lengths: list[int]) -> Documents:
    rng = np.random.default_rng(0)
    return Documents.of(
        Document(rng.integers(0, 99, size=length).tolist(), bytes([PROMPT] * 2 + [2] * (length - 3) + [3]), False)
        for length in lengths
    )


def test_shards_hold_whole_documents_and_equal_ones_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.teachers import score

    monkeypatch.setattr(score, "SHARD_ROWS", 20)
    documents = documents_of([12, 14, 9, 22, 5])
    twice = documents.subset([0, 1, 0, 2, 3, 3, 4])
    assert shards_of(twice) == [[0, 1], [3, 4], [6]]
    assert [len(documents.supervised(index)) for index in range(5)] == [10, 12, 7, 20, 3]


def test_passes_hold_documents_of_like_length_up_to_the_budget() -> None:
    documents = documents_of([12, 40, 9, 22, 5])
    found = list(batches(documents.lengths, range(5), 32))
    assert found == [[1], [3], [0, 2, 4]]


# --- vLLM's numbers -------------------------------------------------------------------------------------------------


def test_what_vllm_leaves_of_one_is_the_mass_of_all_others() -> None:
    facts = Facts("topk", 2, 0, 1.0, 0, 50, "t" * 64)
    rows = rows_of(np.array([[7, 3], [1, 2]], np.int32), np.log([[0.5, 0.3], [0.6, 0.4]]).astype(np.float32), facts)
    assert rows.head_ids.tolist() == [[7, 3], [1, 2]] and np.allclose(np.exp(rows.tail_log_p[0]), 0.2, atol=1e-6)
    assert np.exp(rows.tail_log_p[1]) < 1e-6 and np.isfinite(rows.tail_log_p).all()
    with pytest.raises(EngineError, match="names token 50"):
        rows_of(np.array([[50, 3]], np.int32), np.log([[0.5, 0.3]]).astype(np.float32), facts)
