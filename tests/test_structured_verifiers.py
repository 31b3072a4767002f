"""`choice`, `regex` and `json_schema`: verdicts that were worked out by hand, on plain and on hostile answers."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import ChoiceVerifier, JsonSchemaVerifier, RegexVerifier, VerifierSection
from distill.errors import RecipeError
from distill.records import Message, Outcome, Prompt, Teacher, Trace
from distill.verifiers import choice, json_schema, regex, resolve
from distill.verifiers.multiple_choice import chosen, letters_of, option_texts
from distill.verifiers.pool import VerifierPool, check_verifier

AQUA = Path(__file__).resolve().parents[2] / "shared" / "data" / "problems" / "aqua_dev.jsonl"


def prompt(gold: str | None = "B", verifier: str = "choice", **row: Any) -> Prompt:
    return Prompt.of([Message(role="user", content="Which?")], gold=gold, verifier=verifier, row=row)


def trace(answer: str, **fields: object) -> Trace:
    values = {"trace_id": "t", "prompt_id": "p", "cfg": "c", "sample": 0, "teacher": Teacher(engine="test")}
    return Trace.model_validate({**values, "answer": answer, **fields})


# --- choice ---------------------------------------------------------------------------------------------------------

LETTERS: dict[str, str | None] = {
    "B": "B", "b": "B", "(B)": "B", "B)": "B", "B.": "B", "[B]": "B", "**B**": "B", "$B$": "B", r"\text{(B)}": "B",
    "Option B": "B", "choice (b)": "B", "AC": "AC", "A, C": "AC", "A and C": "AC", "(A) & (C)": "AC", "A; C": "AC",
    "(A), (B), and (C)": "ABC", "": None, "K": None, "AA": None, "Bob": None, "21": None, "A train": None,
    "not B": None,
}  # fmt: skip


@pytest.mark.parametrize("text", LETTERS)
def test_a_short_text_is_read_as_the_letters_it_consists_of(text: str) -> None:
    expected = LETTERS[text]
    assert letters_of(text) == (None if expected is None else frozenset(expected))


OPTIONS = ["A)21 km", "B)32", "C)45 m", "D)a dog", "E)none of these"]
CHOSEN: dict[str, str | None] = {
    # boxes
    r"So it is \boxed{B}.": "B", r"\boxed{\text{(B)}}": "B", r"\boxed{B) 32}": "B", r"\boxed{32}": "B",
    r"\boxed{33}": "", r"\boxed{A}, no: \boxed{C}": "C", r"Answer: A. \boxed{C}": "C",
    r"\boxed{\textbf{(C)}\ 45 m}": "C", r"\boxed{A, B}": "AB", r"\boxed{C) 32}": "",
    # statements
    "Answer: B": "B", "**Answer: B**": "B", "Answer: **B) 32**": "B", "The answer is (b).": "B", "the answer is b": "B",
    "The answer is option B.": "B", "Therefore, **the correct answer is C) 45 m**.": "C", "ANSWER:D": "D",
    "Ans - C": "C",
    "The correct choice is: E": "E", "Correct Option: A": "A", "Answer = B": "B", "The answer is clearly B!": "B",
    "C is the correct answer.": "C", "So A is correct": "A", "E is the answer.": "E", "We choose option (D).": "D",
    "Hence A.": "A", "so it's (A)": "A", "The answer must be B": "B", "Hence answer will be A. 5 km": "A",
    # the last decisive one
    "First I thought the answer is A. But the answer is C.": "C", "Answer: B\nBecause option A is wrong.": "B",
    "Option A is wrong. Option B is too small. Option C is right.": "C", "The answer is not B, so it is C.": "C",
    "Options A and B are wrong, so the answer is C": "C", "B is incorrect; C is the answer": "C",
    "final answer: B. Let me double-check: A is wrong": "B", "Answer: A\nWait.\nB": "B",
    # more than one
    "The correct answer is A and B": "AB", "The answer is B or C": "BC", "Answer: A, C": "AC", "A and B": "AB",
    # last lines
    "B": "B", "**B**": "B", "B)": "B", "Option B": "B", "Thinking.\n\nB. 32": "B", "Final answer\n\nC": "C",
    "Answer:\n\n**(D) a dog**": "D", "a dog": "D", "The answer is 32.": "B", "The answer is A dog": "D",
    "The answer is none of these.": "E", "Look at option A.\nThat leaves option C.": "C",
    # no choice
    "no idea": None, "Answer: X": None, "Answer: I think so": None, "A dog is an animal.": None,
    "32 is what I get": None, "The answer is not B.": None, "Answer: J": None, "A) 32": None, "I is a letter": None,
    "Plan B failed, plan A too": None,
}  # fmt: skip


@pytest.mark.parametrize("answer", CHOSEN)
def test_an_answer_settles_on_the_letters_that_a_reader_would_take(answer: str) -> None:
    texts = option_texts({"options": OPTIONS})
    found = chosen(answer, frozenset(texts), texts)
    expected = CHOSEN[answer]
    assert (found and found.letters) == (None if expected is None else frozenset(expected)), found


@pytest.mark.parametrize(
    ("gold", "answer", "outcome", "detail"),
    [
        ("B", "Answer: B", "correct", "stated 'Answer: B'"),
        ("b", "Answer: B", "correct", ""),
        ("(B)", "Answer: C", "wrong", "stated 'Answer: C'"),
        ("B", "A and B", "wrong", "last line 'A and B'"),
        ("B", "no idea", "wrong", "no letter"),
        ("B", r"\boxed{7}", "wrong", "boxed '7'"),
        ("AC", "Answer: C and A", "correct", ""),
        ("A, C", "Answer: A", "wrong", ""),
        ("32", "Answer: B", "unverifiable", "the reference '32' is none of the letters A, B, C"),
        ("K", "Answer: K", "unverifiable", ""),
        (None, "Answer: B", "unverifiable", "the prompt has no reference answer"),
        ("B", "", "wrong", "no answer (reasoning absent)"),
    ],
)
def test_choices_are_compared_as_sets_of_letters(gold: str | None, answer: str, outcome: Outcome, detail: str) -> None:
    verdict = choice(prompt(gold), trace(answer))
    assert verdict.outcome == outcome and detail in verdict.detail
    assert verdict.verifier == "choice@1"


def test_letters_that_are_no_options_are_text() -> None:
    few = ChoiceVerifier(letters="AB")
    assert choice(prompt("A"), trace("Answer: A. The answer C is out."), few).correct
    assert choice(prompt("C"), trace("Answer: C"), few).outcome == "unverifiable"
    by_row = prompt("A", options=["yes", "no"])
    assert choice(by_row, trace("Answer: A. The answer C is out.")).correct
    assert not choice(prompt("A"), trace("Answer: A. The answer C is out.")).correct, "control"


@pytest.mark.parametrize(
    "row",
    [
        {"options": ["A)21 km", "B)32"]}, {"options": ["21 km", "32"]}, {"choices": {"A": "21 km", "B": "32"}},
        {"choices": {"text": ["21 km", "32"], "label": ["A", "B"]}}, {"choices": {"text": ["21 km", "32"]}},
        {"options": None, "choices": ["(a) 21 km", "(b) 32"]},
    ],
)  # fmt: skip
def test_options_are_read_in_every_form_that_data_sets_have(row: dict[str, Any]) -> None:
    assert option_texts(row) == {"A": "21 km", "B": "32"}
    assert choice(prompt("A", **row), trace("It is 21 km.\n\n21 km")).correct


def test_rows_without_options_have_none() -> None:
    for row in ({}, {"options": 3}, {"choices": {"x1": "y"}}, {"options": []}):
        assert option_texts(row) == {}


@pytest.mark.parametrize(
    "unit",
    ["A, ", "A and ", "answer: ", "answer ", "answer::: ", "A is ", "(A", "(", "**", r"\text{", r"\boxed{", "is the ",
     "option ", "Answer: A", "A ", "hence ", "I ", "a) ", " ", "\n", "the answer is not ", "choose the option "],
)  # fmt: skip
def test_choices_are_read_in_time_linear_in_hostile_text(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    started = time.perf_counter()
    for shape in (text, f"{text}B", text.replace(" ", "\n")):
        choice(prompt("B", options=OPTIONS), trace(f"x{shape}"))
    assert time.perf_counter() - started < 10.0, "a quadratic pattern would take minutes"


@given(st.text(alphabet=st.sampled_from("ABCabc ()[].:,*\n$\\{}answeriot"), max_size=120))
def test_reading_a_choice_never_raises_and_names_options_only(text: str) -> None:
    found = chosen(text, frozenset("AB"), {"A": "1", "B": "2"})
    assert found is None or found.letters <= frozenset("AB")


@pytest.mark.skipif(not AQUA.exists(), reason="no AQuA beside the checkout (shared/data)")
def test_the_letters_that_people_settled_on_are_read_from_real_rationales() -> None:
    rows = [json.loads(line) for line in AQUA.read_text(encoding="utf-8").splitlines()]
    read = []
    for row in rows:
        texts = option_texts(row)
        if found := chosen(row["rationale"], frozenset(texts), texts):
            read.append((found.letters, frozenset(row["correct"])))
    assert [pair for pair in read if pair[0] != pair[1]] == []
    # the others name a value and no letter
    assert len(rows) == 254 and len(read) >= 238


# --- regex ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "full", "answer", "outcome", "detail"),
    [
        (r"\d{4}-\d\d", True, "2024-05", "correct", "full match"),
        (r"\d{4}-\d\d", True, r"It is \boxed{2024-05}.", "correct", ""),
        (r"\d{4}-\d\d", True, "It is\n2024-05", "correct", ""),
        (r"\d{4}-\d\d", True, "The answer is 2024-05", "correct", ""),
        (r"\d{4}-\d\d", True, "2024-05 or so", "wrong", "no full match: answer '2024-05 or so'"),
        (r"\d{4}-\d\d", False, "2024-05 or so", "correct", "found '2024-05'"),
        (r"\d{4}-\d\d", False, "May", "wrong", "no match"),
        (r"(?i)yes|no", True, "YES", "correct", ""),
        (r"(?s)a.*b", True, "a\n\nb", "correct", ""),
    ],
)
def test_a_pattern_is_matched(pattern: str, full: bool, answer: str, outcome: Outcome, detail: str) -> None:
    verdict = regex(prompt(None), trace(answer), RegexVerifier(pattern=pattern, full=full))
    assert verdict.outcome == outcome and detail in verdict.detail


def test_without_a_pattern_the_reference_is_one() -> None:
    assert regex(prompt("colou?r"), trace("color")).correct
    assert regex(prompt("colou?r"), trace("colr")).outcome == "wrong"
    assert regex(prompt(None), trace("color")).outcome == "unverifiable"
    broken = regex(prompt("colou(r"), trace("color"))
    assert broken.outcome == "unverifiable" and "is no regular expression: missing )" in broken.detail


def test_a_pattern_that_backtracks_for_ever_is_a_timeout() -> None:
    spec = resolve(VerifierSection(regex=RegexVerifier(pattern="(a+)+$")))
    assert not spec.light
    judged = prompt(None).model_copy(update={"source": "s"})
    with VerifierPool(workers=1, timeout_s=2, by_source={"s": spec}) as pool:
        verdicts = list(pool.verify_many([(judged, trace("a" * 60 + "b")), (judged, trace("aaa"))]))
    assert [verdict.outcome for verdict in verdicts] == ["timeout", "correct"]


# --- json_schema ----------------------------------------------------------------------------------------------------

SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["name", "tags"],
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}}},
    "$defs": {"tag": {"type": "string", "minLength": 2}},
}


def schema_file(folder: Path, schema: Any, name: str = "schema.json") -> JsonSchemaVerifier:
    (folder / name).write_text(schema if isinstance(schema, str) else json.dumps(schema))
    return JsonSchemaVerifier(file=folder / name)


@pytest.mark.parametrize(
    ("answer", "outcome", "detail"),
    [
        ('{"name": "x", "tags": ["ab"]}', "correct", "satisfies the schema"),
        ('Here:\n```json\n{"name": "x", "tags": []}\n```\nDone.', "correct", ""),
        ('```\n{"name": "x", "tags": []}\n```', "correct", ""),
        ('```json\n{"name": 1}\n```\nNo:\n```json\n{"name": "x", "tags": []}\n```', "correct", ""),
        ('```json\n{"name": "x", "tags": []}\n```\n```python\nprint(1)\n```', "correct", ""),
        ('{"name": "x", "tags": ["a"]}', "wrong", "$.tags[0]: 'a' is too short"),
        ('{"name": "x"}', "wrong", "'tags' is a required property"),
        ("null", "wrong", "None is not of type 'object'"),
        ("It is x.", "wrong", "no JSON in the answer"),
        ('{"name": NaN}', "wrong", "no JSON"),
        ("[" * 100_000, "wrong", "no JSON"),
    ],
)
def test_an_answers_json_must_satisfy_the_schema(tmp_path: Path, answer: str, outcome: Outcome, detail: str) -> None:
    verdict = json_schema(prompt(None), trace(answer), schema_file(tmp_path, SCHEMA))
    assert verdict.outcome == outcome and detail in verdict.detail, verdict


def test_a_schema_counts_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    here, there = schema_file(tmp_path, SCHEMA), schema_file(tmp_path / "elsewhere", SCHEMA)
    label = resolve(VerifierSection(json_schema=here)).label
    assert label == resolve(VerifierSection(json_schema=there)).label
    assert label.startswith("json_schema@1+jsonschema-")
    spec = resolve(VerifierSection(json_schema=here))
    schema_file(tmp_path, {"type": "string"})
    assert resolve(VerifierSection(json_schema=here)).label != label
    with pytest.raises(RecipeError, match="was changed while the run was using it"):
        spec.load()


UNUSABLE: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not JSON"),
    "no schema": ({"type": "objekt"}, r"'objekt' is not valid under any of the given schemas"),
    "another draft": (
        {"$schema": "http://json-schema.org/draft-07/schema#"},
        "only https://json-schema.org/draft/2020",
    ),
    "a remote reference": ({"$ref": "https://example.com/s.json"}, "nothing is fetched, so put it under"),
    "a file reference": ({"items": {"$ref": "other.json#/x"}}, "'other.json#/x' is not in the file"),
    "a broken reference": ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "'#/[$]defs/none' is not in the file"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_schema_that_cannot_be_used_is_refused_before_the_run(tmp_path: Path, case: str) -> None:
    schema, message = UNUSABLE[case]
    spec = resolve(VerifierSection(json_schema=schema_file(tmp_path, schema)))
    with pytest.raises(RecipeError, match=message) as caught:
        check_verifier(spec, prompt(None))
    assert str(tmp_path / "schema.json") in str(caught.value)


def test_references_inside_a_schema_are_followed_and_data_that_looks_like_one_is_not(tmp_path: Path) -> None:
    inner = {"$id": "https://example.com/inner", "$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n"}
    schema = {"properties": {"a": inner, "$ref": {"enum": [{"$ref": "https://example.com/data"}]}}}
    options = schema_file(tmp_path, schema)
    check_verifier(resolve(VerifierSection(json_schema=options)), prompt(None))
    assert json_schema(prompt(None), trace('{"a": 1}'), options).correct
    assert json_schema(prompt(None), trace('{"a": "1"}'), options).outcome == "wrong"


def test_a_missing_schema_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.json: No such file or directory; give a JSON file"):
        resolve(VerifierSection(json_schema=JsonSchemaVerifier(file=tmp_path / "none.json")))
