"""Prompts: sources become records, and nothing held out is ever on the training side, however rows are ordered."""

import csv
import hashlib
import json
import random
import re
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import PromptSource, Recipe, recipe_from
from distill.errors import DataError, RecipeError
from distill.mixture import HELDOUT, TRAIN, choose, drawn_places, hold_out_all, totals
from distill.progress import Bar
from distill.prompts import (
    GOLD_RULES,
    numbers_of,
    placeholders,
    preflight,
    read_chosen,
    read_marks,
    read_source,
    roots,
    run,
)
from distill.records import Message, Prompt, digest_json, read_records
from distill.runs import DigestCache, RunOptions, Step, file_digest, open_sealed
from distill.verifiers import resolve

SUMS = {"task": "chain_sum", "size": 40, "seed": 1}
QUIET = RunOptions(quiet=True)


def source(**fields: Any) -> PromptSource:
    return PromptSource.model_validate({"name": "s", **fields})


def rows_file(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def step(runs: Path, **args: Any) -> Step:
    return Step("prompts", "prompts", "test", "0123456789abcdef", {}, {}, runs, args)


class Sides(NamedTuple):
    """What the stage makes of some sources."""

    train: list[Prompt]
    heldout: list[Prompt]
    counts: Any


def sides(*sources: PromptSource) -> Sides:
    """What the stage would write: most tests are spared its waits for the disk."""
    with tempfile.TemporaryDirectory() as scratch:
        readings = read_marks(sources, Path(scratch))
        choices = choose(sources, readings)
        chosen = list(read_chosen(sources, Path(scratch), readings, choices))
    aside = [prompt for side, prompt in chosen if side == HELDOUT]
    counts = totals({one.name: choice.counts for one, choice in zip(sources, choices)})
    train = [prompt for side, prompt in chosen if side == TRAIN]
    return Sides(train, [aside[place] for place in drawn_places(choices)], counts)


def asking(questions: list[str], **fields: Any) -> Sides:
    """Both sides of one source with these questions."""
    with tempfile.TemporaryDirectory() as folder:
        path = rows_file(Path(folder), [{"question": question, "answer": "1"} for question in questions])
        return sides(source(file=path, **fields))


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_file_becomes_prompts_with_template_gold_and_source(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"question": "How many?", "answer": "Count them.\n#### 1,072", "level": 3}])
    read = read_source(
        source(
            file=path, gold="after_hashes", licence="MIT", instruction="Box it: \\boxed{}.",
            template="[{level}] {question}\n{instruction} {{like this}}",
        )
    )  # fmt: skip
    assert len(read) == 1
    assert read[0].text == "[3] How many?\nBox it: \\boxed{}. {{like this}}"
    assert (read[0].gold, read[0].source, read[0].licence, read[0].verifier) == ("1,072", "s", "MIT", "number")
    assert read[0].row == {"question": "How many?"}


def test_doubled_braces_and_empty_ones_are_text(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"question": "q", "answer": "a"}])
    assert read_source(source(file=path, template="{question} \\boxed{{answer}} {} {1}"))[0].text == (
        "q \\boxed{answer} {} {1}"
    )
    assert placeholders("{a} {{b}} {} {c_1} {1} {{}}") == ["a", "c_1"]


def test_braces_in_a_question_are_not_placeholders(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"question": "Is {answer} a set?", "answer": "yes"}])
    assert read_source(source(file=path))[0].text == "Is {answer} a set?"


def test_question_means_the_question_column_whatever_it_is_called(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"problem": "1 + 1?", "solution": "so \\boxed{2}"}])
    read = read_source(source(file=path, question_column="problem", gold_column="solution", gold="boxed"))
    assert (read[0].text, read[0].gold, read[0].row["question"]) == ("1 + 1?", "2", "1 + 1?")


def test_a_column_called_instruction_is_used_where_the_source_gives_none(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"question": "q", "answer": "a", "instruction": "Be brief."}])
    assert read_source(source(file=path, template="{question} {instruction}"))[0].text == "q Be brief."


def test_the_same_prompt_twice_is_read_once_and_counted(tmp_path: Path) -> None:
    rows = [{"question": q, "answer": a} for q, a in [("a?", "1"), ("a ?", "2"), (" a?\n", "1"), ("a?", "9")]]
    read = sides(source(file=rows_file(tmp_path, rows)))
    assert [prompt.gold for prompt in read.train] == ["1", "2"], "the first of equals stays"
    assert (read.counts["rows"], read.counts["duplicates"], read.counts["conflicting"]) == (4, 2, 1)


def test_only_the_first_rows_are_read_under_a_limit(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"question": f"{n}?", "answer": str(n)} for n in range(5)])
    assert [prompt.gold for prompt in read_source(source(file=path, limit=2))] == ["0", "1"]


def test_a_custom_verifier_may_read_every_column(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"question": "q", "answer": None, "tests": ["assert f(1) == 2"]}])
    (tmp_path / "mine.py").write_text("def verify(prompt, trace): ...\n")
    read = read_source(source(file=path, verifier={"file": tmp_path / "mine.py"}))[0]
    assert read.row == {"question": "q", "answer": None, "tests": ["assert f(1) == 2"]}
    assert read.verifier == f"file:{tmp_path / 'mine.py'}"
    assert read.gold is None


GOLDS = {
    "as_is": {" 72 ": "72", "": "", "a\nb": "a\nb"},
    "after_hashes": {"#### 72": "72", "a #### b\n#### -1,000": "-1,000", "72": None},
    "boxed": {
        r"so \boxed{\frac{1}{2}}.": r"\frac{1}{2}",
        r"\boxed{1} \boxed{\text{a{b}c}}": r"\text{a{b}c}",
        "72": None,
    },
    "last_number": {
        "3 apples cost $1,200.50": "1200.5",
        "it is -5.": "-5",
        "3/4 of 2": "2",
        "12 is 25%": "25%",
        "x": None,
    },
}


@pytest.mark.parametrize("rule", GOLDS)
def test_each_rule_takes_the_reference_that_a_reader_would(rule: str) -> None:
    assert {text: GOLD_RULES[rule](text) for text in GOLDS[rule]} == GOLDS[rule]


def test_numbers_as_references_are_written_as_json_writes_them(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"question": "a", "answer": 72}, {"question": "b", "answer": 0.5}])
    assert [prompt.gold for prompt in read_source(source(file=path))] == ["72", "0.5"]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question_column": "qestion"}, r"rows\.jsonl:1: no column 'qestion' \(did you mean 'question'\?\)"),
        ({"gold_column": "anwser"}, r"no column 'anwser' \(did you mean 'answer'\?\); columns here: question, answer"),
        ({"gold": "boxed"}, r"rule 'boxed' finds no reference answer in column 'answer' of any row"),
        ({"template": "{qestion}"}, r"asks for column 'qestion', which .*rows\.jsonl:1 does not have.*'question'"),
        ({"template": "{question} ({answer})"}, r"shows column 'answer', the reference answer, to the model"),
        ({"template": "Solve it."}, r"shows no column of the row; write \{question\}"),
        ({"template": "{instruction}", "instruction": "x"}, r"shows no column of the row"),
        ({"instruction": "Box it."}, r"has no \{instruction\}, so the instruction would be lost"),
    ],
)
def test_a_mapping_that_cannot_be_meant_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = rows_file(tmp_path, [{"question": "a", "answer": "1"}])
    with pytest.raises((DataError, RecipeError), match=message):
        read_source(source(file=path, **fields))


def test_a_row_without_a_question_is_refused_by_line(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"question": "a", "answer": "1"}, {"question": " ", "answer": "2"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: column 'question' is empty"):
        read_source(source(file=path))
    path = rows_file(tmp_path, [{"question": "a", "answer": "1"}, {"answer": "2"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: no column 'question'"):
        read_source(source(file=path))


# --- reasoning-gym --------------------------------------------------------------------------------------------------


def test_generated_problems_are_the_tasks_own_and_can_be_scored_and_solved() -> None:
    import reasoning_gym

    read = read_source(source(reasoning_gym={**SUMS, "params": {"max_terms": 3}}, verifier="reasoning_gym"))
    made = reasoning_gym.create_dataset("chain_sum", seed=1, size=40, max_terms=3)
    assert [(p.text, p.gold) for p in read] == [(entry["question"], entry["answer"]) for entry in made]
    row = read[0].row
    assert row["task"] == "chain_sum" and row["params"] == {"max_terms": 3}
    assert row["question"] == read[0].text and row["entry"]["answer"] == read[0].gold
    assert row["entry"]["metadata"]["expression"] in row["question"]
    assert json.loads(json.dumps(row)) == row


def test_a_generator_gives_the_same_problems_every_time_and_others_for_another_seed() -> None:
    first, again = (read_source(source(reasoning_gym=SUMS)) for _ in range(2))
    assert first == again
    assert first != read_source(source(reasoning_gym={**SUMS, "seed": 99}))


@pytest.mark.parametrize("task", ["power_function", "gcd", "rush_hour", "letter_counting"])
def test_any_task_is_read_though_some_check_nothing_and_some_have_no_single_answer(task: str) -> None:
    read = read_source(source(reasoning_gym={"task": task, "size": 2}, verifier="reasoning_gym"))
    assert len(read) == 2
    assert [prompt.gold is None for prompt in read] == [task == "rush_hour"] * 2


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        ({"task": "chain_sm"}, r"task is 'chain_sm' \(did you mean 'chain_sum'\?\)"),
        ({"params": {"max_term": 3}}, r"chain_sum has no parameter 'max_term' \(did you mean 'max_terms'\?\)"),
        ({"params": {"max_terms": 1}}, r"chain_sum refuses \{'max_terms': 1\}: max_terms must be >= min_terms"),
        ({"params": {"max_terms": "many"}}, r"chain_sum refuses \{'max_terms': 'many'\}"),
        ({"params": {"seed": 3}}, r"set reasoning_gym\.seed instead"),
    ],
)
def test_a_task_that_cannot_be_made_is_refused_with_the_nearest_name(generator: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_source(source(reasoning_gym={**SUMS, **generator}))


# --- splitting ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**6), min_size=3, max_size=40, unique=True), st.randoms(), st.integers(0, 5))
def test_a_split_is_exact_disjoint_and_blind_to_the_order_of_rows(
    numbers: list[int], shuffler: random.Random, seed: int
) -> None:
    questions = [str(number) for number in numbers]
    cut = {"heldout": len(questions) // 2, "split_seed": seed}
    one = asking(questions, **cut)
    assert len(one.heldout) == cut["heldout"]
    assert Counter(texts(one.train + one.heldout)) == Counter(questions)
    assert texts(one.train) == [question for question in questions if question in texts(one.train)]
    shuffler.shuffle(questions)
    again = asking(questions, **cut)
    assert again.heldout == one.heldout
    assert sorted(texts(again.train)) == sorted(texts(one.train))


def test_another_seed_holds_out_other_prompts_and_a_larger_set_holds_the_smaller() -> None:
    questions = [f"{n}?" for n in range(200)]

    def drawn(count: int, seed: int = 0) -> list[str]:
        return texts(asking(questions, heldout=count, split_seed=seed).heldout)

    assert drawn(20) != drawn(20, seed=1)
    assert drawn(50)[:20] == drawn(20)


@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=3), min_size=4, max_size=60), st.integers(1, 3))
def test_no_reordering_of_a_held_out_problem_is_ever_trained_on(terms: list[list[int]], count: int) -> None:
    # few numbers, so that most problems have reorderings
    questions = list(dict.fromkeys(" + ".join(map(str, of_one)) for of_one in terms))
    try:
        train, heldout, _ = asking(questions, heldout=count, split_by="numbers")
    except (DataError, RecipeError):  # all there is shares its numbers with what is held out
        return

    def key(text: str) -> list[str]:
        return sorted(text.split(" + "))

    assert len(heldout) == count
    assert not [text for text in texts(train) if key(text) in map(key, texts(heldout))]


def test_the_surplus_of_a_group_is_on_neither_side() -> None:
    questions = ["1 + 2", "2 + 1", "12 - 12", "3 + 4"]
    cut = [asking(questions, heldout=1, split_by="numbers", split_seed=seed) for seed in range(20)]
    sizes = {(len(one.train), len(one.heldout), one.counts["split_surplus"]) for one in cut}
    assert sizes == {(3, 1, 0), (2, 1, 1)}, "two where half of {1 + 2, 2 + 1} was held out, three elsewhere"
    assert len(asking(questions, heldout=1).train) == 3, "grouped by prompt, nothing is surplus"


@pytest.mark.parametrize(
    ("question", "numbers"),
    [
        ("12 + 7 - 12", "12 12 7"),
        ("7-12+12", "12 12 7"),
        ("gcd(3,4)", "3 4"),
        ("gcd(4, 3)", "3 4"),
        ("007 and 1.50", "1.5 7"),
        ("no numbers", ""),
    ],
)
def test_the_numbers_of_a_question_are_a_multiset(question: str, numbers: str) -> None:
    assert numbers_of(question) == numbers


def test_questions_without_numbers_are_groups_of_their_own() -> None:
    one = asking(["Why?", "How?", "When?"], heldout=1, split_by="numbers")
    assert (len(one.train), len(one.heldout)) == (2, 1)


def test_holding_everything_out_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"heldout is 3, but there are only 3 distinct prompts"):
        asking(["a", "b", "c", "c"], heldout=3)


# --- mixing ---------------------------------------------------------------------------------------------------------


def named(folder: Path, name: str, questions: list[str], **fields: Any) -> PromptSource:
    path = rows_file(folder, [{"question": q, "answer": "1"} for q in questions], f"{name}.jsonl")
    return source(name=name, file=path, **fields)


def test_a_prompt_of_two_sources_belongs_to_the_first_only(tmp_path: Path) -> None:
    first = named(tmp_path, "first", ["a", "b", "c"], heldout=1)
    second = named(tmp_path, "second", ["c", "b", "a", "d"])
    mixed = sides(first, second)
    assert {(p.source, p.text) for p in mixed.train if p.source == "second"} == {("second", "d")}
    assert mixed.counts["sources"]["second"]["duplicates"] == 3
    assert not set(texts(mixed.train)) & set(texts(mixed.heldout))


def test_what_one_source_holds_out_by_numbers_no_other_source_trains_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = named(tmp_path, "first", ["1 + 2", "3 + 4"], heldout=1, split_by="numbers")
    second = named(tmp_path, "second", ["2 + 1", "4 + 3", "5 + 6", "no number"])
    mixed = sides(first, second)
    heldout = numbers_of(mixed.heldout[0].text)
    assert heldout not in {numbers_of(text) for text in texts(mixed.train)}
    assert mixed.counts["sources"]["second"]["kept_apart"] == 1
    run(Recipe(prompts=[first, second]), step(tmp_path / "runs"), RunOptions())
    assert "second: dropped 1 training prompts that share their group with held-out ones" in capsys.readouterr().err


def test_weights_keep_their_proportion_and_the_scarcest_source_stays_whole(tmp_path: Path) -> None:
    sources = [
        named(tmp_path, "a", [f"a{n}" for n in range(90)], weight=3),
        named(tmp_path, "b", [f"b{n}" for n in range(10)], weight=1),
        named(tmp_path, "c", [f"c{n}" for n in range(7)]),
    ]
    counts = Counter(prompt.source for prompt in sides(*sources).train)
    assert counts == {"a": 30, "b": 10, "c": 7}  # 3 : 1, and all of what has no weight


def test_subsampling_is_blind_to_the_order_of_rows(tmp_path: Path) -> None:
    questions = [str(n) for n in range(50)]
    few = named(tmp_path, "few", ["x"], weight=1)
    kept = sides(few, named(tmp_path, "many", questions, weight=5)).train[1:]
    again = sides(few, named(tmp_path, "many", questions[::-1], weight=5)).train[1:]
    assert len(kept) == 5 and kept == again[::-1]


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_a_mixture_is_never_empty_where_both_sources_have_enough(first: float, second: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = [
            named(Path(folder), name, [f"{name}{n}" for n in range(60)], weight=weight)
            for name, weight in [("a", first), ("b", second)]
        ]
        sizes = Counter(prompt.source for prompt in sides(*sources).train)
    assert max(sizes.values()) == 60, "one of the two stays whole"
    assert abs(sizes["a"] * second - sizes["b"] * first) <= max(first, second), "off by less than one prompt"


# --- against a plain implementation ---------------------------------------------------------------------------------


def expected(sources: list[PromptSource]) -> Sides:
    """The stage by its description, with every prompt in memory; for JSON Lines and the plain template."""
    read = {one.name: read_plainly(one) for one in sources}
    owner: dict[str, str] = {}
    for name, prompts in read.items():
        for prompt in prompts:
            owner.setdefault(prompt.prompt_id, name)
    train, heldout, counts = {}, {}, {}
    for one in sources:
        first = {prompt.prompt_id: prompt for prompt in reversed(read[one.name])}
        own = [p for p in read[one.name] if p is first[p.prompt_id] and owner[p.prompt_id] == one.name]
        if one.heldout and one.heldout >= len(own):
            raise RecipeError("everything would be held out")
        heldout[one.name] = sorted(own, key=lambda p: (draw(one, group(p, one)), p.prompt_id))[: one.heldout]
        touched = {group(prompt, one) for prompt in heldout[one.name]}
        train[one.name] = [prompt for prompt in own if group(prompt, one) not in touched]
        counts[one.name] = {
            "rows": len(read[one.name]),
            "duplicates": len(read[one.name]) - len(own),
            "conflicting": sum(prompt.gold != first[prompt.prompt_id].gold for prompt in read[one.name]),
            "no_gold": sum(prompt.gold is None for prompt in first.values()),
            "split_surplus": len(own) - len(train[one.name]) - len(heldout[one.name]),
        }
    for one in sources:
        before = len(train[one.name])
        for other in sources:
            apart = {group(prompt, other) for prompt in heldout[other.name]}
            train[one.name] = [prompt for prompt in train[one.name] if group(prompt, other) not in apart]
        counts[one.name]["kept_apart"] = before - len(train[one.name])
    scale = min((len(train[one.name]) / Fraction(one.weight) for one in sources if one.weight), default=Fraction(0))
    for one in sources:
        whole = train[one.name]
        if one.weight:
            drawn = sorted(whole, key=lambda p: draw(one, f"mixture:{p.prompt_id}"))
            drawn = drawn[: int(scale * Fraction(one.weight))]
            train[one.name] = [prompt for prompt in whole if prompt in drawn]
        counts[one.name] |= {
            "subsampled_away": len(whole) - len(train[one.name]),
            "train": len(train[one.name]),
            "heldout": len(heldout[one.name]),
        }
    both = [[prompt for prompts in side.values() for prompt in prompts] for side in (train, heldout)]
    if not both[0]:
        raise DataError("nothing is left to train on")
    sums = {key: sum(of_one[key] for of_one in counts.values()) for key in next(iter(counts.values()))}
    return Sides(*both, {**sums, "sources": counts})


def read_plainly(one: PromptSource) -> list[Prompt]:
    assert one.file is not None
    prompts = []
    for line in one.file.read_text().splitlines()[: one.limit]:
        row = json.loads(line)
        messages = [Message(role="user", content=row["question"].strip())]
        gold = (row["answer"] or "").strip() or None
        prompts.append(Prompt.of(messages, gold=gold, source=one.name, row={"question": row["question"].strip()}))
    return prompts


def group(prompt: Prompt, one: PromptSource) -> str:
    numbers = " ".join(sorted(re.findall(r"[0-9]+", prompt.text))) if one.split_by == "numbers" else ""
    return numbers or prompt.prompt_id


def draw(one: PromptSource, what: str) -> str:
    return hashlib.sha256(f"{one.split_seed}:{what}".encode()).hexdigest()


QUESTIONS = [f"{a}{operator}{b}" for a in range(5) for b in range(5) for operator in ("+", " + ", "  +\t", " and ")]
QUESTIONS += ["Why?", "How?", "caf\u00e9?", "cafe\u0301?"]
ANSWERS = st.sampled_from(["1", "2", " 1", "", None])
ROWS = st.lists(st.tuples(st.sampled_from(QUESTIONS), ANSWERS), min_size=10, max_size=30)
SOURCES = st.lists(
    st.tuples(
        ROWS,
        st.fixed_dictionaries(
            {
                "heldout": st.integers(0, 3),
                "split_by": st.sampled_from(["prompt", "numbers"]),
                "split_seed": st.integers(0, 2),
                "weight": st.sampled_from([None, 0.5, 1, 3]),
                "limit": st.sampled_from([None, None, 9]),
            }
        ),
    ),
    min_size=1,
    max_size=3,
)


def saved(folder: str, given: Any) -> list[PromptSource]:
    """Sources as hypothesis drew them, each with its file."""
    sources = []
    for number, (rows, fields) in enumerate(given):
        path = rows_file(Path(folder), [{"question": q, "answer": a} for q, a in rows], f"{number}.jsonl")
        sources.append(source(name=f"s{number}", file=path, **fields))
    return sources


@settings(max_examples=150)
@given(SOURCES)
def test_the_stage_decides_as_if_every_prompt_were_in_memory(given: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = saved(folder, given)
        try:
            wanted = expected(sources)
        except (DataError, RecipeError) as error:
            with pytest.raises(type(error)):
                sides(*sources)
        else:
            assert sides(*sources) == wanted


@settings(max_examples=5)
@given(SOURCES)
def test_the_stage_writes_what_it_decided_and_digests_what_it_wrote(given: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = saved(folder, given)
        try:
            wanted = expected(sources)
        except (DataError, RecipeError):
            return
        sealed = run(Recipe(prompts=sources), step(Path(folder) / "runs"), QUIET)
        both = [sealed.path("train.jsonl").read_text(), sealed.path("heldout.jsonl").read_text()]
    assert both == ["".join(prompt.to_line() for prompt in side) for side in (wanted.train, wanted.heldout)]
    label = resolve("number").label
    labelled = [[{**p.model_dump(mode="json"), "verifier": label} for p in side] for side in wanted[:2]]
    assert (sealed.digest, sealed.counts) == (digest_json(labelled), wanted.counts)


# --- the stage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = rows_file(tmp_path, [{"question": f"{n} + 1", "answer": str(n + 1)} for n in range(12)])
    other = {"name": "gcds", "reasoning_gym": {"task": "gcd", "size": 5}, "verifier": "reasoning_gym"}
    return recipe_from(
        {
            "prompts": [{"name": "sums", "file": str(path), "heldout": 4}],
            "evaluate": {"sets": {"heldout": {}, "gcd": {"source": other}}},
        }
    )


def test_the_stage_writes_both_sides_and_seals_what_it_counted(recipe: Recipe, tmp_path: Path) -> None:
    this = step(tmp_path / "runs")
    preflight(recipe, this, QUIET)
    assert not (tmp_path / "runs").exists(), "a preflight writes nothing"
    sealed = run(recipe, this, QUIET)
    train = list(read_records(sealed.path("train.jsonl"), Prompt))
    heldout = list(read_records(sealed.path("heldout.jsonl"), Prompt))
    assert (len(train), len(heldout)) == (8, 4)
    assert sealed.counts["rows"] == 12 and sealed.counts["train"] == 8 and sealed.counts["heldout"] == 4
    assert sealed.counts["sources"]["sums"]["heldout"] == 4
    assert open_sealed(this.folder).digest == sealed.digest
    assert run(recipe, step(tmp_path / "again"), QUIET).digest == sealed.digest


def sources_of_every_kind(folder: Path) -> dict[str, Any]:
    """Three files with every kind of trouble: repeated prompts, conflicting answers, reorderings, weights."""
    sums = [{"question": f"{a} + {b}", "answer": str(a + b)} for a in range(1, 9) for b in range(1, 9)]
    sums += [{"question": " 1  + 2\n", "answer": "three"}, {"question": "No numbers: cafe\u0301?", "answer": None}]
    sums += [{"question": "No numbers: caf\u00e9?", "answer": "yes"}, {"question": "2 + 1", "answer": "3"}]
    words = [(n % 3, f"Word problem {n}: {n} apples, „{n * n}“ pears", f"so\n#### {n + n * n:,}") for n in range(90)]
    with (folder / "words.csv").open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("level", "problem", "solution"), *words, (0, "7 + 8", "#### 15")])
    mixed = [{"question": f"{b} plus {a}", "answer": a + b, "tags": [a, "x"]} for a in range(1, 26) for b in (3, 4)]
    mixed[5:5] = [{"question": "2 + 5", "answer": 8}, {"question": "3 plus 1", "answer": 4}]
    (folder / "mixed.json").write_text(json.dumps({"data": {"n": 1}, "rows": mixed}), encoding="utf-8")
    of_sums = {"name": "sums", "file": str(rows_file(folder, sums, "sums.jsonl"))}
    of_words = {"name": "words", "file": str(folder / "words.csv"), "question_column": "problem"}
    of_mixed = {"name": "mixed", "file": str(folder / "mixed.json"), "limit": 45}
    return {
        "prompts": [
            {**of_sums, "heldout": 9, "split_by": "numbers", "split_seed": 3, "weight": 1, "licence": "MIT"},
            {
                **of_words, "gold_column": "solution", "gold": "after_hashes", "weight": 1.5, "heldout": 6,
                "template": "[{level}] {question}\n{instruction}", "instruction": "Box it.", "verifier": "math",
            },
            {**of_mixed, "heldout": 3, "split_by": "numbers"},
        ],
        "evaluate": {"sets": {"heldout": {}, "other": {"source": {**of_sums, "name": "other"}}}},
    }  # fmt: skip


def test_a_new_version_writes_the_bytes_that_earlier_runs_hold(tmp_path: Path) -> None:
    # where these change, STAGE_VERSIONS["prompts"] must
    recipe = recipe_from(sources_of_every_kind(tmp_path))
    sealed = run(recipe, step(tmp_path / "runs"), QUIET)
    assert file_digest(sealed.path("train.jsonl")).startswith("64d730f4469c0c63")
    assert file_digest(sealed.path("heldout.jsonl")).startswith("5eac8bb3eaf7b618")
    assert {key: value for key, value in sealed.counts.items() if key != "sources"} == {
        "rows": 204, "duplicates": 5, "conflicting": 2, "no_gold": 1, "split_surplus": 1, "kept_apart": 5,
        "subsampled_away": 6, "train": 169, "heldout": 18,
    }  # fmt: skip
    other = run(recipe, step(tmp_path / "set", set="other"), QUIET)
    assert file_digest(other.path("heldout.jsonl")).startswith("5c4bb2b384a04472")


def test_a_new_version_gives_the_digest_that_earlier_runs_have(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def verify(prompt, trace): ...\n")
    rows = [
        {"question": f"Q{n}", "answer": n / 7, "x": float("nan"), "deep": {"b": [n, None], "a": "ü"}} for n in range(20)
    ]
    own = {"name": "own", "file": str(rows_file(tmp_path, rows)), "heldout": 4}
    recipe = recipe_from({"prompts": [{**own, "verifier": {"file": str(tmp_path / "mine.py")}}]})
    digest = run(recipe, step(tmp_path / "runs"), QUIET).digest
    assert digest == "ab80b9f212335b84c7a40f68e77fddf173b32a7436cb7733834ad87e81292f9e"


# --- two passes -----------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[list[Any]], list[Any]]] = {
    "another question": lambda rows: [*rows[:-1], {"question": "other", "answer": "1"}],
    "another answer": lambda rows: [{**rows[0], "answer": "9"}, *rows[1:]],
    "rows swapped": lambda rows: rows[::-1],
    "a row more": lambda rows: [*rows, {"question": "more", "answer": "1"}],
    "a row less": lambda rows: rows[:-1],
    "nothing": lambda rows: list(rows),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_edited_while_it_is_read_is_refused(tmp_path: Path, change: str) -> None:
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(5)]
    one = source(file=rows_file(tmp_path, rows))
    readings = read_marks([one], tmp_path)
    rows_file(tmp_path, CHANGES[change](rows))
    chosen = read_chosen([one], tmp_path, readings, [hold_out_all(readings[0])])
    if change == "nothing":
        assert len(list(chosen)) == 5
    else:
        with pytest.raises(DataError, match=r"prompts source 's': its rows changed while they were read \(seen at"):
            list(chosen)


def test_a_task_that_never_makes_the_same_problems_twice_is_drawn_once() -> None:
    # this one ignores its seed in part, so a second drawing would give other problems
    read = read_source(source(reasoning_gym={"task": "list_functions", "size": 30}, limit=25))
    assert 20 <= len(read) <= 25


def test_both_passes_show_every_row_on_the_bar(tmp_path: Path) -> None:
    one = source(file=rows_file(tmp_path, [{"question": f"{n}?", "answer": "1"} for n in range(2345)]))
    first, second = Bar("reading", None), Bar("writing", 2345)
    readings = read_marks([one], tmp_path, first)
    for _ in read_chosen([one], tmp_path, readings, [hold_out_all(readings[0])], second):
        pass
    assert first.done == second.done == 2345


def test_memory_grows_by_a_few_integers_a_prompt(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        rows = [{"question": f"{n} {'x' * 1000}", "answer": str(n)} for n in range(count)]
        one = source(file=rows_file(tmp_path, rows), heldout=count // 4)
        del rows
        tracemalloc.start()
        run(Recipe(prompts=[one]), step(tmp_path / str(count)), QUIET)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)  # what is imported and cached once
    assert (peak(3000) - peak(500)) / 2500 < 200, "bytes a prompt, of which the text alone has 1,000"


# --- the rest of the stage ------------------------------------------------------------------------------------------


def test_a_named_set_holds_all_prompts_of_its_own_source(recipe: Recipe, tmp_path: Path) -> None:
    this = step(tmp_path / "runs", set="gcd")
    preflight(recipe, this, QUIET)
    sealed = run(recipe, this, QUIET)
    assert [path.name for path in sealed.folder.glob("*.jsonl")] == ["heldout.jsonl"]
    assert all(
        p.source == "gcds" and p.row["task"] == "gcd" for p in read_records(sealed.path("heldout.jsonl"), Prompt)
    )


def test_the_digest_follows_the_verifier_file_but_not_its_place(tmp_path: Path) -> None:
    digests = []
    for place, name in [("here", "x"), ("there", "x"), ("there", "y")]:
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "mine.py").write_text(f"{name} = 1\ndef verify(prompt, trace): ...\n")
        path = rows_file(tmp_path, [{"question": "q", "answer": "a"}])
        one = {"name": "s", "file": str(path), "verifier": {"file": str(tmp_path / place / "mine.py")}}
        runs = tmp_path / f"runs-{len(digests)}"
        digests.append(run(recipe_from({"prompts": [one]}), step(runs), QUIET).digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "absent.jsonl"}, "no such file"),
        ({"question_column": "q"}, "no column 'q'"),
        ({"gold": "after_hashes"}, "finds no reference answer in column 'answer' of the first row"),
        ({"template": "{x}"}, "asks for column 'x'"),
        ({"verifier": "numbr"}, "did you mean 'number'"),
        ({"verifier": "reasoning_gym"}, "judges prompts made by reasoning-gym only"),
        ({"file": None, "reasoning_gym": {"task": "gdc", "size": 1}}, "did you mean 'gcd'"),
    ],
)
def test_a_preflight_refuses_what_the_first_row_shows(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = rows_file(tmp_path, [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}])
    broken = recipe_from({"prompts": [{"name": "s", "file": str(path), **change}]})
    with pytest.raises((DataError, RecipeError), match=message):
        preflight(broken, step(tmp_path / "runs"), QUIET)
    assert not (tmp_path / "runs").exists()


def test_a_preflight_tries_a_verifier_of_ones_own(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"question": "a", "answer": "1"}])
    (tmp_path / "mine.py").write_text("def verify(prompt, trace):\n    return prompt.gold == trace.answer\n")
    mine = {"name": "s", "file": str(path), "verifier": {"file": str(tmp_path / "mine.py")}}
    with pytest.raises(RecipeError, match=r"mine\.py: verify\(prompt, trace\) returned bool"):
        preflight(recipe_from({"prompts": [mine]}), step(tmp_path / "runs"), QUIET)


def test_roots_follow_the_content_of_files_and_verifiers_and_the_generators_version(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "digests.json")
    path = rows_file(tmp_path, [{"question": "a", "answer": "1"}])
    (tmp_path / "mine.py").write_text("def verify(prompt, trace): ...\n")
    sources = [
        source(name="file", file=path, verifier={"file": tmp_path / "mine.py"}),
        source(name="made", reasoning_gym=SUMS),
        source(name="hub", hub={"id": "someone/something", "revision": "a" * 40}),
    ]
    before = roots(sources, cache)
    assert set(before) == {"file", "file.verifier", "made", "hub"}
    assert before["made"].startswith("reasoning-gym==0.")
    assert before["hub"] == "someone/something@" + "a" * 40
    rows_file(tmp_path, [{"question": "a", "answer": "2"}])
    (tmp_path / "mine.py").write_text("def verify(prompt, trace): pass\n")
    after = roots(sources, cache)
    assert {name for name in before if before[name] != after[name]} == {"file", "file.verifier"}
    with pytest.raises(DataError, match="no such file"):
        roots([source(file=tmp_path / "absent.jsonl")], cache)


# --- real data ------------------------------------------------------------------------------------------------------

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "problems" / "gsm8k_train.jsonl"


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not beside the checkout (shared/data)")
def test_gsm8k_is_read_with_a_reference_for_every_problem() -> None:
    read = sides(source(file=GSM8K, gold="after_hashes"))
    assert (read.counts["rows"], read.counts["duplicates"], read.counts["no_gold"]) == (7473, 0, 0)
    assert read.train[0].gold == "72"  # Natalia's clips
    assert all(prompt.gold and prompt.gold.replace(",", "").lstrip("-").isdigit() for prompt in read.train)
