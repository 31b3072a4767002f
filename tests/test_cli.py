"""The command line: fast help, one-line errors, exit codes, and verbs that only read or write single files."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distill
from distill.cli import STAGE_VERBS, guarded
from distill.errors import BudgetError, DistillError, GateError, Interrupted, RecipeError
from distill.records import Flag, Item, Message, Prompt, Teacher, Trace, Usage, Verdict, write_records

Cli = Callable[..., "conftest.Said"]  # type: ignore[name-defined]  # noqa: F821 - pytest keeps conftest out of reach

HEAVY = ("torch", "transformers", "onnxruntime", "onnxruntime_genai", "datasets", "reasoning_gym", "sympy", "pandas")
VERBS = (
    *STAGE_VERBS, "init", "generate", "score", "select", "train", "report", "inspect", "verify", "sign", "doctor",
    "sweep", "chat", "serve", "bench",
)  # fmt: skip


def bare_environment() -> dict[str, str]:
    """The environment without what would measure coverage in child processes."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST"))}


def python(code: str) -> str:
    """stdout of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=bare_environment(), timeout=60
    )
    return done.stdout


# --- help -----------------------------------------------------------------------------------------------------------


def test_help_takes_under_half_a_second_of_cpu() -> None:
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "distill.cli", "--help"], check=True, capture_output=True, env=bare_environment()
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["init"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['distill', *{arguments!r}]\n"
        "from distill.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert python(code).splitlines()[-1] == "LOADED []"


def test_help_names_every_verb(cli: Cli) -> None:
    assert set(VERBS) <= set(cli("--help").out.split())


def test_version_is_the_package_s() -> None:
    from importlib.metadata import version

    assert distill.__version__ == version("distill")


def test_version_prints_it(cli: Cli) -> None:
    assert cli("--version").out == f"distill {distill.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_offered_for_the_common_shells(shell: str) -> None:
    variables = {**bare_environment(), "_DISTILL_COMPLETE": f"source_{shell}"}
    done = subprocess.run(["distill"], capture_output=True, text=True, env=variables | {"PATH": _bin_first()})
    assert done.returncode == 0 and "_DISTILL_COMPLETE" in done.stdout


def _bin_first() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


# --- errors and signals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RecipeError("recipe.yaml:3: two\nlines"), 2, "error: recipe.yaml:3: two lines\n"),
        (GateError("int4 flips answers"), 3, "error: int4 flips answers\n"),
        (BudgetError("2 dollars are spent"), 3, "error: 2 dollars are spent\n"),
        (Interrupted(signal.SIGINT), 130, "stopped by SIGINT; run the same command to continue\n"),
        (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM; run the same command to continue\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_becomes_one_line_and_its_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    import typer

    def verb() -> None:
        raise error

    with pytest.raises(typer.Exit) as stop:
        guarded(verb)()
    assert (stop.value.exit_code, capsys.readouterr().err) == (code, line)


def test_a_bug_keeps_its_traceback() -> None:
    def verb() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(verb)()


WAITING_VERB = """
import sys, time
from distill.cli import app, guarded
from distill.interrupts import graceful

@app.command("wait")
@guarded
def wait(saving: bool = False) -> None:
    print("ready", flush=True)
    if not saving:
        time.sleep(30)
    with graceful() as stop:
        while not stop.requested:
            time.sleep(0.01)
        print("saved", flush=True)
        time.sleep(0.5)
        stop.raise_if_requested()

app(["wait", *sys.argv[1:]])
"""


def _signalled(signum: int, *arguments: str, times: int = 1) -> tuple[int, str]:
    """Exit code and what was printed after `ready` of a verb that waits and is sent a signal."""
    command = [sys.executable, "-c", WAITING_VERB, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=bare_environment()) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        for _ in range(times):
            time.sleep(0.2)
            child.send_signal(signum)
        said = child.stdout.read()
    return child.returncode, said


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_at_once_where_nothing_needs_saving(signum: int, code: int) -> None:
    assert _signalled(signum) == (code, "")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_lets_a_graceful_section_save(signum: int, code: int) -> None:
    assert _signalled(signum, "--saving") == (code, "saved\n")


def test_the_second_signal_aborts_the_saving() -> None:
    started = time.monotonic()
    code, _ = _signalled(signal.SIGINT, "--saving", times=2)
    assert code == 130 and time.monotonic() - started < 15


# --- init -----------------------------------------------------------------------------------------------------------


def test_init_lists_the_shipped_recipes(cli: Cli) -> None:
    listed = cli("init", "--json").json
    assert {"r1-distill-qwen2.5-0.5b", "r1-distill-llama-3.2-1b", "recorded-gsm8k"} <= set(listed)
    assert all(text and not text.startswith("#") for text in listed.values())


def test_init_writes_a_recipe_that_loads(cli: Cli, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    said = cli("init", "r1-distill-qwen2.5-0.5b", "--to", target)
    assert said.code == 0 and str(target) in said.out
    assert distill.load_recipe(target).name == "mine"


def test_init_never_overwrites(cli: Cli, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("mine")
    said = cli("init", "recorded-gsm8k", "--to", target)
    assert said.code == 2 and "--to" in said.error_line and target.read_text() == "mine"


def test_init_names_the_nearest_recipe(cli: Cli) -> None:
    assert "did you mean 'recorded-gsm8k'" in cli("init", "recorded-gsm8").error_line


def test_init_into_a_folder_that_is_not_there_says_so(cli: Cli, tmp_path: Path) -> None:
    said = cli("init", "recorded-gsm8k", "--to", tmp_path / "none" / "mine.yaml")
    assert said.code == 2 and "no such folder" in said.error_line


# --- pushing to a hub -----------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_recipe(write_recipe: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    (tmp_path / "sums.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    phases = [{"kind": "sft", "max_steps": 1}]
    return write_recipe(
        prompts=[{"name": "sums", "file": "sums.jsonl"}],
        teacher={"engine": "solver"},
        student={"init": str(tiny_model("llama")), "phases": phases},
    )


@pytest.mark.parametrize("verb", ["select", "train"])
def test_private_goes_with_a_push(cli: Cli, tiny_recipe: Path, tmp_path: Path, verb: str) -> None:
    said = cli(verb, tiny_recipe, "--runs", tmp_path / "runs", "--private")
    assert said.code == 2 and said.error_line == "--private goes with --push-to-hub USER/NAME"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("verb", ["select", "train"])
def test_a_push_that_cannot_succeed_is_refused_before_any_work(
    cli: Cli, tiny_recipe: Path, tmp_path: Path, verb: str
) -> None:
    pytest.importorskip("huggingface_hub")
    said = cli(verb, tiny_recipe, "--runs", tmp_path / "runs", "--push-to-hub", "nobody")
    assert said.code == 2 and "write it as USER/NAME" in said.error_line
    said = cli(verb, tiny_recipe, "--runs", tmp_path / "runs", "--push-to-hub", "ada/tiny")
    assert said.code == 2 and "HF_HUB_OFFLINE is set" in said.error_line
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_push_shows_the_plan_alone(cli: Cli, tiny_recipe: Path, tmp_path: Path) -> None:
    said = cli("train", tiny_recipe, "--runs", tmp_path / "runs", "--push-to-hub", "ada/tiny", "--dry-run", "--json")
    assert said.code == 0 and [row["label"] for row in said.json["stages"]][-1] == "train:0"
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_trains_nothing_has_nothing_to_push(cli: Cli, write_recipe: Callable[..., Path]) -> None:
    said = cli("train", write_recipe(), "--dry-run")
    assert said.code == 2 and "nothing to train; add a student section" in said.error_line


# --- inspect --------------------------------------------------------------------------------------------------------


def trace(number: int, **fields: object) -> Trace:
    values = {
        "trace_id": f"t{number}",
        "prompt_id": f"p{number}",
        "cfg": "c",
        "sample": 0,
        "reasoning": f"I add {number}.",
        "answer": f"\\boxed{{{number}}}",
        "raw": "",
        "think": "closed",
        "finish_reason": "stop",
        "usage": Usage(output=12),
        "teacher": Teacher(engine="solver"),
    }
    return Trace.model_validate(values | fields)


def verdict(number: int, outcome: str) -> Verdict:
    return Verdict.model_validate(
        {"trace_id": f"t{number}", "gold": str(number), "verifier": "number@1", "outcome": outcome}
    )


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Four traces with verdicts and a flag beside them: correct, wrong, cut off, failed."""
    write_records(
        tmp_path / "traces.jsonl",
        [
            trace(1),
            trace(2),
            trace(3, finish_reason="length", think="unclosed", answer=""),
            trace(4, error="503 from the server", answer="", reasoning=None, finish_reason="error"),
        ],
    )
    write_records(tmp_path / "verdicts.jsonl", [verdict(1, "correct"), verdict(2, "wrong"), verdict(3, "unverifiable")])
    write_records(tmp_path / "flags.jsonl", [Flag(trace_id="t3", flag="truncated", detail="cut at 12 tokens")])
    return tmp_path / "traces.jsonl"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["t1", "t2", "t3", "t4"]),
        (["--wrong"], ["t2"]),
        (["--correct"], ["t1"]),
        (["--truncated"], ["t3"]),
        (["--failed"], ["t4"]),
        (["--key", "p3"], ["t3"]),
        (["--key", "t1"], ["t1"]),
        (["--limit", "2"], ["t1", "t2"]),
        (["--wrong", "--truncated"], []),
    ],
)
def test_inspect_filters(cli: Cli, traces: Path, options: list[str], expected: list[str]) -> None:
    shown = cli("inspect", traces, *options, "--json").json
    assert [one["trace"]["trace_id"] for one in shown] == expected


def test_inspect_shows_reasoning_answer_verdict_and_flags(cli: Cli, traces: Path) -> None:
    text = cli("inspect", traces).out
    assert "reasoning: I add 2." in text and "\\boxed{2}" in text
    assert "wrong (number@1; reference '2')" in text
    assert "truncated: cut at 12 tokens" in text and "503 from the server" in text


def test_inspect_shortens_long_texts_unless_told_otherwise(cli: Cli, tmp_path: Path) -> None:
    write_records(tmp_path / "long.jsonl", [trace(1, reasoning="word " * 2000)])
    assert "--full shows all" in cli("inspect", tmp_path / "long.jsonl").out
    assert cli("inspect", tmp_path / "long.jsonl", "--full").out.count("word") == 2000


def test_inspect_reads_evaluated_items(cli: Cli, tmp_path: Path) -> None:
    prompt = Prompt.of([Message(role="user", content="What is 1 + 1?")], gold="2", source="sums")
    write_records(
        tmp_path / "items.jsonl",
        [Item(model="student", set="heldout", prompt=prompt, trace=trace(3), verdict=verdict(3, "wrong"))],
    )
    assert "What is 1 + 1?" in cli("inspect", tmp_path / "items.jsonl", "--wrong").out


def test_inspect_shows_the_items_of_each_exported_variant(cli: Cli, tmp_path: Path) -> None:
    prompt = Prompt.of([Message(role="user", content="What is 1 + 1?")], gold="2")
    folder = tmp_path / "runs" / "export" / "sums-0"
    for number, variant in enumerate(("int4", "int8"), 1):
        (folder / f"eval-{variant}").mkdir(parents=True)
        item = Item(model=variant, set="heldout", prompt=prompt, trace=trace(number), verdict=verdict(number, "wrong"))
        write_records(folder / f"eval-{variant}" / "items.jsonl", [item])
    (folder / "stage.json").write_text(json.dumps({"label": "export", "upstream": {}}))
    assert [one["label"] for one in cli("inspect", folder, "--json").json] == ["export:int4", "export:int8"]
    assert [one["label"] for one in cli("inspect", folder, "--stage", "export:int8", "--json").json] == ["export:int8"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("none.jsonl", None, "no such file"),
        ("rows.jsonl", '{"question": 1}\n', "neither traces nor items"),
        ("broken.jsonl", "what\n", "not JSON Lines"),
        ("torn.jsonl", '{"trace_id": 1, "cfg": 2, "raw": 3}\n', "torn.jsonl:1: not a Trace"),
        ("none", None, "no such run"),
    ],
)
def test_inspect_refuses_what_holds_no_traces(
    cli: Cli, tmp_path: Path, name: str, text: str | None, expected: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    said = cli("inspect", tmp_path / name)
    assert said.code == 2 and expected in said.error_line


def test_inspect_leaves_a_torn_last_line_out(cli: Cli, traces: Path) -> None:
    with traces.open("a") as file:
        file.write('{"trace_id": "t5", "prom')
    assert len(cli("inspect", traces, "--json").json) == 4


# --- verify ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def artifact(tmp_path: Path, artifacts: Any) -> Path:
    """An artifact with a gate that passed and one that was not run."""
    return Path(artifacts.make(tmp_path / "artifact"))


def test_verify_prints_every_check_and_calls_none_passed_that_was_not_run(cli: Cli, artifact: Path) -> None:
    said = cli("verify", artifact, "--json", "--no-golden")
    assert said.code == 0, said.err
    assert {check["name"]: check["status"] for check in said.json} == {
        "files": "passed", "settings": "passed", "graphs": "passed", "end tokens": "passed",
        "bill of materials": "passed", "its schema": "passed", "card": "passed", "signature": "not_run",
        "gate int4 mean_kl": "passed", "gate int4 accuracy_drop": "not_run", "golden int4": "not_run",
    }  # fmt: skip
    shown = cli("verify", artifact).out
    assert "8 passed, 0 failed, 3 not run (signature, gate int4 accuracy_drop, golden int4)" in shown


def test_verify_can_require_every_check(cli: Cli, artifact: Path) -> None:
    said = cli("verify", artifact, "--require")
    assert said.code == 3 and "accuracy_drop" in said.error_line and "mean_kl" in said.out


def test_verify_refuses_a_changed_file_with_exit_3(cli: Cli, artifact: Path) -> None:
    (artifact / "onnx" / "model_q4.onnx").write_bytes(b"others!")
    said = cli("verify", artifact)
    assert said.code == 3 and "onnx/model_q4.onnx" in said.error_line and said.out == ""


# --- doctor ---------------------------------------------------------------------------------------------------------


def test_doctor_says_what_is_here_and_never_a_secret(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = cli("doctor", "--json", "--threads", 1)
    assert found.json["threads"]["used"] == 1 and "cpu" in found.json["devices"]
    assert found.json["versions"]["distill"] == distill.__version__
    assert found.json["hub"]["token_set"] and "hf_secret" not in found.out


def test_doctor_says_which_command_adds_a_missing_extra(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill import doctor

    monkeypatch.setitem(doctor.EXTRAS, "train", ("no_such_module",))
    assert "train: no_such_module; add with: pip install 'distill[train]'" in cli("doctor").out


# --- Python API -----------------------------------------------------------------------------------------------------


def test_importing_distill_loads_nothing_but_itself() -> None:
    heavy = (*HEAVY, "pydantic", "typer", "rich", "yaml")
    assert python(f"import sys, distill; print([name for name in {heavy!r} if name in sys.modules])") == "[]\n"


def test_importing_distill_silences_telemetry() -> None:
    name = "ORT_DISABLE_TELEMETRY"
    code = f"import os; os.environ.pop({name!r}, 0); import distill; print(os.environ[{name!r}])"
    assert python(code) == "1\n"


@pytest.mark.parametrize("name", distill.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(distill, name) is not None


def test_what_type_checkers_see_is_what_is_there() -> None:
    lines = Path(distill.__file__).read_text(encoding="utf-8").splitlines()
    seen = {line.rpartition(" as ")[2] for line in lines if line.startswith("    from distill.")}
    assert seen == set(distill.__all__) - {"__version__"}


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        distill.trian  # noqa: B018


def test_errors_are_one_tree() -> None:
    named = [getattr(distill, name) for name in distill.__all__ if name.endswith("Error")]
    assert all(issubclass(error, DistillError) for error in named)


def test_json_of_the_command_line_is_the_result_of_the_call(cli: Cli, traces: Path) -> None:
    called = [one.to_json() for one in distill.inspect(traces)]
    assert cli("inspect", traces, "--json").json == json.loads(json.dumps(called))
