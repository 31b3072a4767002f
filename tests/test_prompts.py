"""Prompts: sources become records, and nothing held out is ever on the training side, however rows are ordered."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import PromptSource, Recipe, recipe_from
from distill.errors import DataError, RecipeError
from distill.prompts import (
    GOLD_RULES,
    group_of,
    mix,
    numbers_of,
    placeholders,
    preflight,
    read_counted,
    read_source,
    roots,
    run,
    split,
    subsample,
)
from distill.records import Message, Prompt, read_records
from distill.runs import DigestCache, RunOptions, Step, open_sealed

SUMS = {"task": "chain_sum", "size": 40, "seed": 1}
QUIET = RunOptions(quiet=True)


def source(**fields: Any) -> PromptSource:
    return PromptSource.model_validate({"name": "s", **fields})


def rows_file(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(*questions: str, **fields: Any) -> list[Prompt]:
    return [Prompt.of([Message(role="user", content=q)], row={"question": q}, **fields) for q in questions]


def step(runs: Path, **args: Any) -> Step:
    return Step("prompts", "prompts", "test", "0123456789abcdef", {}, {}, runs, args)


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
    reading = read_counted(source(file=rows_file(tmp_path, rows)))
    assert [prompt.gold for prompt in reading.prompts] == ["1", "2"], "the first of equals stays"
    assert (reading.rows, reading.duplicates, reading.conflicting) == (4, 2, 1)


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
    prompts = asked(*map(str, numbers))
    cut = source(reasoning_gym=SUMS, heldout=len(numbers) // 2, split_seed=seed)
    train, heldout = split(prompts, cut)
    assert len(heldout) == cut.heldout
    assert Counter(p.prompt_id for p in train + heldout) == Counter(p.prompt_id for p in prompts)
    shuffled = list(prompts)
    shuffler.shuffle(shuffled)
    again = split(shuffled, cut)
    assert again.heldout == heldout
    assert {p.prompt_id for p in again.train} == {p.prompt_id for p in train}


def test_another_seed_holds_out_other_prompts_and_a_larger_set_holds_the_smaller() -> None:
    prompts = asked(*(f"{n}?" for n in range(200)))

    def drawn(count: int, seed: int = 0) -> list[Prompt]:
        return split(prompts, source(reasoning_gym=SUMS, heldout=count, split_seed=seed)).heldout

    assert drawn(20) != drawn(20, seed=1)
    assert drawn(50)[:20] == drawn(20)


@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=3), min_size=4, max_size=60), st.integers(1, 3))
def test_no_reordering_of_a_held_out_problem_is_ever_trained_on(terms: list[list[int]], count: int) -> None:
    # few numbers, so that most problems have reorderings
    questions = dict.fromkeys(" + ".join(map(str, of_one)) for of_one in terms)
    prompts = asked(*questions)
    if len(prompts) <= count:
        return
    train, heldout = split(prompts, source(reasoning_gym=SUMS, heldout=count, split_by="numbers"))

    def key(prompt: Prompt) -> list[str]:
        return sorted(prompt.text.split(" + "))

    assert len(heldout) == count
    assert not [p for p in train if key(p) in [key(h) for h in heldout]]


def test_the_surplus_of_a_group_is_on_neither_side() -> None:
    prompts = asked("1 + 2", "2 + 1", "12 - 12", "3 + 4")
    sides = [
        split(prompts, source(reasoning_gym=SUMS, heldout=1, split_by="numbers", split_seed=seed)) for seed in range(20)
    ]
    sizes = {(len(train), len(heldout)) for train, heldout in sides}
    assert sizes == {(3, 1), (2, 1)}, "two where half of {1 + 2, 2 + 1} was held out, three elsewhere"
    by_prompt = split(prompts, source(reasoning_gym=SUMS, heldout=1))
    assert len(by_prompt.train) == 3, "grouped by prompt, nothing is surplus"


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
    assert numbers_of(asked(question)[0]) == numbers


def test_questions_without_numbers_are_groups_of_their_own() -> None:
    first, second = asked("Why?", "How?")
    by_numbers = source(reasoning_gym=SUMS, split_by="numbers")
    assert group_of(first, by_numbers) != group_of(second, by_numbers)


def test_holding_everything_out_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"heldout is 3, but there are only 3 distinct prompts"):
        split(asked("a", "b", "c"), source(reasoning_gym=SUMS, heldout=3))


# --- mixing ---------------------------------------------------------------------------------------------------------


def named(folder: Path, name: str, questions: list[str], **fields: Any) -> PromptSource:
    path = rows_file(folder, [{"question": q, "answer": "1"} for q in questions], f"{name}.jsonl")
    return source(name=name, file=path, **fields)


def test_a_prompt_of_two_sources_belongs_to_the_first_only(tmp_path: Path) -> None:
    first = named(tmp_path, "first", ["a", "b", "c"], heldout=1)
    second = named(tmp_path, "second", ["c", "b", "a", "d"])
    mixture = mix([first, second])
    assert {(p.source, p.text) for p in mixture.train if p.source == "second"} == {("second", "d")}
    assert mixture.counts["sources"]["second"]["duplicates"] == 3
    assert not {p.prompt_id for p in mixture.train} & {p.prompt_id for p in mixture.heldout}


def test_what_one_source_holds_out_by_numbers_no_other_source_trains_on(tmp_path: Path) -> None:
    first = named(tmp_path, "first", ["1 + 2", "3 + 4"], heldout=1, split_by="numbers")
    second = named(tmp_path, "second", ["2 + 1", "4 + 3", "5 + 6"])
    mixture = mix([first, second])
    heldout = numbers_of(mixture.heldout[0])
    assert heldout not in {numbers_of(prompt) for prompt in mixture.train}
    assert mixture.counts["sources"]["second"]["kept_apart"] == 1
    assert any("share their group with held-out ones" in note for note in mixture.notes)


def test_weights_keep_their_proportion_and_the_scarcest_source_stays_whole(tmp_path: Path) -> None:
    sources = [
        named(tmp_path, "a", [f"a{n}" for n in range(90)], weight=3),
        named(tmp_path, "b", [f"b{n}" for n in range(10)], weight=1),
        named(tmp_path, "c", [f"c{n}" for n in range(7)]),
    ]
    counts = Counter(prompt.source for prompt in mix(sources).train)
    assert counts == {"a": 30, "b": 10, "c": 7}  # 3 : 1, and all of what has no weight


def test_subsampling_is_blind_to_the_order_of_rows(tmp_path: Path) -> None:
    few, many = asked("x", source="few"), asked(*(f"{n}" for n in range(50)), source="many")
    sources = [source(name="few", reasoning_gym=SUMS, weight=1), source(name="many", reasoning_gym=SUMS, weight=5)]
    kept = subsample({"few": few, "many": many}, sources)["many"]
    again = subsample({"few": few, "many": many[::-1]}, sources)["many"]
    assert len(kept) == 5 and kept == again[::-1]


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_a_mixture_is_never_empty_where_both_sources_have_enough(first: float, second: float) -> None:
    prompts = {"a": asked(*(f"a{n}" for n in range(60))), "b": asked(*(f"b{n}" for n in range(60)))}
    sources = [source(name=name, reasoning_gym=SUMS, weight=w) for name, w in [("a", first), ("b", second)]]
    sizes = {name: len(kept) for name, kept in subsample(prompts, sources).items()}
    assert max(sizes.values()) == 60, "one of the two stays whole"
    assert abs(sizes["a"] * second - sizes["b"] * first) <= max(first, second), "off by less than one prompt"


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
    reading = read_counted(source(file=GSM8K, gold="after_hashes"))
    assert (reading.rows, reading.duplicates, reading.no_gold) == (7473, 0, 0)
    assert reading.prompts[0].gold == "72"  # Natalia's clips
    assert all(prompt.gold and prompt.gold.replace(",", "").lstrip("-").isdigit() for prompt in reading.prompts)
