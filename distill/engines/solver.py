"""Built-in worked solutions: a teacher without a model, a key or a network.

It is no language model and does not pretend to be one: for a few arithmetic tasks of reasoning-gym it writes the
steps that a person would take, digit by digit, in R1's format with a boxed answer. What a small student learns from
is the working, not the result, so the steps are explicit (columns, carries, borrows, remainders) and terse: a token
that says nothing costs as much to learn as one that does.
"""

import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any

from distill.config import FormatConfig, TeacherConfig
from distill.engines import Completion, Request
from distill.errors import EngineError
from distill.records import Prompt, Usage
from distill.runs import DigestCache, RunOptions

VERSION = "2"


def roots(teacher: TeacherConfig, cache: DigestCache) -> dict[str, str]:
    """What the answers depend on beside the prompts: the version of the worked solutions."""
    return {"solver": VERSION}


class SolverEngine:
    """Answers reasoning-gym problems of the tasks in `SOLVERS`."""

    name = "solver"
    version = VERSION
    batch_size: int | None = None

    @classmethod
    def from_teacher(cls, teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> "SolverEngine":
        """The solver has no settings."""
        return cls()

    async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        """Solve each problem; one it does not know becomes a failed completion."""
        async for request in requests:
            started = time.perf_counter()
            try:
                reasoning, result = solve(request.prompt)
            except EngineError as error:
                yield Completion(request.key, error=str(error))
                continue
            answer = f"\\boxed{{{result}}}"
            yield Completion(
                key=request.key,
                reasoning=reasoning,
                answer=answer,
                raw=f"<think>\n{reasoning}\n</think>\n\n{answer}",
                think="closed",
                finish_reason="stop",
                usage=Usage(),
                latency_s=time.perf_counter() - started,
                model="solver",
            )

    async def close(self) -> None:
        """Nothing is held."""


def solve(prompt: Prompt) -> tuple[str, str]:
    """The worked steps and the result of one problem.

    Raises EngineError for a task without a built-in solution and for a problem that reasoning-gym did not make.
    """
    task = prompt.row.get("task", "")
    if task not in SOLVERS:
        raise EngineError(f"the solver has no worked solution for task {task!r}; it knows {', '.join(SOLVERS)}")
    metadata = prompt.row.get("entry", {}).get("metadata")
    if not metadata:
        raise EngineError("the solver works from reasoning-gym's own record of a problem, and this prompt has none")
    return SOLVERS[task](metadata)


# --- sums and differences, column by column -------------------------------------------------------------------------


def add_columns(a: int, b: int) -> str:
    """a + b for a, b >= 0: both padded to one width, then column by column from the ones, a carry as a third term."""
    width = max(len(str(a)), len(str(b)))
    lines = [f"{a:0{width}}+{b:0{width}}"]
    carry = 0
    for place in range(width):
        x, y = digit(a, place), digit(b, place)
        total = x + y + carry
        lines.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    lines.append(f"={a + b}")
    return "\n".join(lines)


def subtract_columns(a: int, b: int) -> str:
    """a - b for a >= b >= 0: both padded to one width, then column by column; a borrow adds ten and takes one."""
    width = len(str(a))
    lines = [f"{a}-{b:0{width}}"]
    borrow = 0
    for place in range(width):
        x, y = digit(a, place), digit(b, place)
        lent = 10 if x < y + borrow else 0
        lines.append(f"{x + lent}-{y}{'-1' if borrow else ''}={x + lent - y - borrow}")
        borrow = lent // 10
    lines.append(f"={a - b}")
    return "\n".join(lines)


def add_signed(a: int, b: int) -> str:
    """a + b for integers of any sign, reduced to columns of non-negative numbers."""
    if a >= 0 and b >= 0:
        return add_columns(a, b)
    if a < 0 and b < 0:
        return f"{a}-{-b}: both negative\n{add_columns(-a, -b)}\nso {a + b}"
    big, small = max(abs(a), abs(b)), min(abs(a), abs(b))
    steps = subtract_columns(big, small)
    if a >= 0 and a >= -b:
        return steps
    shown = f"{a}-{-b}" if b < 0 else f"{a}+{b}"
    return f"{shown}: compare {abs(a)} and {abs(b)}\n{steps}\nso {a + b}"


def digit(number: int, place: int) -> int:
    """The digit of a non-negative number at a place, 0 being the ones."""
    shifted: int = number // 10**place
    return shifted % 10


def solve_chain(metadata: dict[str, Any]) -> tuple[str, str]:
    """`12 + 7 - 5`: one operation after the other, each in columns."""
    expression = str(metadata["expression"]).replace(" ", "")
    if not re.fullmatch(r"-?\d+(?:[-+]-?\d+)*", expression):
        raise EngineError(f"the solver adds and subtracts whole numbers only, not {metadata['expression']!r}")
    first, *others = re.findall(r"^-?\d+|[-+]-?\d+", expression)
    total = int(first)
    steps = []
    for term in others:
        value = int(term[1:]) if term[0] == "+" else -int(term[1:])
        steps.append(add_signed(total, value))
        total += value
    return "\n".join(steps) or f"= {total}", str(total)


# --- products, divisors ---------------------------------------------------------------------------------------------


def solve_products(metadata: dict[str, Any]) -> tuple[str, str]:
    """`23 * 45`: partial products by the digits of the second factor, then their sum in columns."""
    factors = [int(part) for part in str(metadata["expression"]).split(" * ")]
    total = factors[0]
    steps = []
    for factor in factors[1:]:
        steps.append(multiply(total, factor))
        total *= factor
    return "\n".join(steps) or f"= {total}", str(total)


def multiply(a: int, b: int) -> str:
    """a * b by partial products; signs are put back at the end."""
    lines = [f"{a} * {b}"]
    total = 0
    for place, shown in enumerate(reversed(str(abs(b)))):
        part = abs(a) * int(shown) * 10**place
        lines.append(f"{abs(a)} * {int(shown) * 10**place} = {part}")
        if total and part:
            lines.append(add_columns(total, part))
        total += part
    lines.append(f"= {a * b}")
    return "\n".join(lines)


def solve_gcd(metadata: dict[str, Any]) -> tuple[str, str]:
    """Euclid's algorithm with every division written out."""
    numbers = [int(n) for n in metadata["numbers"]]
    current = numbers[0]
    lines = []
    for number in numbers[1:]:
        a, b = max(current, number), min(current, number)
        while b:
            lines.append(f"{a} = {a // b} * {b} + {a % b}")
            a, b = b, a % b
        current = a
        lines.append(f"the remainder is 0, so the gcd is {current}")
    return "\n".join(lines), str(current)


SOLVERS: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    "chain_sum": solve_chain,
    "basic_arithmetic": solve_chain,
    "products": solve_products,
    "gcd": solve_gcd,
}
"""Worked solutions by reasoning-gym task."""
