"""What `inspect` knows of a trace, from any target: also whether selection kept it, and what was asked for."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import distill
from distill.api import write_viewer
from distill.config import recipe_from
from distill.errors import RunError
from distill.inspection import Filters, Shown, name_of, show
from distill.records import Example, Flag, Message, Prompt, Teacher, Trace, Verdict, write_records

ALL = Filters(limit=None)
PROMPTS = [Prompt.of([Message(role="user", content=f"{n} + 1 = ?")], gold=str(n + 1), source="sums") for n in range(2)]


def trace(prompt: Prompt, sample: int, **fields: object) -> Trace:
    given = {"trace_id": f"{prompt.gold}-{sample}", "prompt_id": prompt.prompt_id, "cfg": "c", "sample": sample}
    return Trace.model_validate(
        {**given, "answer": "2", "finish_reason": "stop", "teacher": Teacher(engine="solver"), **fields}
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A run store by hand: two prompts, three answers and a failed request, of which selection kept one."""
    upstream = {"prompts": {}, "generate": {"prompts": "p"}, "select": {"traces": "g", "prompts": "p"}}
    folders = {stage: tmp_path / "runs" / stage / f"sums-{stage[0]}" for stage in upstream}
    for stage, folder in folders.items():
        folder.mkdir(parents=True)
        (folder / "stage.json").write_text(json.dumps({"label": stage, "upstream": upstream[stage]}))
    write_records(folders["prompts"] / "train.jsonl", PROMPTS)
    answers = [trace(PROMPTS[0], 0), trace(PROMPTS[0], 1), trace(PROMPTS[1], 0)]
    write_records(folders["generate"] / "traces.jsonl", answers)
    write_records(folders["generate"] / "failed.jsonl", [trace(PROMPTS[1], 1, error="503", answer="")])
    verdicts = [
        Verdict(trace_id="1-0", gold="1", verifier="number@1", outcome="wrong"),
        Verdict(trace_id="1-1", gold="1", verifier="number@1", outcome="wrong"),
        Verdict(trace_id="2-0", gold="2", verifier="number@1", outcome="correct"),
    ]
    write_records(folders["select"] / "verdicts.jsonl", verdicts)
    write_records(folders["select"] / "flags.jsonl", [Flag(trace_id="2-1", flag="api-error", detail="503")])
    drops = [{"trace_id": "1-0", "reason": "wrong"}, {"trace_id": "1-1", "reason": "wrong"}]
    drops.append({"trace_id": "2-1", "reason": "api-error"})
    (folders["select"] / "dropped.jsonl").write_text("".join(json.dumps(drop) + "\n" for drop in drops))
    return tmp_path / "runs"


def of(runs: Path, stage: str) -> dict[str, Shown]:
    return {one.trace.trace_id: one for one in show(next((runs / stage).iterdir()), ALL, (), runs)}


def test_a_selection_says_of_every_trace_whether_it_was_kept_and_why_not(runs: Path) -> None:
    found = of(runs, "select")
    assert {trace_id: (one.kept, one.dropped) for trace_id, one in found.items()} == {
        "1-0": (False, "wrong"),
        "1-1": (False, "wrong"),
        "2-0": (True, None),
        "2-1": (False, "api-error"),
    }
    assert [trace_id for trace_id, one in found.items() if one.accepted] == ["2-0"]
    assert [flag.detail for flag in found["2-1"].flags] == ["503"]


def test_before_a_selection_nothing_is_kept_or_dropped_and_the_verdict_decides(runs: Path) -> None:
    assert {one.kept for one in of(runs, "generate").values()} == {None}
    assert not any(one.accepted for one in of(runs, "generate").values())
    prompt, verdict = PROMPTS[0], Verdict(trace_id="1-0", gold="1", verifier="number@1", outcome="correct")
    assert Shown("eval:student", trace(prompt, 0), prompt, verdict).accepted
    assert not Shown("select", trace(prompt, 0), prompt, verdict, kept=False).accepted


def test_training_examples_were_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    write_records(path, [Example(prompt=PROMPTS[0], trace_id="t", reasoning="r", answer="1")])
    assert [one.kept for one in show(path, ALL, (), tmp_path)] == [True]


def test_traces_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    write_records(path, [trace(PROMPTS[0], 0), trace(PROMPTS[0], 1)])
    with path.open("a") as file:
        file.write("not a trace\n")
    found: Iterator[Shown] = show(path, ALL, (), tmp_path)
    assert next(found).trace.sample == 0
    with pytest.raises(distill.DataError, match=r"traces\.jsonl:3"):
        list(found)
    assert len(list(show(path, Filters(limit=2), (), tmp_path))) == 2, "the third line is not reached"


def test_filters_say_in_words_what_they_leave_in() -> None:
    assert str(ALL) == ""
    assert str(Filters(wrong=True, key="ab12", stage="select", limit=1000)) == (
        "wrong, ids from ab12, stage select, the first 1,000"
    )


def test_a_target_is_called_by_its_name_and_not_by_the_way_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sums-0").mkdir()
    assert name_of(recipe_from({"name": "sums"})) == "sums"
    assert name_of(tmp_path / "mine.yaml") == "mine"
    assert name_of(str(tmp_path / "sums-0")) == "sums-0"
    assert name_of(tmp_path / "sums-0" / "traces.jsonl") == "traces.jsonl"
    monkeypatch.chdir(tmp_path / "sums-0")
    assert name_of(".") == "sums-0"


def test_a_page_is_written_of_a_stage_with_what_lies_upstream_and_beside(runs: Path, tmp_path: Path) -> None:
    page = write_viewer(next((runs / "select").iterdir()), tmp_path / "pages" / "sums.html", runs=runs)
    assert (page.traces, page.path) == (4, tmp_path / "pages" / "sums.html")
    assert page.bytes == page.path.stat().st_size
    assert write_viewer(next((runs / "generate").iterdir()), tmp_path / "g.html", Filters(failed=True)).traces == 1


def test_no_page_and_no_folder_is_left_where_there_is_nothing_to_show(tmp_path: Path) -> None:
    (tmp_path / "runs" / "select" / "sums-0").mkdir(parents=True)
    with pytest.raises(RunError):
        write_viewer(tmp_path / "runs" / "select" / "sums-0", tmp_path / "pages" / "page.html")
    assert not (tmp_path / "pages").exists()
