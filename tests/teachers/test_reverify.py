"""Verifying stored traces again: what changed is said and listed, and what is sealed stays what it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distill
from distill.config import Recipe, recipe_from
from distill.errors import DataError, IncompleteError, RecipeError
from distill.plan import make_plan
from distill.records import Verdict, read_records
from distill.runs import RunOptions, file_digest, open_sealed
from distill.teachers.reverify import Comparison, Reverified, reverify

LENIENT = "set(trace.answer) & set('0123456789')"
STRICT = "prompt.gold in trace.answer"
NONE = "False"


@pytest.fixture
def judging(tmp_path: Path) -> Callable[[str], Recipe]:
    """A recipe over recorded answers to 1 + 1, 2 + 2, …, half of them wrong, with a verifier that holds a condition."""
    rows = [{"question": f"{n} + {n}?", "answer": str(2 * n), "response": f"<think>a</think>{2 * n}"} for n in range(8)]
    for row in rows[::2]:
        row["response"] += "5, I think"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(condition: str, **sections: Any) -> Recipe:
        (tmp_path / "mine.py").write_text(
            "from distill.verifiers import verdict_of\n\n\ndef verify(prompt, trace):\n"
            f"    return verdict_of(prompt, trace, 'correct' if {condition} else 'wrong')\n"
        )
        source = {"name": "sums", "file": tmp_path / "rows.jsonl", "verifier": {"file": tmp_path / "mine.py"}}
        teacher = {"engine": "recorded", "recorded": {"files": [tmp_path / "rows.jsonl"]}}
        return recipe_from({"name": "r", "prompts": [source], "teacher": teacher, **sections})

    return recipe


ENDS = "trace.answer == prompt.gold"


def again(recipe: Recipe, tmp_path: Path) -> Comparison:
    return reverify(recipe, RunOptions(tmp_path / "runs", threads=1, quiet=True))


def select(recipe: Recipe, tmp_path: Path) -> Path:
    return distill.select(recipe, runs=tmp_path / "runs", threads=1, quiet=True).results["select"].folder


def examples(folder: Path) -> int:
    return int(open_sealed(folder).counts["examples"])


def test_a_newer_verifier_makes_a_new_run_and_says_what_changed_against_the_one_before(
    judging: Callable[..., Recipe], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    old = select(judging(LENIENT), tmp_path)
    assert examples(old) == 8
    recipe = judging(ENDS)
    comparison = again(recipe, tmp_path)
    assert comparison.compared_with == old / "verdicts.jsonl"
    assert comparison.counts == {("correct", "wrong"): 4, ("correct", "correct"): 4} and comparison.new == 0
    assert comparison.rows == [("correct", "wrong", 4), ("correct", "correct", 4)]
    step = make_plan(recipe, RunOptions(tmp_path / "runs")).steps["select"]
    assert step.sealed and step.folder != old and examples(step.folder) == 4
    listed = list(read_records(comparison.report, Reverified))
    wrong = {v.trace_id for v in read_records(step.folder / "verdicts.jsonl", Verdict) if v.outcome == "wrong"}
    assert {one.trace_id for one in listed} == wrong and len(listed) == 4
    assert {(one.before, one.now) for one in listed} == {("correct", "wrong")}
    assert {one.verifier_before != one.verifier_now for one in listed} == {True}
    assert f"4 of 8 verdicts changed against {old / 'verdicts.jsonl'}" in capfd.readouterr().err
    assert examples(old) == 8, "what was sealed before is still there"


def test_a_sealed_run_is_only_compared_and_keeps_every_byte(judging: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = judging(LENIENT)
    folder = select(recipe, tmp_path)
    assert again(recipe, tmp_path).changed == 0
    _pretend(folder, tmp_path)
    before = {path: file_digest(path) for path in folder.rglob("*") if path.is_file()}
    comparison = again(recipe, tmp_path)
    assert comparison.compared_with == folder / "verdicts.jsonl"
    assert comparison.counts == {("unverifiable", "correct"): 2, ("correct", "correct"): 6}
    assert len(list(read_records(comparison.report, Reverified))) == comparison.changed == 2
    assert {path: file_digest(path) for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in comparison.report.parent.iterdir() if not path.name.startswith(".")] == [
        "reverified.jsonl"
    ]


def _pretend(folder: Path, tmp_path: Path) -> None:
    """As if a run had been sealed with two verdicts that the verifier does not give: a bad moment, or a judge."""
    verdicts, document = folder / "verdicts.jsonl", json.loads((folder / "stage.json").read_text())
    verdicts.write_text(verdicts.read_text().replace('"correct"', '"unverifiable"', 2))
    listed = {"sha256": file_digest(verdicts), "bytes": verdicts.stat().st_size}
    document["files"]["verdicts.jsonl"] = listed
    (folder / "stage.json").write_text(json.dumps(document))


def test_after_deleting_a_sealed_run_it_is_made_by_the_verdicts_of_now(
    judging: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = judging(ENDS)
    folder = select(recipe, tmp_path)
    generated = make_plan(recipe, RunOptions(tmp_path / "runs")).steps["generate"].folder
    stored = generated / "verdicts.jsonl"
    kept = folder / "verdicts.jsonl"
    # verdicts made beside generation that no longer hold
    stored.write_text(kept.read_text().replace('"wrong"', '"correct"'))
    _reseal(generated, stored)
    (folder / "stage.json").unlink()
    kept.unlink()
    comparison = again(recipe, tmp_path)
    assert comparison.compared_with == stored and comparison.changed == 4
    assert examples(folder) == 4
    # negative control: without --reverify the stored ones would be taken over
    (folder / "stage.json").unlink()
    kept.unlink()
    assert examples(select(recipe, tmp_path)) == 8


def _reseal(folder: Path, path: Path) -> None:
    document = json.loads((folder / "stage.json").read_text())
    document["files"][path.name] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    (folder / "stage.json").write_text(json.dumps(document))


def test_without_any_verdict_before_there_is_nothing_to_compare_with(
    judging: Callable[..., Recipe], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = judging(ENDS)
    distill.generate(recipe, runs=tmp_path / "runs", threads=1, quiet=True)
    generated = make_plan(recipe, RunOptions(tmp_path / "runs")).steps["generate"].folder
    (generated / "verdicts.jsonl").write_text("")
    _reseal(generated, generated / "verdicts.jsonl")
    comparison = again(recipe, tmp_path)
    assert comparison.compared_with is None and comparison.rows == [("not judged", "judged", 8)]
    assert "there were no verdicts to compare with" in capfd.readouterr().err


def test_no_teacher_is_asked(judging: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match="8 wanted samples have no answer in the ledger"):
        again(judging(ENDS), tmp_path)
    assert not list((tmp_path / "runs").glob("generate/*/stage.json"))


def test_a_verifier_that_leaves_nothing_says_so_and_what_changed_is_still_listed(
    judging: Callable[..., Recipe], tmp_path: Path
) -> None:
    select(judging(LENIENT), tmp_path)
    with pytest.raises(DataError, match="none of 8 traces can train"):
        again(judging(NONE), tmp_path)
    (report,) = (tmp_path / "runs/reverified").glob("*/reverified.jsonl")
    assert len(list(read_records(report, Reverified))) == 8


def test_a_broken_verifier_is_refused_before_anything_is_written(
    judging: Callable[..., Recipe], tmp_path: Path
) -> None:
    select(judging(LENIENT), tmp_path)
    recipe = judging(LENIENT)
    (tmp_path / "mine.py").write_text("def verify(prompt, trace): return 7\n")
    with pytest.raises(RecipeError, match="returned int"):
        again(recipe, tmp_path)
    assert not (tmp_path / "runs/reverified").exists()


def test_the_command_line_prints_a_table_or_json(
    judging: Callable[..., Recipe], tmp_path: Path, cli: Any, write_recipe: Any
) -> None:
    select(judging(LENIENT), tmp_path)
    path = write_recipe("r.yaml", **judging(ENDS).model_dump(mode="json", exclude_defaults=True, exclude={"name"}))
    where = ("select", path, "--runs", tmp_path / "runs", "--quiet", "--threads", 1, "--reverify")
    said = cli(*where)
    assert said.code == 0 and said.out.splitlines() == [
        "before   now      traces", "correct  wrong    4", "correct  correct  4",
    ]  # fmt: skip
    document = cli(*where, "--json").json
    assert document["changed"] == 0 and Path(document["report"]).name == "reverified.jsonl"
    assert document["outcomes"] == [
        {"before": "correct", "now": "correct", "traces": 4}, {"before": "wrong", "now": "wrong", "traces": 4},
    ]  # fmt: skip
    both = cli(*where, "--push-to-hub", "ada/set")
    assert both.code == 2 and "give one of them" in both.err
    alone = cli("select", path, "--private")
    assert alone.code == 2 and "--private goes with --push-to-hub" in alone.err
