"""Decontamination: problems of evaluation sets are found where they stand, however they are laid out, and no others."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distill.errors import RecipeError
from distill.records import Message, Prompt
from distill.teachers.decontamination import STOCK, Decontaminator, Hit, problem_text, tokenize

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

TRAIN = "A train leaves Ghent at 7 and reaches Lille two hours later; how fast did it go if the towns are 74 km apart?"
FORMULA = r"Let $f(x) = \frac{3x^2 - 7x}{x + 5}$. Evaluate $f(11)$."


def prompt(text: str, **fields: Any) -> Prompt:
    return Prompt.of([Message(role="user", content=text)], **fields)


def against(*problems: str, **parameters: Any) -> Decontaminator:
    decontaminator = Decontaminator(**parameters)
    for problem in problems:
        decontaminator.add("exam", prompt(problem))
    return decontaminator


def only_hit(decontaminator: Decontaminator, text: str) -> Hit:
    (hit,) = decontaminator.hits(text)
    assert hit == decontaminator.hit(text)
    assert text[hit.start : hit.end] == hit.span
    return hit


# --- n-grams --------------------------------------------------------------------------------------------------------


def test_the_span_is_the_matched_part_as_it_stands_in_the_text() -> None:
    text = "Warm-up.  A TRAIN leaves Ghent at 7 and  reaches Lille two\nhours later. When did it pass Kortrijk?"
    hit = only_hit(against(TRAIN), text)
    assert hit.span == "A TRAIN leaves Ghent at 7 and  reaches Lille two\nhours later"
    assert (hit.start, hit.rule, hit.set, hit.prompt_id) == (10, "8-gram", "exam", prompt(TRAIN).prompt_id)


def test_seven_words_in_common_are_no_hit_and_eight_are() -> None:
    assert against(TRAIN).hit("Yesterday a train leaves Ghent at 7 and then stops.") is None
    assert only_hit(against(TRAIN), "Yesterday a train leaves Ghent at 7 and reaches its end.").rule == "8-gram"


def test_formulas_are_met_by_their_symbols_from_thirteen_tokens_on() -> None:
    text = r"Where does $g(x) = \frac{3x^2 - 7x}{x + 4}$ vanish?"
    hit = only_hit(against(FORMULA), text)
    assert hit.rule == "13-gram"
    assert hit.span == r"(x) = \frac{3x^2 - 7x}{x +"
    assert against(FORMULA).hit(r"Where does $h(t) = \frac{3t^2 - 7t}{t + 4}$ vanish?") is None


def test_short_ngrams_count_symbols_if_asked_to() -> None:
    text = r"Is $(x) = \frac{3x$ a formula?"
    assert against(FORMULA).hit(text) is None
    assert only_hit(against(FORMULA, symbols_from=4), text).span == r"(x) = \frac{3x"


@pytest.mark.parametrize(
    "text",
    [
        r"Let \( f(x) = \dfrac{ 3x^2-7x }{ x+5 } \). Evaluate \( f\left(11\right) \).",
        r"let \[f(x)=\tfrac{3x^2-7x}{x+5}.\] evaluate $$f(11)$$",
        r"Let $f(x)\;=\;\displaystyle\frac{3x^2 \,-\, 7x}{x~+~5}$. Evaluate $f\!\bigl(11\bigr)$.",
        "Let $f(x) = \\frac{3x^2 \u2212 7x}{x + 5}$. \n\n Evaluate\u00a0$f(11)$.",
    ],
)
def test_the_layout_of_latex_makes_no_difference(text: str) -> None:
    assert only_hit(against(FORMULA), text).rule == "exact"


def test_a_backslash_before_a_bracket_is_layout_only_where_latex_has_it_so() -> None:
    assert tokenize(r"\(1\) \[2\]").texts == ["1", "2"]
    assert tokenize(r"1 \\[2pt] 3").texts == ["1", "\\", "\\", "[", "2", "pt", "]", "3"]
    assert tokenize(r"\left\{ \$24,\!000 = 1{,}000 \rightarrow 5\%").texts == [
        "\\", "{", "24000", "=", "1000", "\\", "rightarrow", "5", "%",
    ]  # fmt: skip


def test_offsets_are_right_where_unicode_forms_change_the_length() -> None:
    problem = "Find the office that is ½ a mile from the café where Zoë first met Straßer"
    text = "①② ﬁnd the ofﬁce that is ½ a mile from the cafe\u0301 where ZOË ﬁrst met STRASSER ☕ ok?"
    hit = only_hit(against(problem), text)
    assert hit.span == "ﬁnd the ofﬁce that is ½ a mile from the cafe\u0301 where ZOË ﬁrst met STRASSER"
    assert tokenize("x² ½ １２").texts == ["x", "2", "1", "⁄", "2", "12"]


def test_characters_of_scripts_without_spaces_count_as_symbols() -> None:
    problem = "已知函数的图像经过原点并且在第一象限内单调递增求它的最小值"
    assert only_hit(against(problem), "设" + problem[:13] + "。").rule == "13-gram"
    assert against(problem).hit("设" + problem[:12] + "。") is None


def test_hits_are_sorted_whole_problems_first_then_long_spans() -> None:
    whole, long, short = (
        "How old is Eve?",
        TRAIN,
        "Eve saw that a train leaves Ghent at 7 and reaches Calais, then slept.",
    )
    found = against(whole, long, short).hits(f"How old is Eve? {TRAIN[:60]}")
    assert [hit.prompt_id for hit in found] == [prompt(text).prompt_id for text in (whole, long, short)]
    assert [hit.rule for hit in found] == ["exact", "13-gram", "8-gram"]


def test_a_problem_in_two_sets_is_met_in_both() -> None:
    decontaminator = Decontaminator()
    for name in ("monday", "friday"):
        decontaminator.add(name, prompt(TRAIN))
    assert [hit.set for hit in decontaminator.hits(TRAIN)] == ["friday", "monday"]


def test_the_detail_is_one_line_and_not_endless() -> None:
    hit = Hit("exam", "1a2b", "two\nlines", "13-gram", 0, 9)
    assert hit.detail() == 'exam 1a2b: 13-gram "two lines"'
    assert len(hit._replace(span="word " * 1000).detail()) < 200


def test_problems_added_later_are_met_too() -> None:
    decontaminator = against("How old is Eve?")
    assert decontaminator.hit(TRAIN) is None
    decontaminator.add("exam", prompt(TRAIN))
    assert decontaminator.hit(TRAIN) is not None


def test_without_problems_or_tokens_nothing_is_met() -> None:
    assert Decontaminator().hit(TRAIN) is None
    assert against("", " $ ").hits("") == against("", " $ ").hits("$ $") == []


def test_ngrams_that_meet_every_text_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"n-grams of 3 tokens .* from 4"):
        Decontaminator(ngrams=(3, 13))


# --- whole problems -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "What is 5 + 3?",
        "what is $5+3$",
        "Answer in one word.\nWhat is 5 + 3 ?\nThink first.",
        "Problem: What is 5 + 3?",
        "Be brief! What is 5+3? Put the number in a box.",
    ],
)
def test_a_short_problem_is_met_where_it_stands_whole(text: str) -> None:
    hit = only_hit(against("What is 5 + 3?"), text)
    assert hit.rule == "exact"
    assert hit.span.lower().startswith("what is")
    assert hit.span.rstrip("$").endswith("3")


@pytest.mark.parametrize("text", ["What is 5 + 3.7?", "What is 5 + 3 + 4?", "Say what is 5 + 3?", "What is 5 - 3?"])
def test_a_short_problem_that_is_part_of_another_is_not_met(text: str) -> None:
    assert against("What is 5 + 3?").hit(text) is None


def test_a_problem_of_one_word_is_met_only_as_the_whole_text() -> None:
    assert against("Why?").hit("Why?") is not None
    assert against("Why?").hit("Ann left. Why? Explain.") is None


def test_without_ngrams_only_whole_problems_are_met() -> None:
    whole_only = against(TRAIN, ngrams=())
    assert only_hit(whole_only, f"Please answer.\n{TRAIN}").rule == "exact"
    assert whole_only.hit(TRAIN.replace("74", "75")) is None
    assert against(TRAIN).hit(TRAIN.replace("74", "75")) is not None


# --- what is no evidence --------------------------------------------------------------------------------------------


def templated(count: int, of: int) -> list[str]:
    """Problems of one template, with numbers and names that do not come again in another `of`."""
    return [
        f"State the final answer to the following arithmetic problem, and nothing else: {of + n} + {2 * of + n} ="
        for n in range(count)
    ]


def test_problems_of_one_template_do_not_meet_each_other() -> None:
    exam, training = templated(200, of=1000), templated(50, of=5000)
    decontaminator = against(*exam)
    assert all(decontaminator.hit(text) is None for text in training)
    by_wording = against(*exam, stock=STOCK._replace(problems=1000))
    assert all(by_wording.hit(text) is not None for text in training), "the control: the wording alone would meet them"


def test_a_problem_of_stock_phrases_only_is_still_met_as_a_whole() -> None:
    exam = templated(200, of=1000)
    assert only_hit(against(*exam), f"Hello.\n{exam[17]}\n").rule == "exact"


def test_the_same_problem_many_times_is_no_stock_phrase() -> None:
    decontaminator = Decontaminator()
    for n in range(100):
        decontaminator.add("exam", prompt(TRAIN, source=f"copy {n}", row={"question": TRAIN + " " * n}))
    assert decontaminator.hit(f"Note: {TRAIN[:70]}") is not None


def test_an_instruction_that_all_prompts_end_in_is_no_part_of_the_problem() -> None:
    instruction = "Please reason step by step, and put your final answer within a box at the very end."
    asked = prompt(
        f"How many eggs do 7 hens lay in a week?\n{instruction}", row={"question": "How many eggs do 7 hens lay?"}
    )
    decontaminator = Decontaminator()
    decontaminator.add("exam", asked)
    assert decontaminator.hit(f"Name a prime above 90.\n{instruction}") is None
    assert problem_text(prompt("Hi.")) == "Hi."
    assert against(asked.text).hit(f"Name a prime above 90.\n{instruction}") is not None, "the control"


# --- properties -----------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    ["the", "of", "7", "12", "+", "=", r"\frac", "{", "}", "$", ".", "?", "\n", "x", "é", "是", "½", "🎉"]
)
TEXTS = st.one_of(
    st.text(max_size=80), st.lists(PIECES, max_size=40).map(" ".join), st.lists(PIECES, max_size=40).map("".join)
)


@given(TEXTS, st.lists(TEXTS, max_size=20))
def test_a_problem_is_always_met_by_itself(problem: str, others: list[str]) -> None:
    assume(tokenize(problem).texts)
    hits = against(*others, problem).hits(problem)
    mine = [hit for hit in hits if hit.prompt_id == prompt(problem).prompt_id]
    assert mine[0].rule == "exact"
    assert all(problem[hit.start : hit.end] == hit.span for hit in hits)


@given(st.lists(TEXTS, min_size=1, max_size=8), st.randoms(use_true_random=False), TEXTS)
def test_the_order_of_problems_is_of_no_account(problems: list[str], random: Any, text: str) -> None:
    examined = " ".join([*problems[:2], text])
    shuffled = random.sample(problems, len(problems))
    assert against(*problems).hits(examined) == against(*shuffled).hits(examined)


@given(TEXTS)
def test_tokens_lie_in_order_inside_the_text(text: str) -> None:
    tokens = tokenize(text)
    assert tokens.starts == sorted(tokens.starts)
    assert all(0 <= start < end <= len(text) for start, end in zip(tokens.starts, tokens.ends))
    assert all(tokens.texts)


def test_hits_are_the_same_in_every_process() -> None:
    program = (
        "from distill.records import Message, Prompt\n"
        "from distill.teachers.decontamination import Decontaminator\n"
        "d = Decontaminator()\n"
        "for n in range(10):\n"
        "    text = f'A train leaves Ghent at {n % 7} and reaches Lille two hours later, in {n}'\n"
        "    d.add('exam', Prompt.of([Message(role='user', content=text)]))\n"
        "print(d.hits('A train leaves Ghent at 3 and reaches Lille two hours later'))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert b"Hit(" in outputs.pop()


# --- labelled pairs -------------------------------------------------------------------------------------------------

labelled = pytest.mark.skipif(not SHARED.exists(), reason="no labelled pairs beside the checkout (shared/data)")


def lines(path: str) -> list[Any]:
    return [json.loads(line) for line in (SHARED / path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """(problem of MATH-500, training row that overlaps it)."""
    rows = lines("contamination/openthoughts_lexical_pairs.jsonl")
    return [(row["math500_problem"], row["train_problem"]) for row in rows]


def met(problems: Iterable[str], rows: Iterable[str]) -> Iterator[tuple[int, int, Hit]]:
    """Each problem that each row meets, by their numbers."""
    problems = list(problems)
    number = {prompt(text).prompt_id: at for at, text in enumerate(problems)}
    decontaminator = against(*problems)
    for row, text in enumerate(rows):
        for hit in decontaminator.hits(text):
            assert text[hit.start : hit.end] == hit.span
            assert len(tokenize(hit.span).texts) >= 8
            yield number[hit.prompt_id], row, hit


@labelled
def test_labelled_pairs_are_met_and_mismatched_ones_are_not(pairs: list[tuple[str, str]]) -> None:
    hits = list(met([problem for problem, _ in pairs], [row for _, row in pairs]))
    right = sum(problem == row for problem, row, _ in hits)
    assert right / len(pairs) >= 0.95
    assert (len(hits) - right) / (len(pairs) * (len(pairs) - 1)) <= 0.015


@labelled
def test_labelled_pairs_are_met_one_by_one_where_nothing_is_known_of_the_set(pairs: list[tuple[str, str]]) -> None:
    found = wrong = 0
    for at, (problem, _) in enumerate(pairs):
        alone = against(problem)
        rows = {row for row, (_, text) in enumerate(pairs) if alone.hit(text)}
        found += at in rows
        wrong += len(rows - {at})
    assert found / len(pairs) >= 0.95
    assert wrong / (len(pairs) * (len(pairs) - 1)) <= 0.015


@labelled
def test_plain_word_ngrams_miss_many_labelled_pairs(pairs: list[tuple[str, str]]) -> None:
    def grams(text: str, n: int) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[at : at + n]) for at in range(len(words) - n + 1)}

    for n, most in ((8, 0.82), (13, 0.36)):
        found = sum(not grams(problem, n).isdisjoint(grams(row, n)) for problem, row in pairs)
        assert found / len(pairs) < most


@labelled
def test_rows_do_not_meet_problems_that_are_known_to_be_clean(pairs: list[tuple[str, str]]) -> None:
    paired = {row["math500_id"] for row in lines("contamination/openthoughts_lexical_pairs.jsonl")}
    clean = [row["problem"] for row in lines("contamination/clean_pairs.jsonl") if row["math500_id"] not in paired]
    assert len(clean) == 88
    assert len(list(met(clean, [row for _, row in pairs]))) / (len(clean) * len(pairs)) < 0.0015


@labelled
def test_no_prompt_of_gsm8k_meets_a_problem_of_math(pairs: list[tuple[str, str]]) -> None:
    questions = [row["question"] for row in lines("problems/gsm8k_train.jsonl")]
    assert len(questions) == 7473
    assert list(met([problem for problem, _ in pairs], questions)) == []
