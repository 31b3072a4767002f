"""The artifact's README: what it is, how to load it, and the numbers of this run."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from distill.cards import code, fenced, markdown_table, text, without_folders
from distill.config import Recipe
from distill.format import with_system
from distill.records import Message, Prompt, read_records
from distill.runs import Step

from .manifest import GateEntry

LOADING = """import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(do_sample=False, max_length=1024)
generator = og.Generator(model, params)
messages = {messages}
generator.append_tokens(tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True)))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))"""


def write_card(
    recipe: Recipe,
    step: Step,
    gates: Sequence[GateEntry],
    summaries: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, int],
) -> str:
    """Markdown of the artifact's README.md."""
    student = recipe.student
    base = code(without_folders(student.init if student else (recipe.export.model or "" if recipe.export else "")))
    lines = [
        f"# {recipe.name}",
        "",
        f"A student distilled with `distill` from {base}, as ONNX for onnxruntime-genai.",
        "",
        "| variant | MB | accuracy | 95% interval | mean tokens | stops |",
        "|---|---|---|---|---|---|",
        *(_row(variant, size, summaries.get(variant)) for variant, size in sizes.items()),
        "",
        *_upstream_accuracy(step),
        "## Gates",
        "",
        markdown_table(["variant", "gate", "status", "value", "limit", "detail"], map(_gate, gates)),
        "",
        "## Use",
        "",
        fenced(LOADING.format(messages=_messages(recipe, step)), "python"),
        "",
        *_system_note(recipe),
        "`distill verify` on this folder re-checks every file's sha256 and the golden prompts.",
        "",
        "## Origin",
        "",
        f"- base: {base}, licence: {_licence(student.licence if student else None)}",
        f"- teacher: {_teacher(recipe)}",
        "",
    ]
    return "\n".join(lines)


def _messages(recipe: Recipe, step: Step) -> str:
    """A Python literal of the JSON messages of a first call: the recipe's system prompt and a held-out problem."""
    question = "What is the capital of France?"
    if "prompts" in step.upstream:
        first = next(read_records(step.result("prompts").path("heldout.jsonl"), Prompt), None)
        question = first.text if first else question
    return repr(json.dumps(with_system([Message(role="user", content=question)], recipe.format.system)))


def _system_note(recipe: Recipe) -> list[str]:
    """What a caller must send where the recipe set a system prompt, which the template alone does not carry."""
    if recipe.format.system is None:
        return []
    return [
        f"The student was trained with the system message {code(json.dumps(recipe.format.system))}. Send it as above"
        " with every conversation: without it the template may put a default of its own, which the student never saw.",
        "",
    ]


def _row(variant: str, size: int, summary: Mapping[str, Any] | None) -> str:
    if not summary or not summary.get("available"):
        return f"| {variant} | {size / 1e6:,.1f} | not evaluated | | | |"
    interval = f"{summary['accuracy_low']:.1%} to {summary['accuracy_high']:.1%}"
    return (
        f"| {variant} | {size / 1e6:,.1f} | {summary['accuracy']:.1%} | {interval} |"
        f" {summary['mean_tokens']:.0f} | {summary['stop_rate']:.1%} |"
    )


def _upstream_accuracy(step: Step) -> list[str]:
    """Accuracy of the torch models on the same problems."""
    lines = []
    for model in ("base", "student"):
        if model in step.upstream:
            counts = step.result(model).counts
            if counts.get("available"):
                lines.append(
                    f"- {model} in torch: {counts['accuracy']:.1%}"
                    f" ({counts['accuracy_low']:.1%} to {counts['accuracy_high']:.1%}), {counts['problems']} problems"
                )
    return [*lines, ""] if lines else []


def _teacher(recipe: Recipe) -> str:
    teacher = recipe.teacher
    if teacher is None:
        return "none"
    return f"`{teacher.engine}` {text(without_folders(teacher.model))}, licence: {_licence(teacher.licence)}"


def _licence(stated: str | None) -> str:
    return text(stated) if stated else "not stated in the recipe"


def _gate(gate: GateEntry) -> list[str]:
    """Cells of a gate's row."""
    status = gate.status.replace("_", " ")
    return [gate.variant or "", gate.name, status, _number(gate.value), _number(gate.limit), text(gate.detail)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
