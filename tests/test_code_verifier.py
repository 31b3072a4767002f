"""The `code` verifier: which code is run, what tests may do with it, and what is said where it cannot be judged."""

import ast
import json
import math
import os
import warnings
from collections import Counter, OrderedDict, namedtuple
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import CodeVerifier, PromptSource, VerifierSection
from distill.errors import DataError, RecipeError
from distill.prompts import read_source
from distill.records import Message, Outcome, Prompt, Teacher, Trace, Verdict
from distill.verifiers import code, program, resolve, sandbox
from distill.verifiers.harness import decode, encode
from distill.verifiers.pool import VerifierPool, check_verifier
from distill.verifiers.program import check_sandbox, source_of
from distill.verifiers.sandbox import sandbox_problem

HERE = "CI" in os.environ or sandbox_problem() is None
needs_sandbox = pytest.mark.skipif(not HERE, reason=f"no sandbox on this machine: {sandbox_problem()}")
MBPP = Path(__file__).resolve().parents[2] / "shared" / "data" / "problems" / "mbpp_sanitized.json"


def prompt(**row: Any) -> Prompt:
    return Prompt.of([Message(role="user", content="Write f.")], row=row, verifier="code")


def trace(answer: str, **fields: Any) -> Trace:
    values = {"trace_id": "t", "prompt_id": "p", "cfg": "c", "sample": 0, "teacher": Teacher(engine="test")}
    return Trace.model_validate({**values, "answer": answer, **fields})


def fenced(source: str, language: str = "python") -> str:
    return f"Here it is:\n\n```{language}\n{source}\n```\n\nIt works."


def verdict_on(source: str, *tests: str, options: CodeVerifier = CodeVerifier(), **row: Any) -> Verdict:  # noqa: B008
    return code(prompt(test_list=list(tests), **row), trace(fenced(source)), options)


# --- finding the code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "source"),
    [
        (fenced("def f(): return 1"), "def f(): return 1\n"),
        (fenced("def f(): return 1", "py"), "def f(): return 1\n"),
        (fenced("def f(): return 1", ""), "def f(): return 1\n"),
        (fenced("int f() {}", "c"), None),
        (fenced("x = 1") + fenced("y = 2"), "y = 2\n"),
        (fenced("def f(): return 1") + "Example:\n" + fenced("print(f())"), "def f(): return 1\n"),
        (fenced("def f(): return 1") + "Better:\n" + fenced("def f(): return 2"), "def f(): return 2\n"),
        (fenced("def f(): return 1") + fenced("$ python f.py", "sh"), "def f(): return 1\n"),
        (fenced("I am prose, not code", "") + fenced("x = 1", ""), "x = 1\n"),
        ("def f(): return 1", "def f(): return 1"),
        ("The answer is clearly 42.", None),
        ("```python\ndef f(): return 1", "def f(): return 1"),
        ("1. Do\n   ```python\n   def f():\n       return 1\n   ```", "def f():\n    return 1\n"),
        ("```python\ndef f(): return 1```", "def f(): return 1"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_code_is_the_last_block_that_defines_something(answer: str, source: str | None) -> None:
    assert source_of(answer) == source


def test_a_program_is_the_last_block_whatever_is_in_it() -> None:
    assert source_of(fenced("def f(): return 1") + fenced("print(1)"), last=True) == "print(1)\n"


@given(st.text(max_size=300))
def test_looking_for_code_never_raises(text: str) -> None:
    source_of(text), source_of(f"```\n{text}\n```"), source_of("(" * 1000 + text)


# --- verdicts -------------------------------------------------------------------------------------------------------

CLASS = """
class Stack:
    def __init__(self): self.items = []
    def push(self, item):
        self.items.append(item)
        return self
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
"""
POINT = "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int = 0\ndef f(): return Point(3)"

VERDICTS: dict[str, tuple[str, str, Outcome, str]] = {
    "right": ("def f(x): return x + 1", "assert f(1) == 2", "correct", "1 assertion passed"),
    "wrong": ("def f(x): return x - 1", "assert f(1) == 2", "wrong", "test 1 of 1: assert f(1) == 2"),
    "raises": ("def f(x): return x / 0", "assert f(1) == 2", "wrong", "ZeroDivisionError: division by zero in assert"),
    "asserts itself": ("def f(x): assert x > 1", "assert f(1) == 2", "wrong", "1 of 1: an assertion in the answer"),
    "another name": ("def g(x): return 2", "assert f(1) == 2", "wrong", "NameError: name 'f' is not defined"),
    "no Python": ("def f(x) return 2", "assert f(1) == 2", "wrong", "the answer cannot run: SyntaxError"),
    "fails on import": ("import numpy", "assert f(1) == 2", "wrong", "cannot run: ModuleNotFoundError"),
    "asks for input": ("x = input()\ndef f(_): return 2", "assert f(1) == 2", "wrong", "EOFError"),
    "main guard": ("def f(x): return 2\nif __name__ == '__main__': input()", "assert f(1) == 2", "correct", ""),
    "list for tuple": ("def f(): return [1]", "assert f() == (1,)", "wrong", "assert f() == (1,)"),
    "whole number for a float": ("def f(): return 2", "assert f() == 2.0", "correct", ""),
    "large numbers": ("def f(): return 3 ** 5000", "assert f() == 3 ** 5000", "correct", ""),
    "not a number": ("def f(): return float('nan')", "x = f()\nassert x != x", "correct", ""),
    "counter for dict": ("from collections import Counter\ndef f(): return Counter('aab')",
                         "assert f() == {'a': 2, 'b': 1}", "correct", ""),
    "keyword arguments": ("def f(a, *, b): return a - b", "assert f(b=1, a=3) == 2", "correct", ""),
    "changed in place": ("def f(rows): rows.sort(); rows[0] = [9]",
                         "x = [[2], [1]]\nf(x)\nassert x == [[9], [2]]", "correct", ""),
    "a generator": ("def f():\n    n = 0\n    while True:\n        yield n\n        n += 1",
                    "g = f()\nassert [next(g) for _ in range(3)] == [0, 1, 2]", "correct", ""),
    "a generator for a list": ("def f(): return map(int, '12')", "assert f() == [1, 2]", "wrong", ""),
    "a class": (CLASS, "s = Stack()\ns.push(1).push(2)\nassert s.pop() == 2 and len(s) == 1", "correct", ""),
    "a class's attribute": (POINT, "assert f().x == 3", "correct", ""),
    "objects compared": (POINT, "assert f() == Point(3)", "unverifiable", "the tests compare a Point of the answer"),
    "a truthy object": ("import re\ndef f(): return re.match('a', 'a')", "assert f()", "correct", ""),
    "an exception expected": ("def f(): raise ValueError('no')",
                              "try:\n    f()\nexcept ValueError as e:\n    assert str(e) == 'no'", "correct", ""),
    "functions handed over": ("def f(g): return g(1)", "assert f(lambda x: x) == 1", "unverifiable", "hand over a"),
    "asserts nothing": ("def f(): return 1", "f()", "unverifiable", "no assertion was reached"),
    "an assertion never reached": ("def f(): return 0", "if f():\n    assert f() == 5", "unverifiable", "no assertion"),
    "a test function": ("def f(): return 1", "def test_f():\n    assert f() == 2", "wrong", "test_f: assert f() == 2"),
    "tests that are no Python": ("def f(): return 1", "assert f( == 1", "unverifiable", "SyntaxError"),
    "tests of another package": ("def f(): return 1", "import numpy\nassert f() == 1", "unverifiable", "numpy"),
    "tests that loop": ("def f(): return 1", "while True: pass", "timeout", "no end in 2 s"),
    "named like a builtin": ("def sum(a, b): return a * b", "assert sum(2, 3) == 6", "correct", ""),
    "a module of the answer": ("import math\ndef f(): return 2.0000001", "assert math.isclose(f(), 2, rel_tol=1e-3)",
                               "correct", ""),
    "prints while it works": ("def f():\n    print('{}')\n    return 1", "assert f() == 1", "correct", ""),
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts_are_those_of_python(case: str) -> None:
    source, test, outcome, detail = VERDICTS[case]
    limit_s = 2.0 if outcome == "timeout" else 60.0
    verdict = verdict_on(source, test, options=CodeVerifier(timeout_s=limit_s))
    assert verdict.outcome == outcome and detail in verdict.detail, verdict


@needs_sandbox
def test_the_first_test_that_fails_is_named() -> None:
    verdict = verdict_on("def f(x): return x", "assert f(1) == 1", "assert f(2) == 3", "assert f(3) == 4")
    assert (verdict.outcome, verdict.detail) == ("wrong", "test 2 of 3: assert f(2) == 3")
    longer = verdict_on("def f(x): return x", "y = 2\nfor x in (1, 2):\n    assert f(x) == 1\n")
    assert longer.detail == "test 1 of 1: assert f(x) == 1"


@needs_sandbox
def test_setup_runs_before_the_answer_and_the_tests() -> None:
    options = CodeVerifier(setup_column="imports")
    uses = "def f(x): return math.floor(x)"
    assert verdict_on(uses, "assert math.isclose(f(2.5), 2)", options=options, imports=["import math"]).correct
    assert verdict_on(uses, "assert f(2.5) == 2", options=options, imports=None).outcome == "wrong", "control"
    broken = verdict_on(uses, "assert f(2.5) == 2", options=options, imports="import numpy")
    assert broken.outcome == "unverifiable" and "the setup cannot run: ModuleNotFoundError" in broken.detail


@needs_sandbox
def test_tests_may_define_a_check_of_the_entry_point() -> None:
    options = CodeVerifier(tests_column="test", entry_point_column="entry_point")
    row = {"test": "def check(candidate):\n    assert candidate(1) == 2\n", "entry_point": "f"}
    for source, outcome in (("def f(x): return x + 1", "correct"), ("def f(x): return x", "wrong")):
        assert code(prompt(**row), trace(fenced(source)), options).outcome == outcome


@needs_sandbox
def test_recursion_and_threads_of_an_honest_answer_work() -> None:
    deep = "import sys\nsys.setrecursionlimit(20000)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)"
    assert verdict_on(deep, "assert f(5000) == 5000").correct
    threads = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def f():\n    with ThreadPoolExecutor(4) as pool:\n        return list(pool.map(abs, [-1, -2]))"
    )
    assert verdict_on(threads, "assert f() == [1, 2]").correct


def test_a_row_without_tests_is_no_wrong_answer() -> None:
    for tests in (None, [], "", ["  "]):
        verdict = code(prompt(test_list=tests), trace(fenced("def f(): return 1")))
        assert (verdict.outcome, verdict.detail) == ("unverifiable", "the row has no tests in 'test_list'")
    for tests in (3, [3], {"a": 1}):
        assert code(prompt(test_list=tests), trace(fenced("x = 1"))).outcome == "unverifiable"
    assert code(prompt(), trace(fenced("x = 1"))).outcome == "unverifiable"


def test_prose_and_failed_requests_need_no_sandbox() -> None:
    judged = prompt(test_list=["assert f() == 1"])
    assert code(judged, trace("I cannot say.")).detail == "no Python code in the answer"
    assert code(judged, trace("", think="unclosed")).outcome == "wrong"
    assert code(judged, trace("x", error="HTTP 500")).outcome == "error"


# --- programs -------------------------------------------------------------------------------------------------------

ADDS = "a, b = map(int, input().split())\nprint(a + b)"
PROGRAM = CodeVerifier(entry="stdin", tests_column="io", output_kb=64)
CASES = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6", "output": "11"}]


def printed(source: str, tests: Any = CASES, options: CodeVerifier = PROGRAM) -> Verdict:
    return code(prompt(io=tests), trace(fenced(source)), options)


@needs_sandbox
@pytest.mark.parametrize(
    "tests",
    [CASES, json.dumps(CASES), {"inputs": ["1 2", "5 6"], "outputs": ["3", "11"]},
     '{"inputs": [["1 2"], ["5 6"]], "outputs": [["3"], ["11"]]}'],
)  # fmt: skip
def test_a_program_is_judged_by_what_it_prints(tests: Any) -> None:
    assert printed(ADDS, tests).detail == "2 outputs as expected"
    verdict = printed(ADDS.replace("+", "*"), tests)
    assert (verdict.outcome, verdict.detail) == ("wrong", "test 1 of 2: printed '2', expected '3'")


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "outcome", "detail"),
    [
        (ADDS + "\nexit(0)", "correct", ""),
        (ADDS + "\nraise ValueError('no')", "wrong", "test 1 of 2: ValueError: no (exit code 1)"),
        ("def main():\n    a, b = map(int, input().split())\n    print(a + b)\nif __name__ == '__main__': main()",
         "correct", ""),
        ("print(3)", "wrong", "test 2 of 2: printed '3', expected '11'"),
        ("while True: print('x' * 1000)", "wrong", "printed more than 64 KB"),
        ("while True: pass", "timeout", ""),
        ("import os, time\nif os.fork() == 0:\n    time.sleep(1000)\n" + ADDS, "correct", ""),
        ("import os\nos._exit(0)", "wrong", "test 1 of 2: printed '', expected '3'"),
        ("import sys\nsys.stderr.write('x' * 10**7)\n" + ADDS, "correct", ""),
        ("open('answer.py', 'w').write('print(11)')\nprint(3)", "wrong", "test 2 of 2: printed '3'"),
        ("import os\nprint([n for n in os.listdir('/proc/self/fd') if int(n) > 3], os.listdir('.'))", "wrong",
         '''printed "[] ['answer.py']"'''),
    ],
)  # fmt: skip
def test_how_programs_end(source: str, outcome: str, detail: str) -> None:
    verdict = printed(source, options=PROGRAM.model_copy(update={"cpu_s": 2, "timeout_s": 60.0}))
    assert verdict.outcome == outcome and detail in verdict.detail, verdict


def test_tests_of_a_program_that_cannot_be_read_are_unverifiable() -> None:
    for tests in ("not JSON", '{"inputs": ["1"], "outputs": []}', [{"input": "1"}], 3, ["assert True"]):
        verdict = printed(ADDS, tests)
        assert verdict.outcome == "unverifiable" and "cannot be read as tests" in verdict.detail


# --- without a sandbox ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which bubblewrap is not installed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox_problem.cache_clear()
    program._say_unsandboxed.cache_clear()


@pytest.fixture(autouse=True)
def _forget_what_was_tried() -> Any:
    yield
    sandbox_problem.cache_clear()


@pytest.mark.usefixtures("no_sandbox")
def test_without_a_sandbox_a_recipe_is_refused_before_it_runs() -> None:
    with pytest.raises(
        RecipeError, match=r"no sandbox here: bwrap is not installed; install bubblewrap .*, or set allow"
    ):
        check_verifier(resolve(VerifierSection(code=CodeVerifier())), prompt(test_list=["assert True"]))


@pytest.mark.usefixtures("no_sandbox")
def test_without_a_sandbox_nothing_runs_and_nothing_is_wrong() -> None:
    verdict = verdict_on("open('/tmp/never', 'w')", "assert True")
    assert (verdict.outcome, verdict.detail) == ("error", "no sandbox: bwrap is not installed")


@pytest.mark.usefixtures("no_sandbox")
def test_running_without_a_sandbox_is_said_aloud_once_and_in_every_verdict(capfd: pytest.CaptureFixture[str]) -> None:
    options = CodeVerifier(allow_unsandboxed=True, timeout_s=60)
    check_sandbox(options)
    check_sandbox(options)
    said = capfd.readouterr().err
    assert said.count("WITHOUT a sandbox, with all rights of this process (bwrap is not installed)") == 1
    for source, outcome in (("def f(): return 1", "correct"), ("def f(): return 2", "wrong")):
        verdict = verdict_on(source, "assert f() == 1", options=options)
        assert verdict.outcome == outcome and verdict.detail.startswith("unsandboxed: ")
    looping = CodeVerifier(allow_unsandboxed=True, timeout_s=60, cpu_s=1)
    assert verdict_on("def f():\n    while True: pass", "assert f()", options=looping).outcome == "timeout"
    killing = "import os, signal\ndef f(): os.kill(os.getppid(), signal.SIGKILL)"
    assert verdict_on(killing, "assert f()", options=options).outcome == "error", "not correct, whatever it does"


@needs_sandbox
def test_where_there_is_a_sandbox_it_is_used_even_if_it_need_not_be(capfd: pytest.CaptureFixture[str]) -> None:
    options = CodeVerifier(allow_unsandboxed=True)
    check_sandbox(options)
    assert capfd.readouterr().err == ""
    assert verdict_on("def f(): return 1", "assert f() == 1", options=options).detail == "1 assertion passed"


def test_a_sandbox_that_fails_to_start_is_an_error_and_never_a_wrong_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    (tmp_path / "setpriv").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox_problem.cache_clear()
    problem = sandbox_problem()
    assert problem == "bubblewrap cannot start: bwrap: No permissions to create a new namespace"
    with pytest.raises(RecipeError, match="No permissions to create a new namespace; install bubblewrap"):
        check_sandbox(CodeVerifier())
    # it worked when it was tried, and fails now
    ended = sandbox.run_sandboxed("print(1)", b"", 30, 1000, 1)
    found = program._finding(ended, "token")
    assert found.outcome == "error" and "the sandbox did not start: bwrap: No permissions" in found.detail


# --- in recipes and pools -------------------------------------------------------------------------------------------

ROWS = [
    {"question": "Write f.", "tests": ["assert f() == 1"], "test_imports": [], "solution": "x"},
    {"question": "Write g.", "tests": ["assert g() == 2"], "test_imports": [], "solution": "y"},
]


def source_with(tmp_path: Path, verifier: Any) -> PromptSource:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return PromptSource.model_validate({"name": "s", "file": path, "gold_column": None, "verifier": verifier})


def test_prompts_keep_the_columns_that_their_verifier_reads(tmp_path: Path) -> None:
    options = {"tests_column": "tests", "setup_column": "test_imports"}
    read = read_source(source_with(tmp_path, {"code": options}))[0]
    assert read.row == {"question": "Write f.", "tests": ["assert f() == 1"], "test_imports": []}
    assert resolve(read.verifier) == resolve(VerifierSection(code=CodeVerifier.model_validate(options)))
    combined = read_source(source_with(tmp_path, {"any_of": ["choice", {"code": {"tests_column": "tests"}}]}))[0]
    assert set(combined.row) == {"question", "tests"}
    assert set(read_source(source_with(tmp_path, "number"))[0].row) == {"question"}


def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'test' \(did you mean 'tests'\?\)"):
        read_source(source_with(tmp_path, {"code": {"tests_column": "test"}}))


@needs_sandbox
def test_a_pool_judges_code_and_ends_what_takes_too_long() -> None:
    spec = resolve(VerifierSection(code=CodeVerifier(cpu_s=60, timeout_s=60)))
    sources = ["def f(): return 1", "def f(): return 2", "import time\ndef f(): time.sleep(1000)", "def f(): return 1"]
    judged = prompt(test_list=["assert f() == 1"]).model_copy(update={"source": "s"})
    with VerifierPool(workers=2, timeout_s=5, by_source={"s": spec}) as pool:
        verdicts = list(pool.verify_many((judged, trace(fenced(source))) for source in sources))
    assert [verdict.outcome for verdict in verdicts] == ["correct", "wrong", "timeout", "correct"]
    assert {verdict.verifier for verdict in verdicts} == {spec.label}


# --- values between the processes -----------------------------------------------------------------------------------

NUMBERS = st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False) | st.fractions()
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.decimals(allow_nan=False) | st.text() | st.binary() | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner, max_size=4)
    ),
    max_leaves=20,
)
SETS = st.sets(st.integers() | st.text(), max_size=4) | st.frozensets(st.tuples(st.integers()), max_size=4)


def there_and_back(value: Any) -> Any:
    def refuse(*found: object) -> Any:
        raise AssertionError(f"not plain: {found}")

    return decode(json.loads(json.dumps(encode(value, refuse))), refuse)


@given(PLAIN)
def test_plain_values_travel_without_changing_value_or_type(value: Any) -> None:
    back = there_and_back(value)
    assert back == value and repr(back) == repr(value)


@given(SETS)
def test_sets_travel_whatever_their_order(value: Any) -> None:
    assert there_and_back(value) == value and type(there_and_back(value)) is type(value)


def test_subclasses_travel_as_what_they_are_based_on() -> None:
    point = namedtuple("point", "x y")
    assert there_and_back([Counter("aab"), OrderedDict(b=1), point(1, 2)]) == [{"a": 2, "b": 1}, {"b": 1}, (1, 2)]
    assert there_and_back([Fraction(1, 3), Decimal("1.10"), date(2024, 2, 29), datetime(2024, 2, 29, 1)]) == [
        Fraction(1, 3), Decimal("1.10"), date(2024, 2, 29), datetime(2024, 2, 29, 1)
    ]  # fmt: skip
    assert math.isnan(there_and_back(float("nan"))) and there_and_back(-math.inf) == -math.inf
    assert repr(there_and_back([-0.0, range(1, 9, 2), bytearray(b"x"), "\ud800"])) == repr(
        [-0.0, range(1, 9, 2), bytearray(b"x"), "\ud800"]
    )


@pytest.mark.parametrize("hostile", [["text", "os.system", "true"], ["text", "builtins.eval", "1"], ["nothing", 1]])
def test_nothing_but_plain_values_can_be_sent(hostile: Any) -> None:
    def refuse(*found: object) -> Any:
        raise ValueError(found)

    with pytest.raises(ValueError):
        decode(hostile, refuse)


# --- a real data set ------------------------------------------------------------------------------------------------


def _without_body(source: str) -> str:
    """The same functions, each returning a value that no test expects."""
    with warnings.catch_warnings(action="ignore"):  # some of them have backslashes that Python will refuse one day
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = [ast.Return(ast.Constant("no test expects this"))]
    return ast.unparse(ast.fix_missing_locations(tree))


@needs_sandbox
@pytest.mark.full
@pytest.mark.skipif(not MBPP.exists(), reason="no MBPP beside the checkout (shared/data)")
@pytest.mark.parametrize(("broken", "outcome"), [(False, "correct"), (True, "wrong")])
def test_all_reference_solutions_of_mbpp_pass_and_none_without_its_body(broken: bool, outcome: str) -> None:
    spec = resolve(VerifierSection(code=CodeVerifier(setup_column="test_imports", timeout_s=120)))
    rows = json.loads(MBPP.read_text(encoding="utf-8"))
    pairs = [
        (
            prompt(test_list=row["test_list"], test_imports=row["test_imports"]).model_copy(update={"source": "s"}),
            trace(fenced(_without_body(row["code"]) if broken else row["code"]), trace_id=str(row["task_id"])),
        )
        for row in rows
    ]
    with VerifierPool(by_source={"s": spec}) as pool:
        others = [verdict for verdict in pool.verify_many(pairs) if verdict.outcome != outcome]
    assert len(rows) == 427 and others == []
