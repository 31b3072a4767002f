"""The ledger: nothing that reached it is lost, wherever a write was torn; nothing in it is asked for twice."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.config import FormatConfig, TeacherConfig
from distill.errors import RunError
from distill.records import Teacher, Trace, Usage, read_records
from distill.teachers.ledger import Ledger, Spent, billed_tokens, cfg_of, open_ledger, sent_to_teacher

SENT = {"engine": "openai", "model": "r1", "sampling": {"temperature": 0.6}}


def trace(prompt_id: str, sample: int = 0, attempt: int = 0, error: str | None = None, **more: Any) -> Trace:
    fields: dict[str, Any] = {"answer": f"Antwort für {prompt_id} – ½", "usage": Usage(output=5), "cost_usd": 0.25}
    return Trace(
        trace_id=f"{prompt_id}-{sample}-{attempt}",
        prompt_id=prompt_id,
        cfg="c",
        sample=sample,
        attempt=attempt,
        error=error,
        teacher=Teacher(engine="openai"),
        **({} if error else fields) | more,
    )


def opened_at(folder: Path) -> Ledger:
    folder.mkdir(exist_ok=True)
    return Ledger(folder)


def folder_of(runs: Path) -> Path:
    return runs / "ledger" / cfg_of(SENT)


# --- answers, failures, requests in flight --------------------------------------------------------------------------


def test_an_answer_is_found_again_by_its_prompt_and_sample(tmp_path: Path) -> None:
    with open_ledger(tmp_path, SENT) as ledger:
        for sample in range(3):
            ledger.ask(("a", sample))
            ledger.add(trace("a", sample))
        assert ledger.get(("a", 1)) == trace("a", 1)
    with open_ledger(tmp_path, SENT) as ledger:
        assert [ledger.answered(("a", sample)) for sample in range(4)] == [True, True, True, False]
        assert ledger.get(("a", 2)) == trace("a", 2)
        assert ledger.get(("b", 0)) is None


def test_the_first_answer_of_a_key_stays(tmp_path: Path) -> None:
    with open_ledger(tmp_path, SENT) as ledger:
        ledger.add(trace("a", answer="first"))
        ledger.add(trace("a", answer="second"))
        assert ledger.get(("a", 0)) == trace("a", answer="first")
    path = folder_of(tmp_path) / "answers.jsonl"
    assert len(list(read_records(path, Trace))) == 1
    with path.open("a") as lines:  # as if two ledgers had been put together
        lines.write(trace("a", answer="third").to_line())
    with open_ledger(tmp_path, SENT) as ledger:
        assert ledger.get(("a", 0)) == trace("a", answer="first")


def test_a_failure_is_kept_and_superseded_by_a_success_but_never_the_other_way_round(tmp_path: Path) -> None:
    key = ("a", 0)
    with open_ledger(tmp_path, SENT) as ledger:
        assert ledger.ask(key) == 0
        ledger.add(trace("a", error="500"))
        assert (ledger.failed(key), ledger.answered(key)) == (True, False)
    with open_ledger(tmp_path, SENT) as ledger:
        failure = ledger.get(key)
        assert failure is not None and failure.error == "500"
        assert ledger.ask(key) == 1  # asked before, so this is another attempt
        ledger.add(trace("a", attempt=1))
        ledger.add(trace("a", error="late", attempt=2))
    with open_ledger(tmp_path, SENT) as ledger:
        assert (ledger.failed(key), ledger.answered(key)) == (False, True)
        assert ledger.get(key) == trace("a", attempt=1)


def test_a_request_that_was_in_flight_at_a_kill_is_possibly_paid_until_it_is_answered_or_fails(tmp_path: Path) -> None:
    with open_ledger(tmp_path, SENT) as ledger:
        for name in "abc":
            ledger.ask((name, 0))
        ledger.add(trace("a"))
        ledger.add(trace("b", error="500"))
    with open_ledger(tmp_path, SENT) as ledger:
        assert [ledger.possibly_paid((name, 0)) for name in "abcd"] == [False, False, True, False]
        ledger.ask(("b", 0))  # and killed again
    with open_ledger(tmp_path, SENT) as ledger:
        assert [ledger.possibly_paid((name, 0)) for name in "abc"] == [False, True, True]
        assert ledger.ask(("c", 0)) == 1
        ledger.add(trace("c", attempt=1, error="429"))
        assert not ledger.possibly_paid(("c", 0))


def test_what_was_spent_is_the_same_after_opening_again(tmp_path: Path) -> None:
    with open_ledger(tmp_path, SENT) as ledger:
        ledger.add(trace("a"))
        ledger.add(trace("b", error="500"))
        ledger.add(trace("c", usage=Usage(), raw="x" * 41))
        assert ledger.spent == Spent(answers=2, output_tokens=5 + 11, usd=0.5)
    with open_ledger(tmp_path, SENT) as ledger:
        assert ledger.spent == Spent(answers=2, output_tokens=5 + 11, usd=0.5)


def test_tokens_that_nobody_counted_are_guessed_from_the_text() -> None:
    assert billed_tokens(7, "x" * 400) == 7
    assert billed_tokens(0, "x" * 400) == 100
    assert billed_tokens(0, "") == 0


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with open_ledger(tmp_path, SENT), pytest.raises(RunError, match="being written by process"):
        with open_ledger(tmp_path, SENT):
            pass
    with open_ledger(tmp_path, SENT):
        pass  # the lock went with its holder


def test_the_ledger_says_in_words_what_it_is(tmp_path: Path) -> None:
    with open_ledger(tmp_path, SENT):
        pass
    document = json.loads((folder_of(tmp_path) / "ledger.json").read_text())
    assert document["sent"] == SENT
    assert "r1 through the engine openai" in document["about"]


# --- torn and damaged files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["answers.jsonl", "journal.jsonl"])
def test_a_tail_torn_at_any_byte_costs_at_most_the_last_line(tmp_path: Path, file: str) -> None:
    names = ("first", "zwö", "third")
    whole = opened_at(tmp_path / "whole")
    for name in names:
        whole.ask((name, 0))
        whole.add(trace(name))
    whole.close()
    data = (whole.folder / file).read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    around_ends = [end + by for end in ends for by in (-2, -1, 0, 1)]
    for size in sorted({*range(0, len(data), 23), *around_ends} - {len(data) + 1}):
        torn = tmp_path / f"torn{size}"
        shutil.copytree(whole.folder, torn)
        (torn / file).write_bytes(data[:size])
        complete = data[:size].count(b"\n") if file == "answers.jsonl" else 3
        ledger = opened_at(torn)
        assert [ledger.answered((name, 0)) for name in names] == [index < complete for index in range(3)]
        # an answer that was torn had been journalled, so it is known to be in doubt
        assert ledger.possibly_paid(("third", 0)) == (complete < 3)
        ledger.ask(("fourth", 0))
        ledger.add(trace("fourth"))
        ledger.close()
        ledger = opened_at(torn)
        assert (ledger.get(("fourth", 0)), ledger.damaged_lines) == (trace("fourth"), 0)
        ledger.close()


def test_without_the_repair_a_torn_tail_would_swallow_the_next_answer(tmp_path: Path) -> None:
    with open_ledger(tmp_path, SENT) as ledger:
        ledger.add(trace("a"))
    path = folder_of(tmp_path) / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-10] + (trace("b").to_line() + trace("c").to_line()).encode())
    with open_ledger(tmp_path, SENT) as ledger:
        assert [ledger.answered((name, 0)) for name in "abc"] == [False, False, True]
        assert ledger.damaged_lines == 1


def test_a_damaged_line_in_the_middle_costs_itself_only_and_is_counted(tmp_path: Path) -> None:
    with open_ledger(tmp_path, SENT) as ledger:
        for name in "abc":
            ledger.add(trace(name))
    path = folder_of(tmp_path) / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b"\x00" * (len(lines[1]) - 1) + b"\n"
    path.write_bytes(b"".join(lines))
    with open_ledger(tmp_path, SENT) as ledger:
        assert [ledger.answered((name, 0)) for name in "abc"] == [True, False, True]
        assert ledger.get(("c", 0)) == trace("c")
        assert ledger.damaged_lines == 1


steps = st.lists(
    st.tuples(st.sampled_from(["ask", "answer", "fail", "kill"]), st.sampled_from("abc"), st.integers(0, 1)),
    max_size=30,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_after_any_history_a_ledger_that_is_opened_again_knows_the_same(
    tmp_path: Path, history: list[tuple[str, str, int]]
) -> None:
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    ledger = Ledger(folder)
    keys = [(name, sample) for name in "abc" for sample in (0, 1)]
    attempts: dict[tuple[str, int], int] = {}
    for what, name, sample in history:
        key = (name, sample)
        if what == "ask" and not ledger.answered(key):
            attempts[key] = ledger.ask(key)
        elif what in ("answer", "fail") and key in attempts:
            ledger.add(trace(name, sample, attempts.pop(key), "500" if what == "fail" else None))
        elif what == "kill":
            attempts.clear()
            known = [(ledger.answered(k), ledger.failed(k), ledger.possibly_paid(k), ledger.get(k)) for k in keys]
            ledger.close()
            ledger = Ledger(folder)
            again = [(ledger.answered(k), ledger.failed(k), ledger.possibly_paid(k), ledger.get(k)) for k in keys]
            assert again == known
    ledger.close()


# --- identity -------------------------------------------------------------------------------------------------------


def sent(format: FormatConfig | None = None, roots: dict[str, str] | None = None, **fields: Any) -> str:
    teacher = TeacherConfig(**{"engine": "openai", "model": "r1"} | fields)
    return cfg_of(sent_to_teacher(teacher, format or FormatConfig(), roots or {}, engine_version="1"))


def test_what_is_not_sent_changes_no_ledger() -> None:
    for fields in (
        {"sampling": {"n": 7}},
        {"budget": {"output_tokens": 5}},
        {"prices": {"input_usd_per_mtok": 1, "output_usd_per_mtok": 2}},
        {"endpoint": {"base_url": "http://localhost:1/v1", "concurrency": 3}},
        {"licence": "MIT"},
        {"batch_size": 3},
        {"format": FormatConfig(system="for the student")},
    ):
        assert sent(**fields) == sent()


def test_what_is_sent_changes_the_ledger() -> None:
    changes: list[dict[str, Any]] = [
        {"model": "r2"},
        {"revision": "abc"},
        {"system": "be brief"},
        {"system": ""},
        {"sampling": {"temperature": 0.6}},
        {"sampling": {"top_p": 0.9}},
        {"sampling": {"max_new_tokens": 9}},
        {"sampling": {"seed": 1}},
        {"roots": {"solver": "2"}},
    ]
    assert len({sent(), *(sent(**change) for change in changes)}) == 1 + len(changes)


def test_a_local_engine_also_depends_on_its_batches_and_template_and_not_on_where_the_model_lies() -> None:
    roots = {"model": "sha"}
    here = sent(engine="transformers", model="/here/m", roots=roots)
    assert here == sent(engine="transformers", model="/there/m", roots=roots)
    assert here != sent(engine="transformers", model="/here/m", roots={"model": "other"})
    assert here != sent(engine="transformers", model="/here/m", roots=roots, batch_size=3)
    assert here != sent(engine="transformers", model="/here/m", roots=roots, format=FormatConfig(template="r1"))
