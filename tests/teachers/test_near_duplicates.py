"""Near-duplicates: the first of texts that say nearly the same is named, with how alike they are."""

import os
import random
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import RecipeError
from distill.teachers.near_duplicates import NearDuplicates, band_rows, sentence_tokens

LETTERS = "abcdefgh"


def words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices(LETTERS, k=6)) for _ in range(count)]


def changed(rng: random.Random, text: list[str], places: int) -> list[str]:
    """The same words with new ones at so many places."""
    result = list(text)
    for at in rng.sample(range(len(text)), places):
        (result[at],) = words(rng, 1)
    return result


def jaccard(one: list[str], other: list[str], n: int = 5) -> float:
    """By definition, from the sets themselves."""
    a, b = ({tuple(text[at : at + n]) for at in range(len(text) - n + 1)} for text in (one, other))
    return len(a & b) / len(a | b)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Add 3, then 4.", "add  3 then\n4"),
        (r"So $x=\frac{1}{2}$.", r"so \( x = \dfrac{1}{2} \)"),
        (r"$f(x)$ is $1{,}000$", r"$f\left(x\right)$ is $1,\!000$"),
        ("ﬁnd the caf\u00e9", "Find the CAFE\u0301"),
        ("", " \n"),
    ],
)
def test_texts_that_differ_in_layout_only_are_equal(first: str, second: str) -> None:
    seen = NearDuplicates()
    assert seen.first_like("a", first) is None
    assert seen.first_like("b", second) == ("a", 1.0)


@pytest.mark.parametrize(
    ("first", "second"),
    [("5 + 3", "5 - 3"), ("5! + 3", "5 + 3"), ("f(1.5)", "f(1, 5)"), ("yes", "no"), ("x_1", "x^1"), ("-4", "4")],
)
def test_texts_that_differ_in_a_symbol_are_not_equal(first: str, second: str) -> None:
    seen = NearDuplicates()
    seen.first_like("a", first)
    found = seen.first_like("b", second)
    assert found is None or found[1] < 1


def test_the_similarity_is_the_jaccard_similarity_up_to_the_error_of_the_estimate() -> None:
    rng = random.Random(4)
    errors = []
    for places in (1, 2, 3, 4, 5, 6) * 5:
        text = words(rng, 200)
        like = changed(rng, text, places)
        seen = NearDuplicates(threshold=0.3)
        seen.first_like("a", " ".join(text))
        found = seen.first_like("b", " ".join(like))
        assert found is not None
        assert found[0] == "a"
        errors.append(found[1] - jaccard(text, like))
    assert max(map(abs, errors)) < 4 * 0.5 / 128**0.5
    assert abs(sum(errors) / len(errors)) < 4 * 0.5 / 128**0.5 / len(errors) ** 0.5


def test_texts_that_are_alike_are_found_and_texts_that_are_less_so_are_not() -> None:
    rng = random.Random(5)
    seen = NearDuplicates(threshold=0.8)
    found = {"near": 0, "far": 0}
    for number in range(150):
        text = words(rng, 200)
        near, far = changed(rng, text, 2), changed(rng, text, 15)
        assert jaccard(text, near) > 0.89
        assert jaccard(text, far) < 0.65
        assert seen.first_like(f"text {number}", " ".join(text)) is None
        found["near"] += (seen.first_like("near", " ".join(near)) or ("",))[0] == f"text {number}"
        found["far"] += seen.first_like(f"far {number}", " ".join(far)) is not None
    assert found == {"near": 150, "far": 0}


def test_the_earliest_text_is_named_and_what_is_like_it_is_not_remembered() -> None:
    rng = random.Random(6)
    first = words(rng, 300)
    second = changed(rng, first, 8)
    third = changed(rng, second, 8)
    assert jaccard(first, second) > 0.75
    assert jaccard(second, third) > 0.75
    assert jaccard(first, third) < 0.63
    seen = NearDuplicates(threshold=0.75)
    assert seen.first_like("first", " ".join(first)) is None
    assert (seen.first_like("second", " ".join(second)) or ("",))[0] == "first"
    assert seen.first_like("third", " ".join(third)) is None, "it is like the second only, which was no news"
    assert (seen.first_like("fourth", " ".join(third)) or ("",))[0] == "third"


def test_texts_with_other_numbers_are_never_alike() -> None:
    text = " ".join(words(random.Random(7), 400))
    seen = NearDuplicates(threshold=0.5)
    seen.first_like("seven", f"{text} costs 7 euros")
    assert seen.first_like("eight", f"{text} costs 8 euros") is None
    assert (seen.first_like("in words", f"{text} costs 7 dollars") or ("",))[0] == "seven", "the control"


def test_near_duplicates_are_found_among_hundreds_of_one_template() -> None:
    rng = random.Random(8)
    template = words(rng, 60)
    seen = NearDuplicates(threshold=0.9)
    texts = [[*template, *words(rng, 40)] for _ in range(500)]
    assert not any(seen.first_like(str(number), " ".join(text)) for number, text in enumerate(texts))
    late = [seen.first_like("again", " ".join([*text, "ok"])) for text in texts]
    assert [found and found[0] for found in late] == [str(number) for number in range(500)]


def test_at_threshold_one_only_equal_texts_are_found() -> None:
    rng = random.Random(9)
    text = words(rng, 2000)
    seen = NearDuplicates(threshold=1.0)
    seen.first_like("a", " ".join(text))
    assert seen.first_like("b", " ".join(changed(rng, text, 1))) is None
    assert seen.first_like("c", " ".join(text).upper()) == ("a", 1.0)


def test_a_text_takes_four_kilobytes_whatever_its_length() -> None:
    rng = random.Random(10)
    texts = [" ".join(words(rng, length)) for length in (20, 400) * 150]
    seen = NearDuplicates()
    seen.first_like("warm", "up")
    tracemalloc.start()
    try:
        for number, text in enumerate(texts):
            assert seen.first_like(str(number), text) is None
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / len(texts) < 5000


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 0.99])
def test_bands_are_as_long_as_the_threshold_allows(threshold: float) -> None:
    def looked_at(rows: int) -> float:
        return 1 - (1 - threshold**rows) ** (128 // rows)

    rows = band_rows(threshold, 128)
    assert looked_at(rows) >= 0.99
    assert looked_at(rows + 1) < 0.99 or rows == 64


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"threshold": 0.0}, "above 0"),
        ({"threshold": 1.1}, "1.1"),
        ({"ngram": 0}, "at least 1"),
        ({"permutations": 4}, "16"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        NearDuplicates(**parameters)  # type: ignore[arg-type]


@given(st.lists(st.text(max_size=60), max_size=12))
def test_every_text_is_like_itself_and_equal_texts_are_named_as_such(texts: list[str]) -> None:
    seen = NearDuplicates()
    first = {}
    for number, text in enumerate(texts):
        found = seen.first_like(str(number), text)
        known = first.setdefault(tuple(sentence_tokens(text)), (found[0] if found else str(number)))
        assert found is None or found[1] >= 0.8
        again = seen.first_like("again", text)
        assert again is not None
        assert again[0] == known
        assert (again[1] == 1.0) == (found is None or found[1] == 1.0)


def test_half_of_a_surrogate_pair_does_not_stop_it() -> None:
    seen = NearDuplicates()
    assert seen.first_like("a", "torn \ud83d apart") is None
    assert seen.first_like("b", "torn \ud83d apart") == ("a", 1.0)


def test_the_answers_are_the_same_in_every_process() -> None:
    program = (
        "import random\n"
        "from distill.teachers.near_duplicates import NearDuplicates\n"
        "rng, seen = random.Random(1), NearDuplicates(0.3)\n"
        "for n in range(60):\n"
        "    print(seen.first_like(str(n), ' '.join(rng.choices(['one', 'two'], k=12))))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert b"('" in outputs.pop()
