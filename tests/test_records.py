"""Records: what is written comes back, and a file that was torn at any byte is mended to its whole lines."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.errors import DataError
from distill.records import (
    Example,
    Flag,
    Item,
    Message,
    Prompt,
    Record,
    RecordLog,
    Teacher,
    Trace,
    Usage,
    Verdict,
    digest_json,
    prompt_id_of,
    read_records,
    repair_tail,
    write_records,
)

TEXT = st.text(max_size=40)
TOKENS = st.integers(min_value=0, max_value=10**6)
VALUES = TEXT | st.integers() | st.booleans() | st.none() | st.lists(TEXT, max_size=2)
MESSAGES = st.lists(st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=TEXT), max_size=3)
PROMPTS = st.builds(
    Prompt.of, MESSAGES, gold=st.none() | TEXT, verifier=TEXT, source=TEXT, licence=st.none() | TEXT,
    row=st.dictionaries(TEXT, VALUES, max_size=2),
)  # fmt: skip
TRACES = st.builds(
    Trace, trace_id=TEXT, prompt_id=TEXT, cfg=TEXT, sample=TOKENS, attempt=TOKENS, reasoning=st.none() | TEXT,
    answer=TEXT, raw=TEXT, think=st.sampled_from(["closed", "unclosed", "absent", "empty", "multiple"]),
    finish_reason=st.sampled_from(["stop", "length", "error", "unknown"]),
    usage=st.builds(Usage, input=TOKENS, output=TOKENS, reasoning=st.none() | TOKENS),
    cost_usd=st.floats(min_value=0, max_value=1e6), latency_s=st.floats(min_value=0, max_value=1e6),
    teacher=st.builds(Teacher, engine=TEXT, model=TEXT, revision=st.none() | TEXT),
    sampling=st.dictionaries(TEXT, st.integers() | TEXT, max_size=2),
    token_ids=st.none() | st.lists(TOKENS, max_size=4).map(tuple), error=st.none() | TEXT, timestamp=TEXT,
)  # fmt: skip
VERDICTS = st.builds(
    Verdict, trace_id=TEXT, gold=st.none() | TEXT, verifier=TEXT, detail=TEXT,
    outcome=st.sampled_from(["correct", "wrong", "unverifiable", "timeout", "error"]),
)  # fmt: skip
RECORDS = st.one_of(
    PROMPTS,
    TRACES,
    VERDICTS,
    st.builds(Flag, trace_id=TEXT, flag=TEXT, detail=TEXT),
    st.builds(Example, prompt=PROMPTS, trace_id=TEXT, reasoning=st.none() | TEXT, answer=TEXT),
    st.builds(Item, model=TEXT, set=TEXT, prompt=PROMPTS, trace=TRACES, verdict=VERDICTS),
)


def flags(*names: str) -> list[Flag]:
    return [Flag(trace_id=f"t{index}", flag=name, detail="größer – 大") for index, name in enumerate(names)]


def trace(**changes: object) -> Trace:
    fields: dict[str, object] = {
        "trace_id": "t",
        "prompt_id": "p",
        "cfg": "c",
        "sample": 0,
        "teacher": Teacher(engine="e"),
    }
    return Trace.model_validate({**fields, **changes})


# --- round trips ----------------------------------------------------------------------------------------------------


@given(RECORDS)
def test_every_record_comes_back_from_its_line(record: Record) -> None:
    line = record.to_line()
    assert line.endswith("\n") and "\n" not in line[:-1]
    assert type(record).model_validate_json(line) == record
    assert json.loads(line)["schema"] == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TRACES, max_size=4))
def test_a_file_of_records_comes_back_in_order(tmp_path: Path, records: list[Trace]) -> None:
    assert write_records(tmp_path / "traces.jsonl", records) == len(records)
    assert list(read_records(tmp_path / "traces.jsonl", Trace)) == records
    assert [path.name for path in tmp_path.iterdir()] == ["traces.jsonl"], "nothing written aside is left"


def test_an_unknown_key_or_schema_is_refused_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "flags.jsonl"
    good = flags("a")[0].to_line()
    path.write_text(good + good.replace('"flag"', '"flga"'))
    with pytest.raises(DataError, match=r"flags\.jsonl:2: not a Flag record: flag: Field required"):
        list(read_records(path, Flag))
    path.write_text(good.replace('"schema":1', '"schema":2'))
    with pytest.raises(DataError, match=r"flags\.jsonl:1: not a Flag record: schema"):
        list(read_records(path, Flag))


def test_records_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        trace().answer = "another"  # type: ignore[misc]


# --- identity -------------------------------------------------------------------------------------------------------


def test_a_prompt_id_is_the_hash_of_its_normalised_messages() -> None:
    # written out by hand: canonical JSON of [[role, text]], sha256, first 16 digits
    by_hand = hashlib.sha256(b'[["user","1 + 1 = ?"]]').hexdigest()[:16]
    assert prompt_id_of([Message(role="user", content="1 + 1 = ?")]) == by_hand
    assert prompt_id_of([Message(role="user", content="  1 +\n1 =\t? ")]) == by_hand


def test_two_spellings_of_one_character_give_one_prompt() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert composed != decomposed
    ids = {prompt_id_of([Message(role="user", content=text)]) for text in (composed, decomposed, "cafe")}
    assert len(ids) == 2


def test_gold_and_verifier_are_no_part_of_a_prompts_identity_but_the_role_is() -> None:
    asked = [Message(role="user", content="q")]
    assert Prompt.of(asked, gold="1").prompt_id == Prompt.of(asked, gold="2", verifier="math").prompt_id
    assert Prompt.of(asked).prompt_id != Prompt.of([Message(role="system", content="q")]).prompt_id


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest_json({"b": [1, "é"], "a": None}) == digest_json({"a": None, "b": [1, "é"]})
    assert digest_json({"a": None, "b": [1, "é"]}) == hashlib.sha256('{"a":null,"b":[1,"é"]}'.encode()).hexdigest()
    assert digest_json([1, 2]) != digest_json([2, 1])


def test_the_result_of_a_trace_leaves_out_what_a_kill_may_change() -> None:
    first = trace(answer="4", timestamp="2025-01-01", latency_s=1.0, cost_usd=0.1, attempt=0)
    again = trace(answer="4", timestamp="2026-01-01", latency_s=2.0, cost_usd=0.2, attempt=3)
    assert first != again and first.result == again.result
    assert first.result != trace(answer="5").result


def test_derived_values_say_whether_a_trace_failed_and_a_verdict_is_correct() -> None:
    assert trace(error="HTTP 500").failed and not trace().failed
    outcomes = ["correct", "wrong", "unverifiable", "timeout", "error"]
    verdicts = [Verdict.model_validate({"trace_id": "t", "gold": "1", "verifier": "v", "outcome": o}) for o in outcomes]
    assert [verdict.correct for verdict in verdicts] == [True, False, False, False, False]


# --- torn files -----------------------------------------------------------------------------------------------------


def test_a_file_torn_at_any_byte_is_mended_to_its_whole_lines(tmp_path: Path) -> None:
    records = flags("one", "two", "three")
    lines = [record.to_line().encode() for record in records]
    whole = b"".join(lines)
    ends = [len(b"".join(lines[:count])) for count in range(len(lines) + 1)]
    path = tmp_path / "flags.jsonl"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        expected = max(end for end in ends if end <= size)
        assert repair_tail(path) == size - expected, f"torn at byte {size}"
        assert path.read_bytes() == whole[:expected]
        assert list(read_records(path, Flag)) == records[: ends.index(expected)]


def test_a_log_torn_at_any_byte_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    records = flags("one", "two", "three")
    whole = "".join(record.to_line() for record in records).encode()
    path = tmp_path / "flags.jsonl"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with RecordLog(path) as log:
            log.append(*records[len(list(read_records(path, Flag))) :])
        assert path.read_bytes() == whole, f"torn at byte {size}"


def test_mending_reads_lines_longer_than_its_block(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    short, long = flags("short")[0].to_line(), Flag(trace_id="t", flag="x" * 200_000).to_line()
    path.write_text(short + long)
    assert repair_tail(path) == 0
    path.write_text(short + long[:-10])
    assert repair_tail(path) == len(long) - 10
    assert path.read_text() == short


def test_a_last_line_of_zeros_as_a_crashed_disk_leaves_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "flags.jsonl"
    line = flags("one")[0].to_line().encode()
    path.write_bytes(line + b"\0" * 64 + b"\n")
    assert repair_tail(path) == 65
    assert path.read_bytes() == line


def test_a_file_that_is_whole_absent_or_empty_is_left_alone(tmp_path: Path) -> None:
    assert repair_tail(tmp_path / "absent.jsonl") == 0
    assert not (tmp_path / "absent.jsonl").exists()
    path = tmp_path / "flags.jsonl"
    path.write_bytes(b"")
    assert repair_tail(path) == 0
    write_records(path, flags("one", "two"))
    before = path.read_bytes()
    assert repair_tail(path) == 0 and path.read_bytes() == before


def test_appended_records_are_in_the_file_before_the_log_is_closed(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "flags.jsonl")
    log.append(*flags("one"))
    assert list(read_records(tmp_path / "flags.jsonl", Flag)) == flags("one"), "a kill now would lose nothing"
    log.close()


def test_a_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "flags.jsonl"
    write_records(path, flags("former"))

    def failing() -> object:
        yield flags("new")[0]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_records(path, failing())  # type: ignore[arg-type]
    assert list(read_records(path, Flag)) == flags("former")
