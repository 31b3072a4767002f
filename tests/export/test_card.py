"""The artifact's card: true to the manifest, fit for hubs, and broken by no name; nothing of this machine is in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.ancestry import Ancestry
from distill.config import Recipe, recipe_from
from distill.export.card import card, card_problem, first_messages
from distill.export.manifest import Attempt, Draft, Evaluated, FileEntry, GateEntry, LicenceReading
from distill.export.origins import ancestry_of_export, evaluated, licence_reading, origins
from distill.records import Example, Message, Prompt, write_records
from distill.runs import RunOptions, Step, open_run

MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}]
FILES = {
    "tokenizer.json": FileEntry(sha256="1" * 64, bytes=2_000_000),
    "onnx/model_q4.onnx": FileEntry(sha256="2" * 64, bytes=100_000),
    "onnx/model_q4.onnx_data": FileEntry(sha256="3" * 64, bytes=900_000),
}
SELECTED = {
    "teachers": [
        {"model": "deepseek-reasoner", "revision": "r1", "engine": "openai", "engine_version": "2", "licence": "MIT",
         "examples": 2}
    ]
}  # fmt: skip


def recipe_of(**sections: Any) -> Recipe:
    plain: dict[str, Any] = {
        "name": "sums",
        "prompts": [{"name": "gsm8k", "hub": {"id": "openai/gsm8k"}, "licence": "MIT"}],
        "teacher": {"engine": "openai", "model": "deepseek-reasoner", "licence": "MIT"},
        "student": {"init": "Qwen/Qwen2.5-0.5B", "licence": "Apache-2.0", "phases": [{"kind": "sft", "lr": 1e-5}]},
        "export": {"variants": ["int4"]},
    }
    for name, section in sections.items():
        plain[name] = plain.get(name, {}) | section if isinstance(section, dict) else section
    return recipe_from(plain)


@pytest.fixture
def export_step(tmp_path: Path) -> Callable[..., Step]:
    """A function from the licence of the prompts to an export step behind sealed select and train runs."""

    def make(licence: str | None = "MIT", **upstream: Step) -> Step:
        runs, options = tmp_path / "runs", RunOptions(runs=tmp_path / "runs", quiet=True)
        select = Step("select", "select", "sums", "5" * 16, {}, {}, runs)
        prompt = Prompt.of([Message(role="user", content="1 + 1?")], source="gsm8k", licence=licence)
        with open_run(select, options) as run:
            examples = [Example(prompt=prompt, trace_id=f"t{n}", reasoning="I add.", answer="2") for n in range(2)]
            write_records(run.path("examples.jsonl"), examples)
            run.seal("e" * 64, SELECTED)
        fields = {"base": {"root": f"Qwen/Qwen2.5-0.5B@{'c' * 40}"}}
        train = Step("train", "train:0", "sums", "7" * 16, fields, {"examples": select}, runs, {"phase": 0})
        with open_run(train, options) as run:
            run.path("model").mkdir()
            run.path("model/model.safetensors").write_bytes(b"weights")
            run.seal("d", {"tokens": 90_292})
        return Step("export", "export", "sums", "9" * 16, {}, {"model": train, **upstream}, runs)

    return make


def draft_of(recipe: Recipe, step: Step, ancestry: Ancestry, **changes: Any) -> Draft:
    plain: dict[str, Any] = {
        "name": recipe.name,
        "variants": ("int4",),
        "default": "int4",
        "origins": origins(recipe, step, ancestry),
        "licences": licence_reading(ancestry),
        "tools": {"onnxruntime-genai": "0.18.0"},
        "gates": (
            GateEntry(name="mean_kl", variant="int4", status="passed", value=0.03125, limit=0.5),
            GateEntry(name="webgpu", variant="int4", status="not_run", detail="no browser here"),
        ),
        "evaluation": (
            Evaluated(model="student", set="heldout", problems=256, accuracy=0.8, low=0.75, high=0.85),
            Evaluated(
                model="int4", set="heldout", problems=256, accuracy=0.78, low=0.72, high=0.83, mean_tokens=41.0,
                stop_rate=0.99,
            ),
        ),
    }  # fmt: skip
    return Draft(**{**plain, **changes})


def written(recipe: Recipe, step: Step, **changes: Any) -> tuple[Draft, str]:
    ancestry = ancestry_of_export(recipe, step)
    draft = draft_of(recipe, step, ancestry, **changes)
    return draft, card(draft, FILES, ancestry, MESSAGES, {"int4": {"head": 600_000, "body": 300_000}})


def header_of(text: str) -> dict[str, Any]:
    top, _, rest = text.removeprefix("---\n").partition("\n---")
    assert rest
    return dict(yaml.safe_load(top))


# --- what the artifact is bound to ------------------------------------------------------------------------------------


def test_an_artifact_is_bound_to_student_data_teacher_base_and_recipe(export_step: Callable[..., Step]) -> None:
    recipe, step = recipe_of(), export_step()
    made = origins(recipe, step, ancestry_of_export(recipe, step))
    assert made.student.id == f"sums-{'7' * 16}"
    # printf weights | sha256sum
    assert made.student.revision == "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    assert made.base is not None and (made.base.id, made.base.revision) == ("Qwen/Qwen2.5-0.5B", "c" * 40)
    assert [(one.id, one.revision, one.engine, one.licence) for one in made.teachers] == [
        ("deepseek-reasoner", "r1", "openai 2", "MIT")
    ]
    assert made.data is not None and made.recipe is not None
    assert (made.data.id, made.data.digest, made.data.examples) == (f"sums-{'5' * 16}", "e" * 64, 2)
    assert made.data.tokens == 90_292 and made.data.licences == {"gsm8k": ("MIT",)}
    assert (made.recipe.name, made.recipe.identity) == ("sums", "9" * 16)


def test_an_export_that_trains_nothing_is_bound_to_the_model_alone(tmp_path: Path) -> None:
    recipe = recipe_from({"name": "own", "export": {"model": "/home/ada/model", "licence": "MIT"}})
    step = Step("export", "export", "own", "9" * 16, {"root": "f" * 64}, {}, tmp_path)
    ancestry = ancestry_of_export(recipe, step)
    made = origins(recipe, step, ancestry)
    assert (made.student.id, made.student.revision, made.student.licence) == ("model", "f" * 64, "MIT")
    assert (made.data, made.teachers) == (None, ())
    assert licence_reading(ancestry) == LicenceReading(licence="mit")


def test_only_models_that_were_evaluated_have_numbers(export_step: Callable[..., Step], tmp_path: Path) -> None:
    found = {
        "available": True, "problems": 4, "accuracy": 0.5, "accuracy_low": 0.2, "accuracy_high": 0.8, "stop_rate": 1.0,
    }  # fmt: skip
    base = Step("eval", "eval:base", "sums", "3" * 16, {}, {}, tmp_path / "runs")
    with open_run(base, RunOptions(runs=tmp_path / "runs", quiet=True)) as run:
        run.seal("d", found)
    rows = evaluated(recipe_of(), export_step(base=base), {"int4": found | {"accuracy": 0.25}, "int8": {}})
    assert [(row.model, row.accuracy, row.low, row.mean_tokens) for row in rows] == [
        ("base", 0.5, 0.2, None), ("int4", 0.25, 0.2, None)
    ]  # fmt: skip


# --- licences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "teacher", "prompts", "licence", "said"),
    [
        ("Apache-2.0", "MIT", "MIT", "apache-2.0", ""),
        ("llama3.2", "MIT", "MIT", "llama3.2", "name begin with `Llama`"),
        ("Apache-2.0", "cc-by-nc-4.0", "MIT", "other", "forbids commercial use"),
        ("Apache-2.0", "llama3", "MIT", "other", "forbids using what it writes to improve models outside its own"),
        ("Apache-2.0", "MIT", "cc-by-sa-4.0", "other", ""),
        ("gpl-3.0", "MIT", "cc-by-sa-4.0", "other", "contradict one another"),
        (None, "MIT", "MIT", "unknown", "no licence is stated"),
        ("Apache-2.0", "MIT", None, "unknown", "no licence is stated"),
    ],
)
def test_the_licence_follows_from_base_teacher_and_data_and_contradictions_are_reported(
    export_step: Callable[..., Step], base: str | None, teacher: str, prompts: str | None, licence: str, said: str
) -> None:
    recipe = recipe_of(student={"licence": base}, teacher={"licence": teacher})
    step = export_step(prompts)
    if teacher != "MIT":  # the traces' own word stands beside the recipe's
        SELECTED["teachers"][0]["licence"] = teacher
    try:
        draft, text = written(recipe, step)
    finally:
        SELECTED["teachers"][0]["licence"] = "MIT"
    assert draft.licences.licence == licence
    assert header_of(text)["license"] == licence
    questions = "\n".join(draft.licences.questions)
    assert (said in questions) if said else questions == ""
    assert all(f"- {question}" in text for question in draft.licences.questions)


def test_a_name_that_a_licence_asks_for_is_not_asked_for_again(export_step: Callable[..., Step]) -> None:
    recipe = recipe_of(name="Llama-sums", student={"licence": "llama3.2"})
    draft, _ = written(recipe, export_step())
    assert draft.licences.questions == ()


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_header_is_what_hubs_read(export_step: Callable[..., Step]) -> None:
    _, text = written(recipe_of(), export_step())
    assert header_of(text) == {
        "library_name": "transformers.js",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": "Qwen/Qwen2.5-0.5B",
        "base_model_relation": "finetune",
        "datasets": ["openai/gsm8k"],
        "tags": [
            *("onnx", "onnxruntime-genai", "transformers.js", "optimum", "reasoning", "knowledge-distillation"),
            "distill",
        ],
    }
    huggingface = pytest.importorskip("huggingface_hub")
    assert huggingface.ModelCard(text).data.base_model_relation == "finetune"


def test_the_card_has_the_numbers_with_intervals_the_gates_and_what_was_not_run(
    export_step: Callable[..., Step],
) -> None:
    tried = Attempt(variant="int4", scheme="4 bits, head in 4", bytes=800_000)
    ships = Attempt(variant="int4", scheme="4 bits, head in 8", bytes=1_000_000, chosen=True)
    measured = {"bench": {"int4": {"tokens_per_s": 123.456, "threads": 2}}, "build_seconds": 5}
    draft, text = written(recipe_of(), export_step(), attempts=(tried, ships), measured=measured)
    assert "| student in torch |  | 80.0% | 75.0% to 85.0% | 256 |  |  |" in text
    assert "| int4 | 1.0 | 78.0% | 72.0% to 83.0% | 256 | 41 | 99.0% |" in text
    assert "| int4 | mean_kl | passed | 0.03125 | 0.5 |  |" in text
    assert "| int4 | webgpu | not run |  |  | no browser here |" in text
    assert "**Not run, so not passed:** int4 webgpu." in text
    assert "| int4 | 0.6 | 0.3 |" in text and "(tokenizer, settings): 2.0 MB" in text
    assert (
        "| int4 | 4 bits, head in 4 | 0.8 |  |  |" in text
        and "| int4 | 4 bits, head in 8 | 1.0 |  | **ships** |" in text
    )
    assert "| `int4.tokens_per_s` | 123.5 |" in text and "build_seconds" not in text
    assert card_problem(text, draft, FILES) is None


@pytest.mark.parametrize(
    ("old", "new", "section"),
    [("78.0%", "88.0%", "results"), ("not run |", "passed |", "gates"), ("| 1.0 | 78", "| 0.5 | 78", "results")],
)
def test_a_card_with_other_numbers_than_the_manifests_is_told(
    export_step: Callable[..., Step], old: str, new: str, section: str
) -> None:
    draft, text = written(recipe_of(), export_step())
    assert card_problem(text.replace(old, new), draft, FILES) == f"its {section} are not those of the manifest"


def test_the_card_shows_how_each_runtime_loads_the_folder(export_step: Callable[..., Step]) -> None:
    import ast
    import re

    recipe = recipe_of(format={"system": 'Say "yes".'})
    step = export_step()
    _, text = written(recipe, step)
    blocks = dict(re.findall(r"```(python|js)\n(.*?)\n```", text, re.DOTALL))
    assert 'pipeline("text-generation", "FOLDER", { dtype: "q4" })' in blocks["js"]
    assert 'file_name="onnx/model_q4.onnx"' in blocks["python"]
    for block in re.findall(r"```python\n(.*?)\n```", text, re.DOTALL):
        ast.parse(block)
    assert "Send it as above with every conversation" in text
    assert first_messages(recipe, step)[0] == {"role": "system", "content": 'Say "yes".'}


def test_nothing_of_this_machine_is_in_the_card(export_step: Callable[..., Step], tmp_path: Path) -> None:
    recipe = recipe_of(student={"init": "/home/ada lovelace/base.gguf"}, teacher={"model": "/home/ada lovelace/r1"})
    _, text = written(recipe, export_step())
    assert "`base.gguf`" in text and "lovelace" not in text and str(tmp_path) not in text
    assert "base_model" not in header_of(text)


def test_no_text_breaks_the_card_or_its_header(export_step: Callable[..., Step]) -> None:
    from markdown_it import MarkdownIt

    evil = '``` `x` | <b>\n# [y](http://z)\n---\nlicense: mit\n"'
    recipe = recipe_of(
        student={"init": evil, "licence": evil}, teacher={"model": evil, "licence": evil}, format={"system": evil}
    )
    gate = GateEntry(name=evil, variant="int4", status="not_run", detail=evil)
    attempt = Attempt(variant="int4", scheme=evil, bytes=1, gates=(gate,))
    measured = {"bench": {evil: evil}}
    _, text = written(
        recipe, export_step(evil), gates=(gate,), attempts=(attempt,), tools={evil: evil}, measured=measured
    )
    header = header_of(text)
    assert header["license"] == "other" and "base_model" not in header
    tokens = MarkdownIt("commonmark").enable("table").parse(text.partition("\n---\n")[2])
    inside = [one for token in tokens for one in (token.children or ())]
    assert {token.content for token in inside if token.type == "html_inline"} <= {"<code>", "</code>"}
    assert not [token for token in inside if token.type == "link_open"]
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == [
        *("sums", "Results", "Size", "Gates", "Attempts", "Speed and memory", "Use", "Origin", "Licences", "Limits"),
        "Checking it",
    ]
