"""The built-in verifiers against a reader: real answers of which every disagreement with the reference was read.

`verifier_labels.json` holds, for real traces that lie beside the checkout, what a person found on reading them: all
finished answers that a verifier did not call correct, and a seeded sample of those it did. It holds ids and labels
only. An id is a hash of question and answer, so the order of rows is of no matter; so is the sample, which takes the
ids of least hash. `says_the_reference` is what was read: whether the answer says what the reference says (`error`:
there is no answer), whoever of them is right; `label` is why they differ, or how they agree.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distill.config import FormatConfig, PromptSource, Sampling, TeacherConfig
from distill.engines import Request
from distill.engines.recorded import RecordedEngine, normalised
from distill.prompts import read_source
from distill.records import Outcome, Prompt, Teacher, Trace, digest_json
from distill.runs import RunOptions
from distill.verifiers import math, number

TRACES = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces"
LABELS: dict[str, Any] = json.loads(Path(__file__).with_name("verifier_labels.json").read_text(encoding="utf-8"))
SETS: dict[str, dict[str, Any]] = LABELS["sets"]
GSM8K = ("gsm8k_deepseek_r1", "gsm8k_r1_distill_qwen_32b")
MATH = "math_train_r1_distill_qwen_1.5b"
COLUMNS = {
    MATH: (
        {"question_column": "problem_text", "gold_column": "ground_truth_solution", "gold": "boxed"},
        {"question_column": "problem_text", "response_column": "generated_cot", "strip_prompt": True},
    )
}
MOST_FALSE = 0.005
"""The share of traces below which false and missing verdicts together must stay on GSM8K."""

needs_traces = pytest.mark.skipif(not TRACES.exists(), reason="no real traces beside the checkout (shared/data)")


class Judged(NamedTuple):
    """What both verifiers say of one trace."""

    number: Outcome
    math: Outcome
    finished: bool


@cache
def judged(name: str) -> Mapping[str, Judged]:
    """Every trace of a file by its id."""
    source, recorded = COLUMNS.get(name, ({"gold": "after_hashes"}, {}))
    path = TRACES / f"{name}.jsonl"
    prompts = read_source(PromptSource.model_validate({"name": "real", "file": path, **source}))
    teacher = TeacherConfig.model_validate({"engine": "recorded", "recorded": {"files": [path], **recorded}})
    engine = RecordedEngine.from_teacher(teacher, FormatConfig(), RunOptions())
    found = {}
    for prompt in prompts:
        for sample in range(len(engine.samples[normalised(prompt.row["question"])])):
            trace = recorded_trace(engine, prompt, sample)
            ident = digest_json([normalised(prompt.row["question"]), trace.raw])[:16]
            verdicts = number(prompt, trace).outcome, math(prompt, trace).outcome
            found[ident] = Judged(*verdicts, finished=trace.think != "unclosed")
    return found


def recorded_trace(engine: RecordedEngine, prompt: Prompt, sample: int) -> Trace:
    found = engine.answer(Request(prompt, sample, Sampling(), seed=0))
    return Trace(
        trace_id="t", prompt_id=prompt.prompt_id, cfg="real", sample=sample, reasoning=found.reasoning,
        answer=found.answer, raw=found.raw, think=found.think, error=found.error, teacher=Teacher(engine="recorded"),
    )  # fmt: skip


def agrees(name: str, verdicts: Judged) -> bool:
    """Whether every verifier that is checked on this set says correct."""
    return verdicts.math == "correct" and (name == MATH or verdicts.number == "correct")


def sampled(names: tuple[str, ...], size: int) -> set[str]:
    """The agreements that were to be read: those whose seeded hash is least."""
    ids = [ident for name in names for ident, verdicts in judged(name).items() if agrees(name, verdicts)]
    return set(sorted(ids, key=lambda ident: hashlib.sha256(f"{LABELS['seed']}:{ident}".encode()).hexdigest())[:size])


def false_verdicts(labelled: Mapping[str, Mapping[str, Any]], verifier: str) -> list[str]:
    """Ids of which a verifier says the opposite of the reader; `unverifiable` says nothing."""
    return [
        ident for ident, row in labelled.items() if row[verifier] not in (row["says_the_reference"], "unverifiable")
    ]


def missing_verdicts(labelled: Mapping[str, Mapping[str, Any]], verifier: str) -> list[str]:
    """Ids of which a verifier says that it cannot tell."""
    return [ident for ident, row in labelled.items() if row[verifier] == "unverifiable"]


def test_labels_hold_ids_and_labels_only_and_say_all_that_is_needed() -> None:
    outcomes = {"correct", "wrong", "unverifiable", "error"}
    for name, parts in SETS.items():
        for ident, row in {**parts["disagreements"], **parts["agreements"]}.items():
            assert len(ident) == 16 and set(row) == {"number", "math", "says_the_reference", "label"}, name
            assert {row["number"], row["math"], row["says_the_reference"]} <= outcomes
            assert row["label"] in LABELS["labels"], row["label"]
    assert sum(len(SETS[name]["agreements"]) for name in GSM8K) == 100
    assert len(SETS[MATH]["agreements"]) == 50


def test_a_false_verdict_would_be_counted() -> None:
    row = {"number": "correct", "math": "unverifiable", "says_the_reference": "wrong", "label": ""}
    assert false_verdicts({"a": row}, "number") == ["a"] and false_verdicts({"a": row}, "math") == []
    assert missing_verdicts({"a": row}, "math") == ["a"]


@needs_traces
@pytest.mark.parametrize("name", SETS)
def test_every_disagreement_with_the_reference_was_read(name: str) -> None:
    disagreements = {i for i, verdicts in judged(name).items() if verdicts.finished and not agrees(name, verdicts)}
    assert disagreements == set(SETS[name]["disagreements"])


@needs_traces
@pytest.mark.parametrize(("names", "size"), [(GSM8K, 100), ((MATH,), 50)])
def test_the_agreements_that_were_read_are_the_seeded_sample(names: tuple[str, ...], size: int) -> None:
    assert sampled(names, size) == {ident for name in names for ident in SETS[name]["agreements"]}


@needs_traces
@pytest.mark.parametrize("name", SETS)
def test_verdicts_are_those_that_were_read(name: str) -> None:
    for ident, row in {**SETS[name]["disagreements"], **SETS[name]["agreements"]}.items():
        verdicts = judged(name)[ident]
        assert (verdicts.number, verdicts.math) == (row["number"], row["math"]), f"{ident}: {row['label']}"


@needs_traces
@pytest.mark.parametrize("verifier", ["number", "math"])
def test_fewer_than_one_in_200_verdicts_on_800_real_traces_is_false_or_missing(verifier: str) -> None:
    labelled = {i: row for name in GSM8K for part in SETS[name].values() for i, row in part.items()}
    traces = sum(len(judged(name)) for name in GSM8K)
    assert traces == 800
    assert false_verdicts(labelled, verifier) == []
    assert len(missing_verdicts(labelled, verifier)) < MOST_FALSE * traces


@needs_traces
def test_no_verdict_of_math_on_competition_problems_is_false() -> None:
    labelled = {i: row for part in SETS[MATH].values() for i, row in part.items()}
    finished = sum(verdicts.finished for verdicts in judged(MATH).values())
    assert false_verdicts(labelled, "math") == []
    assert len(missing_verdicts(labelled, "math")) < 0.03 * finished
