"""The report: numbers known by hand appear, nothing runs or is fetched, and what is missing is said to be missing.

The run store is written by hand, without a model: four problems, a teacher that is right on all, a base on one, a
student on three, an int4 variant on two.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import distill
from distill.config import load_recipe, recipe_from
from distill.errors import DataError, RunError
from distill.evaluation import summarise
from distill.records import (
    Example,
    Item,
    Message,
    Outcome,
    Prompt,
    Teacher,
    Trace,
    Usage,
    Verdict,
    digest_json,
    write_json,
    write_records,
)  # fmt: skip
from distill.report import report_data, write_report
from distill.report.charts import axis_to, round_ticks
from distill.report.content import Report, read_report
from distill.report.lineage import find_pipeline
from distill.report.markup import compact, dollars, duration
from distill.report.page import render
from distill.runs import OpenRun, RunOptions, Step, open_run

Cli = Callable[..., Any]
CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\" onmouseover='alert(3)' ${page} {page} &lt;"


# --- a run store by hand --------------------------------------------------------------------------------------------


def question(number: int, source: str = "sums") -> Prompt:
    text = f"What is {number} + 1?"
    return Prompt.of([Message(role="user", content=text)], gold=str(number + 1), source=source)


HELD_OUT = [question(number) for number in range(4)]
TRAINING = [question(number) for number in range(10, 20)]


def trace_of(prompt: Prompt, model: str, answer: str, **changes: Any) -> Trace:
    given: dict[str, Any] = {
        "trace_id": digest_json([model, prompt.prompt_id, answer, changes.get("sample", 0)])[:16],
        "prompt_id": prompt.prompt_id, "cfg": model, "sample": 0, "reasoning": f"{model} thinks", "answer": answer,
        "think": "closed", "finish_reason": "stop", "usage": Usage(input=5, output=40), "latency_s": 0.5,
        "teacher": Teacher(engine="solver"),
    }  # fmt: skip
    return Trace(**{**given, **changes})


def item_of(model: str, prompt: Prompt, right: bool, set_name: str = "heldout", **changes: Any) -> Item:
    answer = changes.pop("answer", f"\\boxed{{{prompt.gold if right else 'no'}}}")
    trace = trace_of(prompt, model, answer, **changes)
    outcome: Outcome = "correct" if right else "wrong"
    verdict = Verdict(trace_id=trace.trace_id, gold=prompt.gold, verifier="number@1", outcome=outcome)
    return Item(model=model, set=set_name, prompt=prompt, trace=trace, verdict=verdict)


def items_of(model: str, right: Sequence[bool], **changes: Any) -> list[Item]:
    return [item_of(model, prompt, verdict, **changes) for prompt, verdict in zip(HELD_OUT, right, strict=True)]


RIGHT = {
    "teacher": (True, True, True, True),
    "base": (True, False, False, False),
    "student": (True, True, True, False),
    "int4": (True, True, False, False),
}

GATES = [
    {"name": "mean_kl", "variant": "int4", "status": "passed", "value": 0.03, "limit": 0.1, "unit": "nats/token",
     "detail": "over 2,077 positions"},
    {"name": "top1_agreement", "variant": "int4", "status": "failed", "value": 0.871, "limit": 0.9, "unit": "share",
     "detail": "too far from the student"},
    {"name": "genai_tokens", "variant": "int4", "status": "not_run", "value": None, "limit": 0.0,
     "unit": "prompts that differ", "detail": "no golden prompts"},
]  # fmt: skip


ATTEMPTS = [
    {"scheme": "int4 k-quant", "bytes": 900_000, "build_seconds": 3.0, "accuracy": 0.25, "tokens_per_s": 700.0,
     "gates": [{"name": "mean_kl", "status": "failed", "value": 0.08}], "chosen": False},
    {"scheme": "int4 gptq, int8 head", "bytes": 1_250_000, "build_seconds": 95.0, "accuracy": None,
     "tokens_per_s": None, "gates": [{"name": "mean_kl", "status": "passed", "value": 0.03}], "chosen": True},
]  # fmt: skip


@dataclass
class Store:
    """Builds stages one by one and writes the pipeline's record over all of them."""

    runs: Path
    steps: dict[str, Step] = field(default_factory=dict)
    teacher: Mapping[str, Any] = field(default_factory=lambda: {"engine": "solver"})

    def step(self, label: str, **upstream: str) -> Step:
        stage = label.partition(":")[0]
        identity = digest_json([label])[:16]
        above = {role: self.steps[other] for role, other in upstream.items() if other in self.steps}
        step = Step(stage, label, "-".join(["tiny", *label.split(":")[1:]]), identity, {}, above, self.runs)
        self.steps[label] = step
        return step

    def run(
        self, step: Step, counts: Mapping[str, Any], write: Callable[[OpenRun], object], sealed: bool = True
    ) -> None:
        with open_run(step, RunOptions(self.runs, threads=2)) as run:
            write(run)
            if sealed:
                run.seal("0" * 64, counts)

    def prompts(self) -> None:
        def write(run: OpenRun) -> None:
            write_records(run.path("train.jsonl"), TRAINING)
            write_records(run.path("heldout.jsonl"), HELD_OUT)

        self.run(self.step("prompts"), {"rows": 15, "duplicates": 1, "heldout": 4, "train": 10}, write)

    def generate(self, **counts: Any) -> None:
        answers = [trace_of(prompt, "solver", f"\\boxed{{{prompt.gold}}}") for prompt in TRAINING[1:]]
        lost = trace_of(TRAINING[0], "solver", "", error="HTTP 503 <b>busy</b>", finish_reason="error", reasoning=None)

        def write(run: OpenRun) -> None:
            write_records(run.path("traces.jsonl"), answers)
            write_records(run.path("failed.jsonl"), [lost])

        known = {"samples": 10, "answered": 9, "failed": 1, "reused": 4, "possibly_paid_twice": 2}
        self.run(self.step("generate", prompts="prompts"), {**known, **counts}, write)

    def select(self) -> None:
        kept = [trace_of(prompt, "solver", f"\\boxed{{{prompt.gold}}}") for prompt in TRAINING]
        examples = [
            Example(prompt=prompt, trace_id=trace.trace_id, reasoning=trace.reasoning, answer=trace.answer)
            for prompt, trace in list(zip(TRAINING, kept))[3:]
        ]
        lost = trace_of(TRAINING[0], "solver", "", error="HTTP 503 <b>busy</b>", finish_reason="error", reasoning=None)
        funnel = {
            "schema": 1, "samples": 10, "examples": 7, "prompts": 7, "dropped": 3,
            "funnel": [
                {"reason": "api-error", "why": "the request failed", "dropped": 1, "remaining": 9},
                {"reason": "wrong", "why": "answer did not match the reference", "dropped": 2, "remaining": 7},
            ],
            "outcomes": {"sums": {"correct": 7, "wrong": 2}}, "flags": {"api-error": 1},
        }  # fmt: skip
        dropped = [(lost, TRAINING[0], "api-error"), (kept[1], TRAINING[1], "wrong"), (kept[2], TRAINING[2], "wrong")]
        rows = [
            {"schema": 1, "trace_id": trace.trace_id, "prompt_id": prompt.prompt_id, "reason": reason}
            for trace, prompt, reason in dropped
        ]

        def write(run: OpenRun) -> None:
            write_json(run.path("funnel.json"), funnel)
            write_records(run.path("examples.jsonl"), examples)
            run.path("dropped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        self.run(self.step("select", traces="generate", prompts="prompts"), funnel, write)

    def train(self, steps: int = 4, sealed: bool = True, tail: str = "") -> None:
        rows = [
            {"step": n, "loss": 3.0 / n, "lr": 1e-3, "grad_norm": 1.0, "tokens": 100, "supervised": 50, "packs": 1,
             "seconds": 0.25}
            for n in range(1, steps + 1)
        ]  # fmt: skip
        counts = {
            "steps": steps, "tokens": 100 * steps, "supervised_tokens": 50 * steps, "packing_efficiency": 0.975,
            "documents": 7,
        }  # fmt: skip

        def write(run: OpenRun) -> None:
            run.path("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
            run.path("model").mkdir()
            run.path("model/model.safetensors").write_bytes(b"0" * 2_500_000)

        self.run(self.step("train:0", examples="select"), counts, write, sealed)

    def evaluate(self, model: str, items: Sequence[Item] | None = None, set_name: str = "heldout") -> None:
        chosen = items_of(model, RIGHT[model]) if items is None else items
        summary = summarise(chosen, [32, 64, 128])
        step = self.step(f"eval:{model}:{set_name}", prompts="prompts")
        self.run(step, summary, lambda run: write_evaluation(run.folder, chosen))

    def export(self, gates: Sequence[Mapping[str, Any]] | None, sealed: bool, items: Sequence[Item] = ()) -> None:
        def write(run: OpenRun) -> None:
            (run.path("artifact") / "onnx").mkdir(parents=True)
            (run.path("artifact") / "onnx" / "model_q4.onnx").write_bytes(b"0" * 1_250_000)
            write_json(run.path("parity-int4.json"), {"gates": GATES[:1]})
            write_json(run.path("attempts-int4.json"), {"attempts": ATTEMPTS})
            if gates is not None:
                write_json(run.path("gates.json"), {"gates": list(gates)})
            run.path("eval-int4").mkdir()
            write_evaluation(run.path("eval-int4"), items or items_of("int4", RIGHT["int4"]))

        self.run(self.step("export", model="train:0", prompts="prompts"), {}, write, sealed)

    def record(self) -> Path:
        """Write the pipeline's record: what ran, and the recipe's other stages as not run."""
        for label in ("select", "train:0", "eval:student:heldout", "export"):
            if label not in self.steps:
                self.step(label, **({"prompts": "prompts"} if label == "export" else {}))
        recipe = {
            "name": "tiny", "prompts": [], "teacher": dict(self.teacher), "student": {"phases": [{"kind": "sft"}]},
            "evaluate": {}, "export": {"variants": ["int4"], "set": "heldout"},
        }  # fmt: skip
        steps = {
            label: {
                "stage": step.stage, "identity": step.identity, "sealed": step.sealed, "args": {},
                "folder": step.folder.relative_to(self.runs).as_posix(),
                "upstream": {role: other.label for role, other in step.upstream.items()},
            }
            for label, step in self.steps.items()
        }  # fmt: skip
        path = self.runs / "pipelines" / "tiny-0123456789abcdef.json"
        path.parent.mkdir(exist_ok=True)
        known = {"name": "tiny", "identity": "0123456789abcdef", "updated": "2026-11-22T11:23:12+00:00"}
        write_json(path, {"schema": 1, **known, "recipe": recipe, "steps": steps})
        return path


def write_evaluation(folder: Path, items: Sequence[Item]) -> None:
    write_records(folder / "items.jsonl", items)
    write_json(folder / "summary.json", summarise(items, [32, 64, 128]))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture
def whole(store: Store) -> Path:
    """The record of a pipeline that ran to the end and was stopped by a gate."""
    store.prompts()
    store.generate(usd=0.0, spent_usd=0.0, output_tokens=0)
    store.select()
    store.train()
    for model in ("teacher", "base", "student"):
        store.evaluate(model)
    store.export(GATES, sealed=False)
    return store.record()


# --- reading a page -------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of a page: text, tables, links; fails on tags that do not close."""

    VOID = ("meta", "br", "img", "link", "path", "polyline")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} closes something else"

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.words.append(data)
        if self.rows and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        """All text, with white space folded."""
        return " ".join(" ".join(self.words).split())

    def row(self, *starts: str) -> list[str]:
        """The one row of a table that starts with these cells."""
        found = [row for row in self.rows if [cell.strip() for cell in row[: len(starts)]] == list(starts)]
        assert len(found) == 1, (starts, found)
        return [" ".join(cell.split()) for cell in found[0]]


def page_of(record: Path) -> Page:
    return Page(write_report(record, RunOptions(), record.parent.parent / "report.html").read_text(encoding="utf-8"))


def content_of(record: Path) -> Report:
    return read_report(find_pipeline(record, RunOptions()))


# --- the answer -----------------------------------------------------------------------------------------------------


def test_the_answer_comes_first_with_its_numbers(whole: Path) -> None:
    page = page_of(whole)
    before_sections = page.text[: page.text.index("Did the student learn?")]
    # Wilson's interval of 3 out of 4, by hand: (0.75 + z²/8 ± z·sqrt(0.75·0.25/4 + z²/64)) / (1 + z²/4), z = 1.96
    for shown in ("teacher 100.0%", "base 25.0%", "student 75.0% [30.1, 95.4]", "int4 50.0%", "1.25 MB, 80 tokens/s"):
        assert shown in before_sections
    assert "Gain +50.0 points" in before_sections
    assert "int4 minus student −25.0 points" in before_sections


def test_every_number_of_the_evaluations_is_in_the_table(whole: Path) -> None:
    student = page_of(whole).row("student", "75.0% [30.1, 95.4]")
    assert student[2].startswith("+50.0 ")
    assert student[3:] == ["–", "4", "40", "100.0%", "0.0%", "80", "2.5"]


def test_answers_that_changed_are_counted(whole: Path) -> None:
    page = page_of(whole)
    assert page.row("base → student")[2:] == ["1", "0", "2", "1"]
    assert page.row("student → int4")[2:] == ["2", "1", "0", "1"]


def test_what_quantization_lost_is_shown_first_and_side_by_side(whole: Path) -> None:
    cases = content_of(whole).scores.cases
    assert cases[0].kind == "student right, int4 wrong" and cases[0].prompt_id == HELD_OUT[2].prompt_id
    assert [(answer.model, answer.outcome) for answer in cases[0].answers] == [
        ("teacher", "correct"), ("base", "wrong"), ("student", "correct"), ("int4", "wrong"),
    ]  # fmt: skip
    assert len({case.prompt_id for case in cases}) == len(cases) == 4
    assert "student thinks" in page_of(whole).text


def test_the_funnel_counts_from_asked_to_examples(whole: Path) -> None:
    page = page_of(whole)
    assert page.row("asked for")[2:] == ["10", "", ""]
    assert page.row("answered")[2:] == ["9", "1", "requests without an answer"]
    assert page.row("wrong", "")[2:] == ["7", "2", "answer did not match the reference"]
    assert page.row("examples")[2:] == ["7", "", "train, of 7 problems"]
    assert page.row("sums")[1:] == ["7", "2", "0", "0", "0", "9"]
    assert "api-error" not in [row[0] for row in page.rows]  # it is what keeps answered below asked


def test_one_dropped_trace_of_each_reason_is_shown(whole: Path) -> None:
    dropped = {example.dropped: example for example in content_of(whole).facts.examples if example.dropped}
    assert dropped.keys() == {"api-error", "wrong"}
    assert dropped["api-error"].answer == "HTTP 503 <b>busy</b>"
    assert dropped["wrong"].prompt == "What is 11 + 1?"


def test_training_is_told_in_steps_tokens_and_loss(whole: Path) -> None:
    text = page_of(whole).text
    assert "Steps 4" in text and "Tokens 400 200 supervised" in text
    assert "400 tokens/s 1.0 s of steps" in text  # 4 · 100 tokens in 4 · 0.25 s
    assert "3.000 → 0.750" in text and "97.5%" in text


def test_stages_have_state_time_and_folder(whole: Path, store: Store) -> None:
    row = page_of(whole).row("export")
    assert row[1] == "unfinished" and row[5] == f"export/tiny-{store.steps['export'].identity}"


def test_the_environment_is_told_once_when_it_is_the_same(whole: Path) -> None:
    assert page_of(whole).row("threads") == ["threads", "2"]
    assert len(content_of(whole).facts.environments) == 1


# --- n/a, not run, unfinished ---------------------------------------------------------------------------------------


def test_a_gate_that_was_not_run_is_never_shown_as_passed(whole: Path) -> None:
    page = page_of(whole)
    assert page.row("int4", "mean kl")[2:5] == ["✓ passed", "0.03 nats/token", "0.1"]
    assert page.row("int4", "top1 agreement")[2:5] == ["✗ failed", "87.1%", "90.0%"]
    assert page.row("int4", "genai tokens")[2:] == ["not run", "n/a", "0", "no golden prompts"]
    assert "Gates 1 failed 1 not run, 1 passed" in page.text
    assert "Stopped by a gate: int4 top1_agreement" in page.text


def test_every_scheme_that_was_tried_shows_what_it_cost_and_what_it_missed(whole: Path) -> None:
    page = page_of(whole)
    first = ["int4", "int4 k-quant", "0.9", "3", "0.08", "n/a", "25.0%", "700", "mean kl", ""]
    assert page.row("int4", "int4 k-quant") == first
    last = ["int4", "int4 gptq, int8 head", "1.2", "95", "0.03", "n/a", "n/a", "n/a", "nothing", "✓ passed"]
    assert page.row("int4", "int4 gptq, int8 head") == last


def test_gates_of_an_unfinished_export_are_not_run(store: Store) -> None:
    store.prompts()
    store.train(sealed=False)
    store.export(None, sealed=False)
    page = page_of(store.record())
    assert page.row("int4", "mean kl")[2] == "✓ passed"
    assert page.row("int4", "all others")[2] == "not run"
    assert "Gates 1 not run 0 failed, 1 passed" in page.text


def test_a_pipeline_that_has_only_traces_says_what_is_missing(store: Store) -> None:
    store.prompts()
    store.generate(usd=0.25, spent_usd=0.125, output_tokens=5000, input_tokens=100, reasoning_tokens=4000)
    page = page_of(store.record())
    assert "Not here yet: select (not run), train:0 (not run), eval:student:heldout (not run), export (not run)." in (
        page.text
    )
    assert "nothing is measured yet: student (not run yet), int4 (not run yet)" in page.text
    assert page.row("examples")[2:] == ["n/a", "", "not selected yet"]
    assert "Price of all answers $0.25 Bought by this run $0.12 Output tokens 5,000 of which reasoning 4,000" in (
        page.text
    )
    assert "Possibly paid twice 2" in page.text and "Found in the ledger 4" in page.text


def test_a_teacher_without_answers_is_not_available_and_why(store: Store) -> None:
    store.prompts()
    lost = items_of("teacher", (False,) * 4, error="no recorded trace for this prompt")
    store.evaluate("teacher", lost)
    store.evaluate("student")
    record = store.record()
    teacher = content_of(record).scores.scores[0]
    assert teacher.accuracy is None and teacher.reasons["accuracy"] == "no recorded trace for this prompt"
    text = page_of(record).text
    assert "teacher n/a no recorded trace for this prompt" in text
    assert "n/a: teacher" not in text and "n/a: base: not evaluated" in text


def test_an_engine_that_counts_no_tokens_has_no_speed_and_no_budget_curve(store: Store) -> None:
    store.prompts()
    store.evaluate("teacher", items_of("teacher", (True,) * 4, usage=Usage()))
    store.evaluate("student")
    record = store.record()
    teacher = content_of(record).scores.scores[0]
    assert teacher.mean_tokens is None and teacher.tokens_per_s is None and not teacher.within_tokens
    assert "teacher is not drawn: its engine counts no tokens." in page_of(record).text


def test_evaluations_of_other_problems_are_not_subtracted(store: Store) -> None:
    store.prompts()
    store.evaluate("base", items_of("base", RIGHT["base"])[:3])
    store.evaluate("student")
    student = content_of(store.record()).scores.scores[1]
    assert student.minus_base is None and "different problems" in student.reasons["minus_base"]


def test_several_samples_a_problem_are_told(store: Store) -> None:
    store.prompts()
    both = [*items_of("student", RIGHT["student"]), *items_of("student", (False,) * 4, sample=1)]
    store.evaluate("student", both)
    assert page_of(store.record()).row("student", "37.5% [12.5, 50.0]")[4] == "4 × 2"


def test_every_set_has_its_own_part_the_gate_s_set_first(store: Store) -> None:
    store.prompts()
    store.evaluate("student", set_name="exam")
    store.evaluate("student")
    report = content_of(store.record())
    assert [score.set for score in report.scores.scores] == ["heldout", "heldout", "exam"]
    assert report.headline is not None and report.headline.set == "heldout"


def test_a_phase_that_is_training_shows_the_steps_so_far(store: Store) -> None:
    store.prompts()
    store.train(sealed=False, tail='{"step": 5, "lo')
    page = page_of(store.record())
    assert "Steps 4 so far" in page.text and "train:0 · sft unfinished" in page.text


def test_a_long_training_is_drawn_as_means_of_steps(store: Store) -> None:
    store.prompts()
    store.train(steps=601)
    phase = content_of(store.record()).facts.phases[0]
    assert phase.averaged == 3 and len(phase.curve) == 201 and phase.steps == 601
    assert phase.curve[0].loss == pytest.approx((3.0 + 1.5 + 1.0) / 3)
    assert (phase.curve[-1].step, phase.curve[-1].tokens) == (601, 60_100)
    assert phase.last_loss == pytest.approx(3.0 / 601)


# --- safe, self-contained, accessible -------------------------------------------------------------------------------


def hostile(value: Any) -> Any:
    """The same with every text replaced by one that would do harm, but for words the page itself knows."""
    known = {"done", "unfinished", "not run", "passed", "failed", "not_run", "teacher", "base", "student", "variant"}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: hostile(getattr(value, one.name)) for one in fields(value) if one.init})
    if isinstance(value, tuple):
        return tuple(map(hostile, value))
    if isinstance(value, dict):
        return {key: hostile(part) for key, part in value.items()}
    return HOSTILE if isinstance(value, str) and value not in known else value


def assert_harmless(page: Page) -> None:
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "form", "base"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert not {"src", "srcset", "data", "action", "formaction"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")


def test_text_of_models_cannot_run(store: Store) -> None:
    store.prompts()
    for model in ("base", "student"):
        answers = items_of(model, RIGHT[model], reasoning=HOSTILE, answer=HOSTILE)
        store.evaluate(model, answers)
    page = page_of(store.record())
    assert_harmless(page)
    assert "<script>alert(1)</script>" in page.text  # shown as it was written


def test_no_text_of_any_kind_gets_into_the_markup(whole: Path) -> None:
    report = hostile(content_of(whole))
    funnel = replace(report.facts.funnel, outcomes={HOSTILE: {HOSTILE: 1}}, flags={HOSTILE: 1})
    environments = (replace(report.facts.environments[0], settings={HOSTILE: HOSTILE}),)
    page = Page(render(replace(report, facts=replace(report.facts, funnel=funnel, environments=environments))))
    assert_harmless(page)
    assert page.text.count("<script>alert(1)</script>") > 50


def test_the_check_sees_a_script() -> None:
    with pytest.raises(AssertionError):
        assert_harmless(Page("<p><script>alert(1)</script></p>"))
    with pytest.raises(AssertionError):
        assert_harmless(Page('<p onclick="alert(1)">x</p>'))


def test_the_page_loads_nothing(whole: Path) -> None:
    html = render(content_of(whole))
    page = Page(html)
    assert_harmless(page)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style
    policies = [attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes and tag == "meta"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert len(html) < 200_000


def test_tables_have_captions_and_charts_say_what_they_show(whole: Path) -> None:
    page = page_of(whole)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") > 5
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    charts = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(charts) >= 5 and all(len(attributes["aria-label"] or "") > 30 for attributes in charts)
    assert ("html", {"lang": "en"}) in page.tags


def test_links_of_the_page_lead_somewhere(whole: Path) -> None:
    page = page_of(whole)
    anchors = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    links = [(attributes.get("href") or "").removeprefix("#") for tag, attributes in page.tags if tag == "a"]
    assert links == anchors and len(set(anchors)) == len(anchors)


def test_a_long_text_loses_its_middle(store: Store) -> None:
    store.prompts()
    store.evaluate("student", items_of("student", RIGHT["student"], answer="a" * 3000 + "b" * 9000 + "c" * 3000))
    answer = content_of(store.record()).scores.cases[0].answers[0].answer
    assert answer == "a" * 3000 + "\n[… 9,000 characters …]\n" + "c" * 3000


# --- targets --------------------------------------------------------------------------------------------------------


def test_a_stage_folder_stands_for_the_pipeline_that_names_it(whole: Path, store: Store) -> None:
    folder = store.steps["eval:base:heldout"].folder
    assert report_data(folder, RunOptions()) == report_data(whole, RunOptions())


def test_a_stage_folder_without_a_pipeline_stands_for_its_lineage(store: Store) -> None:
    store.prompts()
    store.evaluate("base")
    report = content_of(store.steps["eval:base:heldout"].folder)
    assert [stage.label for stage in report.facts.stages] == ["prompts", "eval:base:heldout"]
    assert report.facts.recipe_yaml == "" and "25.0%" in render(report)


def test_a_recipe_finds_its_own_runs(store: Store, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "mine.yaml").write_text("prompts: [{name: sums, file: prompts.jsonl}]\nteacher: {engine: solver}\n")
    recipe = load_recipe(tmp_path / "mine.yaml")
    step = distill.make_plan(recipe, runs=store.runs).steps["prompts"]
    store.run(step, {"rows": 1, "train": 1}, lambda run: None)
    page = Page(distill.write_report(str(tmp_path / "mine.yaml"), runs=store.runs).read_text(encoding="utf-8"))
    assert "1 problems read, 1 to be answered by the teacher." in page.text
    assert "Not here yet: generate (not run), select (not run)." in page.text


def test_a_recipe_that_never_ran_has_no_report(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "mine.yaml").write_text("prompts: [{name: sums, file: prompts.jsonl}]\nteacher: {engine: solver}\n")
    with pytest.raises(RunError, match="run the recipe first"):
        write_report(tmp_path / "mine.yaml", RunOptions(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["nothing.json", "notes.txt", "other.json"])
def test_what_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=name):
        write_report(tmp_path / name, RunOptions())


def test_a_result_that_was_changed_after_the_stage_ended_is_refused(whole: Path, store: Store) -> None:
    items = store.steps["eval:student:heldout"].folder / "items.jsonl"
    items.write_text(items.read_text().replace('"outcome":"wrong"', '"outcome":"correct"'))
    with pytest.raises(RunError, match=r"items\.jsonl: holds other bytes"):
        write_report(whole, RunOptions())
    assert not (store.runs / "reports").exists()


def test_the_report_lies_in_the_run_store_unless_told_otherwise(whole: Path, store: Store, cli: Cli) -> None:
    expected = store.runs / "reports" / "tiny-0123456789abcdef.html"
    assert cli("report", whole).out.strip() == str(expected)
    first = expected.read_bytes()
    assert cli("report", whole).code == 0 and expected.read_bytes() == first  # no clock in it
    assert [path.name for path in expected.parent.iterdir()] == [expected.name]


def test_plain_values_say_what_the_page_says(whole: Path) -> None:
    data = json.loads(json.dumps(report_data(whole, RunOptions()), allow_nan=False))
    assert data["schema"] == 1 and data["name"] == "tiny"
    assert data["headline"]["gain"]["value"] == 0.5
    assert data["headline"]["variant_minus_student"]["value"] == -0.25
    assert data["scores"]["changes"][1]["lost"] == 1
    assert data["facts"]["artifact"]["gates"][2]["status"] == "not_run"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_recipe_on_the_page_is_the_recipe_that_ran(path: Path, tmp_path: Path) -> None:
    from distill.report.facts import recipe_yaml
    from distill.report.lineage import Pipeline

    recipe = load_recipe(path)
    text = recipe_yaml(Pipeline(recipe.name, "", tmp_path, {}, recipe.model_dump(mode="json")))
    assert recipe_from(yaml.safe_load(text)) == recipe


# --- charts and numbers ---------------------------------------------------------------------------------------------


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_round_few_and_span_the_values(low: float, span: float, most: int) -> None:
    high = low + span
    ticks = [value for value, _ in round_ticks(low, high, most=most)]
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * span and ticks[-1] >= high - 1e-6 * span
    assert 2 <= len(ticks) <= most + 2
    assert round(step / 10 ** math.floor(math.log10(step * 1.000001)), 3) in (1, 2, 5)


def test_values_that_are_all_the_same_still_have_an_axis() -> None:
    assert [text for _, text in round_ticks(0.0, 0.0)] == ["0", "0.2"]
    assert axis_to("tokens", 300.0).ticks[-1] == (300.0, "300")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(0.001), "under 0.1 s"), (duration(9.94), "9.9 s"), (duration(59), "59 s"),
        (duration(270), "4 min 30 s"), (duration(7500), "2 h 05 min"),
        (compact(0.0), "0"), (compact(8.9e-12), "8.9e−12"), (compact(0.03012), "0.0301"), (compact(12345.6), "12,346"),
        (dollars(0.0), "$0.00"), (dollars(0.0042), "$0.0042"), (dollars(1234.5), "$1,234.50"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(text: str, expected: str) -> None:
    assert text == expected
