"""The built-in solver: its results are reasoning-gym's, and every line of its working is true."""

import asyncio
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import FormatConfig, Sampling, TeacherConfig
from distill.engines import Completion, Request, open_engine, stream
from distill.engines.solver import SOLVERS, VERSION, roots, solve
from distill.errors import EngineError
from distill.format import parse_completion
from distill.records import Message, Prompt
from distill.runs import DigestCache, RunOptions

Numbers = st.integers(-(10**7), 10**7)

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("chain_sum", 1500, {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 4}),
    ("chain_sum", 1500, {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 6, "allow_negation": True}),
    ("basic_arithmetic", 1500, {"operators": ["+"], "allow_parentheses": False, "allow_negation": False}),
    ("basic_arithmetic", 1500, {"operators": ["+", "-"], "allow_parentheses": False, "whitespace": "random"}),
    ("products", 1500, {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 5, "allow_negation": True}),
    ("gcd", 1500, {"min_numbers": 2, "max_numbers": 4, "min_value": 1, "max_value": 5000}),
]


def problem(task: str, metadata: dict[str, Any], question: str = "?") -> Prompt:
    return Prompt.of([Message(role="user", content=question)], row={"task": task, "entry": {"metadata": metadata}})


def problems(task: str, size: int, params: dict[str, Any]) -> Iterator[tuple[Prompt, str]]:
    """Problems of reasoning-gym with its own answers."""
    import reasoning_gym

    for entry in reasoning_gym.create_dataset(task, size=size, seed=11, **params):
        yield problem(task, entry["metadata"], entry["question"]), str(entry["answer"])


# --- a reader of the working that shares nothing with its writer ----------------------------------------------------


class Column:
    """A sum or difference being worked out from the ones upwards."""

    def __init__(self, left: str, sign: str, right: str) -> None:
        assert len(left) == len(right) and sign in "+-", "padded to one width"
        self.left, self.sign, self.right = left, sign, right
        self.digits = ""
        self.carry = 0

    def line(self, text: str) -> None:
        """Check one column: its two digits, what the column before left over, and the arithmetic."""
        found = re.fullmatch(r"(\d+)([-+])(\d)([-+]1)?=(\d+)", text)
        assert found, f"not a column: {text!r}"
        first, sign, second, carried, result = found.groups()
        place = -1 - len(self.digits)
        lent = int(first) - int(self.left[place])
        assert sign == self.sign and second == self.right[place]
        assert carried == (f"{sign}1" if self.carry else None), "the carry or borrow of the column before"
        rest = self.carry if sign == "+" else -self.carry
        assert int(result) == int(first) + (int(second) if sign == "+" else -int(second)) + rest, text
        if sign == "+":
            assert lent == 0
            self.carry = int(int(result) > 9)
        else:
            assert lent in (0, 10) and int(result) <= 9, "a borrow is ten, and is made only where it is needed"
            self.carry = lent // 10
        self.digits = result[-1] + self.digits

    def end(self, result: int) -> None:
        """Check the result against the digits that the columns gave, and against the whole sum."""
        assert len(self.digits) == len(self.left), "every column was worked out"
        assert result == int(("1" if self.carry else "") + self.digits)
        right = int(self.right) if self.sign == "+" else -int(self.right)
        assert result == int(self.left) + right


class Reader:
    """What has been read of a working, and what is still open in it."""

    def __init__(self) -> None:
        self.columns: list[Column] = []
        self.products: list[int] = []
        self.signed: int | None = None
        self.last: int | None = None

    def line(self, line: str) -> None:
        for pattern, check in self.KINDS.items():
            if found := re.fullmatch(pattern, line):
                check(self, *found.groups())
                return
        assert self.columns, f"a line that belongs to nothing: {line!r}"
        self.columns[-1].line(line)

    def begin_signed(self, left: str, sign: str, right: str, *compared: str | None) -> None:
        self.signed = int(left) + (int(right) if sign == "+" else -int(right))
        if compared[0] is not None:
            assert [int(str(n)) for n in compared] == [abs(int(left)), int(right)]

    def begin_column(self, left: str, sign: str, right: str) -> None:
        self.columns.append(Column(left, sign, right))

    def begin_product(self, left: str, right: str) -> None:
        self.products.append(int(left) * int(right))

    def end_part(self, result: str) -> None:
        self.last = int(result)
        if self.columns:
            self.columns.pop().end(self.last)
        else:
            assert self.products.pop() == self.last

    def end_signed(self, result: str) -> None:
        assert self.signed == int(result) and abs(self.last or 0) == abs(self.signed)
        self.last, self.signed = self.signed, None

    def partial(self, left: str, right: str, result: str) -> None:
        assert self.products and int(left) * int(right) == int(result)

    def division(self, number: str, quotient: str, divisor: str, rest: str) -> None:
        assert int(number) == int(quotient) * int(divisor) + int(rest) and int(rest) < int(divisor)
        self.last = int(divisor)

    def divisor(self, result: str) -> None:
        assert self.last == int(result)

    KINDS: ClassVar[dict[str, Callable[..., None]]] = {
        r"(-?\d+)([-+])(\d+): (?:both negative|compare (\d+) and (\d+))": begin_signed,
        r"(\d+)([-+])(\d+)": begin_column,
        r"(-?\d+) \* (-?\d+)": begin_product,
        r"= ?(-?\d+)": end_part,
        r"so (-?\d+)": end_signed,
        r"(\d+) \* (\d+) = (\d+)": partial,
        r"(\d+) = (\d+) \* (\d+) \+ (\d+)": division,
        r"the remainder is 0, so the gcd is (\d+)": divisor,
    }


def check_working(text: str) -> int:
    """Read a working line by line; the last result it comes to. AssertionError at the first untrue line."""
    reader = Reader()
    for line in text.split("\n"):
        reader.line(line)
    assert not reader.columns and not reader.products and reader.signed is None, "something was left unfinished"
    assert reader.last is not None
    return reader.last


@pytest.mark.parametrize(("task", "size", "params"), CASES)
def test_the_result_is_the_gold_answer_and_every_line_of_the_working_is_true(
    task: str, size: int, params: dict[str, Any]
) -> None:
    for prompt, gold in problems(task, size, params):
        working, result = solve(prompt)
        assert result == gold, prompt.text
        assert check_working(working) == int(gold), working


def test_every_task_of_the_solver_is_among_the_cases() -> None:
    assert {task for task, _, _ in CASES} == set(SOLVERS)


@given(st.lists(Numbers, min_size=2, max_size=4), st.data())
def test_sums_and_differences_of_any_numbers_are_worked_out_truly(numbers: list[int], data: st.DataObject) -> None:
    operators = data.draw(st.lists(st.sampled_from("+-"), min_size=len(numbers) - 1, max_size=len(numbers) - 1))
    expression = str(numbers[0]) + "".join(f" {o} {n}" for o, n in zip(operators, numbers[1:]))
    for shown in (expression, expression.replace(" ", "")):
        working, result = solve(problem("chain_sum", {"expression": shown}))
        assert int(result) == check_working(working) == eval(expression)


def test_the_reader_of_workings_finds_what_is_untrue() -> None:
    working, _ = solve(problem("chain_sum", {"expression": "57 + 87 - 152"}))
    assert check_working(working) == -8
    caught = 0
    digits = [place for place, char in enumerate(working) if char.isdigit()]
    for place in digits:
        other = str((int(working[place]) + 1) % 10)
        try:
            check_working(working[:place] + other + working[place + 1 :])
        except AssertionError:
            caught += 1
    assert caught == len(digits), "every single changed digit"


def test_a_sum_by_hand() -> None:
    working, result = solve(problem("basic_arithmetic", {"expression": "57 + 187"}))
    assert result == "244"
    assert working == "057+187\n7+7=14\n5+8+1=14\n0+1+1=2\n=244"


def test_a_difference_below_zero_by_hand() -> None:
    working, result = solve(problem("chain_sum", {"expression": "9 - 21"}))
    assert result == "-12"
    assert working == "9-21: compare 9 and 21\n21-09\n11-9=2\n2-0-1=1\n=12\nso -12"


# --- the engine -----------------------------------------------------------------------------------------------------


def answers(*prompts: Prompt) -> list[Completion]:
    teacher = TeacherConfig(engine="solver")
    engine = open_engine(teacher, FormatConfig(), RunOptions())
    requests = [Request(prompt, 0, Sampling(), 0) for prompt in prompts]

    async def collect() -> list[Completion]:
        found = [completion async for completion in engine.generate(stream(requests))]
        await engine.close()
        return found

    return asyncio.run(collect())


def test_an_answer_is_written_as_r1_writes_it() -> None:
    [answer] = answers(problem("gcd", {"numbers": [12, 18]}))
    assert answer.answer == "\\boxed{6}" and answer.think == "closed" and answer.finish_reason == "stop"
    assert answer.reasoning == "18 = 1 * 12 + 6\n12 = 2 * 6 + 0\nthe remainder is 0, so the gcd is 6"
    parsed = parse_completion(answer.raw)
    assert (parsed.reasoning, parsed.answer, parsed.think) == (answer.reasoning, answer.answer, answer.think)


def test_what_it_cannot_solve_is_a_failed_answer_and_the_others_go_on() -> None:
    unknown = problem("countdown", {"numbers": [1, 2]}, "a")
    nested = problem("basic_arithmetic", {"expression": "( 1 + 2 ) * 3"}, "b")
    handmade = Prompt.of([Message(role="user", content="c")], row={"task": "gcd"})
    fine = problem("chain_sum", {"expression": "1 + 2"}, "d")
    found = answers(unknown, nested, handmade, fine)
    assert [answer.key for answer in found] == [(p.prompt_id, 0) for p in (unknown, nested, handmade, fine)]
    assert "no worked solution for task 'countdown'; it knows chain_sum" in str(found[0].error)
    assert "whole numbers only, not '( 1 + 2 ) * 3'" in str(found[1].error)
    assert "this prompt has none" in str(found[2].error)
    assert found[3].error is None and found[3].answer == "\\boxed{3}"


def test_a_task_that_is_unknown_is_an_error_of_the_engine() -> None:
    with pytest.raises(EngineError, match="no worked solution for task ''"):
        solve(Prompt.of([Message(role="user", content="2 + 2 = ?")]))


def test_its_answers_depend_on_its_version_only() -> None:
    assert roots(TeacherConfig(engine="solver"), DigestCache()) == {"solver": VERSION}
