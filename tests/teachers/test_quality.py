"""What speaks against a text, found in the text alone: sure of what it names, silent on what is mathematics."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import LanguageMix, Loops, Refusals, Select, recipe_from
from distill.engines.solver import add_columns, multiply
from distill.errors import RecipeError
from distill.format import parse_completion
from distill.records import Example, Message, Prompt
from distill.teachers.quality import findings, language_mix, loop, personal_data, refusal, secret

LOOPS, MIX, REFUSALS = Loops(), LanguageMix(), Refusals()


def flags(reasoning: str, answer: str = "4", question: str = "2 + 2 = ?", **config: Any) -> list[str]:
    prompt = Prompt.of([Message(role="user", content=question)])
    example = Example(prompt=prompt, trace_id="t", reasoning=reasoning, answer=answer)
    return [flag for flag, _ in findings(example, Select.model_validate(config))]


# --- loops ----------------------------------------------------------------------------------------------------------

CIRCLE = (
    "Wait, perhaps the number of students is divisible by six, but then the number without the one who is absent is"
    " not, and the problem says that all sections are equal, so something must be missing here after all.\n\n"
)


def test_reasoning_that_goes_in_circles_is_a_loop() -> None:
    assert loop(CIRCLE * 12, LOOPS) == "100% of 300 words are phrases that stand 4 times or more"
    assert flags(CIRCLE * 12) == ["loop"]


def test_a_loop_that_the_trace_leaves_again_is_one_all_the_same() -> None:
    before, after = (" ".join(f"{side} step {n} gives {n * n}." for n in range(300)) for side in ("First", "Then"))
    assert loop(f"{before} {CIRCLE * 8} {after}", LOOPS)
    assert loop(f"{before} {after}", LOOPS) is None


def test_saying_something_three_times_is_checking_and_no_loop() -> None:
    assert loop(CIRCLE * 3, LOOPS) is None
    assert loop(CIRCLE * 3, Loops(repeats=3, max_share=0.3))


@pytest.mark.parametrize("unit", ["哈哈", "等等，我再想想。", "hmm", "So the answer is x. "])
def test_repetition_without_words_is_caught_by_compression(unit: str) -> None:
    assert loop("Let us see.\n" + unit * (6000 // len(unit)), LOOPS)


def test_working_digit_by_digit_is_no_loop_however_long_and_regular() -> None:
    long_sums = [add_columns(10**width - 1, 1) for width in (20, 200, 2000)]
    products = [multiply(int("9" * width), int("8" * 20)) for width in (10, 40)]
    carries = "\n".join(f"Digit {n}: {n % 10} + {n % 7} = {n % 10 + n % 7}, write it down." for n in range(800))
    listed = "\n".join(f"{n} nickels: {n * 195} mm, leaving {1400 - n * 195} mm. Too much." for n in range(300))
    assert [text[:40] for text in (*long_sums, *products, carries, listed) if loop(text, LOOPS)] == []
    # the same cases gone through again and again are one
    assert loop("\n".join(listed.splitlines()[:20]) * 8, LOOPS)


def test_a_third_written_out_is_no_loop() -> None:
    assert loop("1 / 3 = 0." + "3" * 20000, LOOPS) is None


# --- languages ------------------------------------------------------------------------------------------------------


def test_an_english_solution_that_slips_into_chinese_is_flagged_with_how_much() -> None:
    text = "First compute the area.\n\n2. **测量直径的范围:** the measured d is 24 cm. It's then 计算 that we're done."
    assert language_mix("What is the area?", text, MIX) == "9 letters of Chinese or Japanese"


def test_scripts_of_the_prompt_are_at_home_in_the_answer() -> None:
    assert language_mix("Переведи: the cat", "Кошка спит на диване.", MIX) is None
    assert language_mix("日本語で答えて", "首先计算面积，然后", MIX) is None, "Han letters belong to Japanese too"
    assert language_mix("Переведи: the cat", "那只猫在沙发上", MIX) == "7 letters of Chinese or Japanese"


def test_cited_words_greek_and_the_letters_of_mathematics_are_no_mixing() -> None:
    cited = 'In Russian, "в два раза больше" means «вдвое больше» (в два раза).'
    assert language_mix("How many?", cited, MIX) is None
    assert language_mix("How many?", cited.replace('"', ""), MIX) == "14 letters of Cyrillic"
    maths = "∀ε>0 ∃δ: α, β, γ ∈ ℝ, ℵ₀, 𝔸, 𝒞, ﬁne, Ångström, naïve, π² ≈ 9.87, №, ½, ª, → ⇒ ✓ 😀"
    assert language_mix("How many?", maths * 20, MIX) is None


def test_a_few_letters_are_let_pass_as_the_recipe_says() -> None:
    assert language_mix("?", "so 因此 it is", MIX) is None
    assert language_mix("?", "so 因此 it is", LanguageMix(max_letters=1)) == "2 letters of Chinese or Japanese"


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t assist with that request.",
        "Sorry, I cannot provide instructions for this.",
        "I apologize, but I am unable to answer questions about this topic.",
        "Unfortunately, I won't be able to... I cannot comply.",
        "I cannot assist with that.",
        "As an AI language model, I cannot have opinions.",
        "抱歉，我无法回答这个问题。",
    ],
)
def test_an_answer_that_declines_is_a_refusal(answer: str) -> None:
    assert refusal(answer, REFUSALS)
    assert flags("Let me think.", answer)[0] == "refusal"


@pytest.mark.parametrize(
    "answer",
    [
        "The answer is 4.",
        "I cannot determine the number of apples from what is given, so there is no unique answer.",
        "Sorry for the long derivation. The answer is 4.",
        "We can't divide by zero, so x = 2 has to be excluded; \\boxed{3}.",
        "Unfortunately for Tom, he loses 3 marbles and has 4 left.",
        "The clerk says: I'm sorry, I can't help you. How much does Tom pay? $5.",
    ],
)
def test_an_answer_that_answers_is_none(answer: str) -> None:
    assert refusal(answer, REFUSALS) is None


def test_a_long_answer_is_no_refusal_whatever_it_opens_with() -> None:
    answer = "I'm sorry, but I can't answer in one line. " + "Here is the derivation. " * 40
    assert refusal(answer, REFUSALS) is None and refusal(answer, Refusals(max_chars=2000))


# --- secrets --------------------------------------------------------------------------------------------------------

# Put together here, so that no scanner takes this file for a leak.
BODY = "qR7tZk2mVx9bLw4nHs8dJf3cPa6yGe1u"
KEYS = {
    "OpenAI key": "sk-" + "proj-" + BODY,
    "Anthropic key": "sk-ant-" + "api03-" + BODY,
    "AWS access key": "AKIA" + "Q7RTZ2MVX9BLW4NH",
    "GitHub token": "ghp_" + BODY + "T5x9",
    "Hugging Face token": "hf_" + BODY,
    "GitLab token": "glpat-" + BODY[:20],
    "Slack token": "xoxb-" + "738291046-" + BODY[:16],
    "Google API key": "AIza" + BODY + "k3Q",
    "Stripe key": "sk_live_" + BODY,
    "JSON web token": ".".join(["eyJ" + "hbGciOiJIUzI1NiJ9", "eyJ" + "zdWIiOiI3ODkyMSJ9", BODY]),
    "private key": "-----BEGIN " + "RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7\n",
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_is_named_by_kind_and_never_shown(kind: str) -> None:
    said = secret(f"Set the variable to {KEYS[kind]} and run it.")
    assert said and said.startswith(f"{kind} ")
    assert not any(KEYS[kind][start : start + 9] in said for start in range(len(KEYS[kind]) - 9))
    assert flags(f"the key is {KEYS[kind]}") == ["secret"]
    assert flags("no key", question=f"Why does {KEYS[kind]} not work?") == ["secret"], "the prompt trains too"


@pytest.mark.parametrize(
    "text",
    [
        "AKIA" + "IOSFODNN7EXAMPLE", "sk-your-api-key-goes-here", "sk-xxxxxxxxxxxxxxxxxxxxxxxx", "ghp_" + "x" * 36,
        "risk-adjusted-return-of-the-portfolio", "sk-learn-contrib-is-a-family-of-packages", "eyJ is base64 of {\"",
        "-----BEGIN " + "PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0B\n", "-----BEGIN " + "PRIVATE KEY-----, then text.",
    ],
)  # fmt: skip
def test_placeholders_and_look_alikes_are_no_keys(text: str) -> None:
    assert secret(f"Use {text} here.") is None


# --- personal data --------------------------------------------------------------------------------------------------

PERSONAL = {
    "e-mail address": ["Write to ada.lovelace@analytical-engine.org today.", "jo+x@mail.uni-bonn.de"],
    "telephone number": ["Call +44 20 7946 1958 now.", "Phone: +49 (30) 1234-5678", "+33 6 12 34 56 78"],
    "telephone number (North America)": ["Reach me at (415) 867-5309.", "My phone: 415-867-5309"],
    "bank account (IBAN)": ["DE89 3704 0044 0532 0130 00", "pay GB82WEST12345698765432 please"],
    "card number": ["It is 4539 1488 0343 6467.", "card no. 4539148803436467", "3782-822463-10005 on file"],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PERSONAL.items() for text in texts])
def test_a_persons_data_is_named_by_kind_and_never_shown(kind: str, text: str) -> None:
    said = personal_data(f"So.\n{text}\n")
    assert said and said.startswith(f"{kind} ")
    shown = said.removeprefix(kind)
    assert not any(text[start : start + 4] in shown for start in range(len(text) - 4))


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com", "name@test.org", "A @ B.T", "@app.route", "x = a@b", "v1.2@sha256",
        "5 +12 345 678 = ?", "f(x) +12 345 678 9", "so +1 234 567 890", "+44 20 7946 0958 * 2", "+1 415 555 0123",
        "1234-5678-9012-3456 grouped by four", "4539 1488 0343 6468", "3.14159265358979323846", "4539148803436467",
        "555-01-2345", "415-867-5309 is a difference", "867-5309", "2024-01-15", "192.168.10.20", "10000000000000000",
        "GB82WEST12345698765433", "XY82 WEST 1234 5698 7654 32", "AB12 3456 7890", "ISBN 978-3-16-148410-0",
        "1 000 000 000 000 000 + 4 000 000", "0.4539 1488 0343 6467", "00000000000000000000",
    ],
)  # fmt: skip
def test_mathematics_and_made_up_data_is_nobodys(text: str) -> None:
    assert personal_data(f"We get {text} here.") is None


@given(
    st.lists(st.integers(-(10**18), 10**18), min_size=1, max_size=30),
    st.sampled_from([" + ", " - ", ", ", "\n", " = "]),
)
def test_no_run_of_numbers_is_personal_data(numbers: list[int], between: str) -> None:
    assert personal_data(between.join(map(str, numbers))) is None
    assert personal_data(between.join(f"{number:,}" for number in numbers)) is None


# --- the recipe decides ---------------------------------------------------------------------------------------------


def test_each_look_can_be_left_out() -> None:
    text = CIRCLE * 12 + "测量直径的范围测量 " + KEYS["OpenAI key"] + " ada@lovelace.org"
    answer = "I'm sorry, but I can't help with that."
    assert flags(text, answer) == ["refusal", "loop", "language-mix", "secret", "personal-data"]
    assert flags(text, answer, loops={"action": "ignore"}, secrets="ignore", personal_data="flag") == [
        "refusal", "language-mix", "personal-data",
    ]  # fmt: skip
    assert flags(text, answer, refusals={"action": "ignore"}, language_mix={"action": "ignore"}) == [
        "loop", "secret", "personal-data",
    ]  # fmt: skip


def test_what_a_look_may_lead_to_is_one_of_three() -> None:
    with pytest.raises(RecipeError, match=r"select\.secrets is 'keep'; choose 'drop', 'flag' or 'ignore'"):
        recipe_from({"select": {"secrets": "keep"}})


@given(st.text(max_size=400), st.text(max_size=200), st.text(max_size=200))
def test_any_text_can_be_looked_at(reasoning: str, answer: str, question: str) -> None:
    assert set(flags(reasoning, answer, question)) <= {"refusal", "loop", "language-mix", "secret", "personal-data"}


# --- real text ------------------------------------------------------------------------------------------------------

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="no real data beside the checkout (shared/data)")


def rows(file: str) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines())


@needs_data
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gsm8k_deepseek_r1", {}),
        ("gsm8k_r1_distill_qwen_32b", {}),
        # read: three that went in circles until they were cut off, one with headings in Chinese
        ("math_train_r1_distill_qwen_1.5b", {("loop", "unclosed"): 3, ("language-mix", "closed"): 1}),
    ],
)
def test_of_1100_real_traces_four_are_flagged_and_these_were_read(name: str, found: dict[Any, int]) -> None:
    seen: Counter[Any] = Counter()
    for row in rows(f"traces/{name}.jsonl"):
        question = row.get("question") or row["problem_text"]
        text = row.get("response") or "<think>" + row["generated_cot"].partition("<think>")[2]
        parsed = parse_completion(text, opened=True)
        seen.update((flag, parsed.think) for flag in flags(parsed.reasoning or "", parsed.answer, question))
    assert seen == found


@needs_data
def test_no_problem_with_its_solution_is_flagged() -> None:
    texts = [(row["question"], row["answer"]) for row in rows("problems/gsm8k_train.jsonl")]
    texts += [(row["question"], f"{row['rationale']} {row['options']}") for row in rows("problems/aqua_dev.jsonl")]
    code = json.loads((DATA / "problems/mbpp_sanitized.json").read_text(encoding="utf-8"))
    texts += [(row["prompt"], row["code"] + "\n".join(row["test_list"])) for row in code]
    assert len(texts) == 8154
    assert [question for question, answer in texts if flags("", answer, question)] == []
