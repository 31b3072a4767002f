"""The artifact's README: what it is, its numbers, how to load it, what it comes from and under whose terms.

Made from the manifest's own content, so that `distill verify` can make its tables again and find them in it. No name
can break its Markdown or its header, and local folders are left out.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill import __version__
from distill.ancestry import Ancestry, hub_header, licence_section
from distill.artifact import DATA_SUFFIX, VARIANT_FILES
from distill.cards import code, fenced, markdown_table, text
from distill.config import Recipe
from distill.format import with_system
from distill.records import Message, Prompt, read_records
from distill.runs import Step

from .limits import known_limits
from .manifest import BOM_FILE, SIGNATURE_FILE, Draft, Evaluated, FileEntry, GateEntry, ModelOrigin
from .package import DTYPES

LIBRARY = "transformers.js"
"""The loader of these files that hubs know by name, and show how to use."""
TAGS = ("onnx", "onnxruntime-genai", "transformers.js", "optimum", "reasoning", "knowledge-distillation", "distill")
QUESTION = "What is the capital of France?"
Files = Mapping[str, FileEntry]

GENAI = """import onnxruntime_genai as og

model = og.Model("FOLDER")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(do_sample=False, max_length=1024)
generator = og.Generator(model, params)
messages = {python}
generator.append_tokens(tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True)))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))"""
JAVASCRIPT = """import {{ pipeline }} from "@huggingface/transformers";

const generator = await pipeline("text-generation", "FOLDER", {{ dtype: "{dtype}" }});
const messages = {json};
const [written] = await generator(messages, {{ max_new_tokens: 512, do_sample: false }});
console.log(written.generated_text.at(-1).content);"""
OPTIMUM = """from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = ORTModelForCausalLM.from_pretrained("FOLDER", file_name="{file}")
inputs = tokenizer.apply_chat_template(
    {json},
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)
written = model.generate(**inputs, max_new_tokens=512, do_sample=False)
print(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def card(
    draft: Draft,
    files: Files,
    ancestry: Ancestry,
    messages: Sequence[Mapping[str, str]],
    parts: Mapping[str, Mapping[str, int]] | None = None,
) -> str:
    """The artifact's README.md, in Markdown.

    `messages` are those of a first call; `parts` the bytes of each variant's weights by part, where known.
    """
    sections = (
        hub_header(ancestry, LIBRARY, TAGS, "finetune" if ancestry.phases else "quantized"),
        opening(draft, ancestry),
        results(draft, files),
        sizes(draft, files, parts or {}),
        gates(draft),
        attempts(draft),
        benchmarks(draft),
        use(draft, ancestry.recipe, messages),
        origin(draft),
        licence_section(ancestry),
        "## Limits\n\n" + "\n".join(f"- {text(line)}" for line in known_limits(draft)),
        checking(draft),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def first_messages(recipe: Recipe, step: Step) -> list[dict[str, str]]:
    """Messages of a first call: the recipe's system prompt and a held-out problem."""
    question = QUESTION
    if "prompts" in step.upstream:
        first = next(read_records(step.result("prompts").path("heldout.jsonl"), Prompt), None)
        question = first.text if first else question
    return with_system([Message(role="user", content=question)], recipe.format.system)


def opening(draft: Draft, ancestry: Ancestry) -> str:
    """The first paragraph: what it is."""
    base = code(ancestry.base.hub_id or ancestry.base.name)
    what = f"A student distilled from {base}" if ancestry.phases else f"{base}, not trained here,"
    return (
        f"# {draft.name}\n\n{what} as ONNX, made with distill {__version__}: one folder that onnxruntime-genai,"
        f" transformers.js and Optimum load as it is. Default variant: {draft.default}."
    )


# --- numbers --------------------------------------------------------------------------------------------------------


def results(draft: Draft, files: Files) -> str:
    """Verified accuracy of every variant, and of the models in torch that it comes from."""
    by_model = {one.model: one for one in draft.evaluation}
    rows = [[f"{name} in torch", "", *_measured(one)] for name, one in by_model.items() if name not in draft.variants]
    rows += [
        [variant, f"{variant_bytes(variant, files) / 1e6:,.1f}", *_measured(by_model.get(variant))]
        for variant in draft.variants
    ]
    titles = ["model", "MB", "accuracy", "95% interval", "problems", "mean tokens", "stops"]
    return "## Results\n\n" + markdown_table(titles, rows)


def variant_bytes(variant: str, files: Files) -> int:
    """Bytes of a variant's graph and weights, without what all variants share."""
    graph = VARIANT_FILES.get(variant, "")
    return sum(files[name].bytes for name in (graph, graph + DATA_SUFFIX) if name in files)


def _measured(one: Evaluated | None) -> list[str]:
    if one is None:
        return ["not evaluated", "", "", "", ""]
    return [
        f"{one.accuracy:.1%}",
        f"{one.low:.1%} to {one.high:.1%}",
        f"{one.problems:,}",
        "" if one.mean_tokens is None else f"{one.mean_tokens:.0f}",
        "" if one.stop_rate is None else f"{one.stop_rate:.1%}",
    ]


def sizes(draft: Draft, files: Files, parts: Mapping[str, Mapping[str, int]]) -> str:
    """Where the bytes are."""
    shared = sum(entry.bytes for name, entry in files.items() if not name.startswith("onnx/"))
    said = f"What all variants share (tokenizer, settings): {shared / 1e6:,.1f} MB."
    names = list(dict.fromkeys(name for of in parts.values() for name in of))
    if not names:
        return f"## Size\n\n{said}"
    rows = [[variant, *(f"{of.get(name, 0) / 1e6:,.1f}" for name in names)] for variant, of in parts.items()]
    table = markdown_table(["MB of weights", *names], rows)
    return f"## Size\n\n{table}\n\n{said}"


def gates(draft: Draft) -> str:
    """Every check against a limit, and those that were not run once more by name."""
    if not draft.gates:
        return "## Gates\n\nNone: nothing was held against a limit."
    missing = [f"{gate.variant or 'all variants'} {gate.name}" for gate in draft.gates if gate.status == "not_run"]
    said = f"\n\n**Not run, so not passed:** {', '.join(text(name) for name in missing)}." if missing else ""
    return "## Gates\n\n" + markdown_table(GATE_TITLES, map(_gate, draft.gates)) + said


GATE_TITLES = ("variant", "gate", "status", "value", "limit", "detail")


def _gate(gate: GateEntry) -> list[str]:
    """Cells of a gate's row."""
    status = gate.status.replace("_", " ")
    cells = [gate.variant or "", text(gate.name), status, _number(gate.value), _number(gate.limit)]
    return [*cells, text(gate.detail)]


def attempts(draft: Draft) -> str:
    """What was tried for each variant, where more than one scheme may be."""
    if not draft.attempts:
        return ""
    rows = [
        [
            one.variant,
            text(one.scheme),
            f"{one.bytes / 1e6:,.1f}",
            text(", ".join(f"{gate.name} {gate.status.replace('_', ' ')}" for gate in one.gates)),
            "**ships**" if one.chosen else "",
        ]
        for one in draft.attempts
    ]
    return "## Attempts\n\n" + markdown_table(["variant", "weights", "MB", "gates", ""], rows)


def benchmarks(draft: Draft) -> str:
    """What was measured of speed and memory, if anything: keys dotted."""
    rows = [[code(key), text(value)] for key, value in _flat(draft.measured.get("bench"), "")]
    if not rows:
        return ""
    return "## Speed and memory\n\nOn the machine that made it:\n\n" + markdown_table(["measured", "value"], rows)


def _flat(value: Any, above: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{above}.{key}" if above else str(key))
    elif value is not None:
        yield above, _number(value) if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


# --- use ------------------------------------------------------------------------------------------------------------


def use(draft: Draft, recipe: Recipe, messages: Sequence[Mapping[str, str]]) -> str:
    """How to load it in each runtime."""
    plain = json.dumps(list(messages), ensure_ascii=False)
    others = ", ".join(f"`{VARIANT_FILES[variant]}`" for variant in draft.variants if variant in VARIANT_FILES)
    dtype, file = DTYPES.get(draft.default, "fp32"), VARIANT_FILES.get(draft.default, "")
    parts = [
        "## Use\n\n`FOLDER` is this folder, or its name on a hub where the loader takes one.",
        f"onnxruntime-genai loads the default variant, {draft.default}:",
        fenced(GENAI.format(python=repr(plain)), "python"),
        'transformers.js, in Node and in browsers; `dtype` chooses the variant, and `device: "webgpu"` the GPU:',
        fenced(JAVASCRIPT.format(dtype=dtype, json=plain), "js"),
        f"Optimum, where `file_name` chooses the variant ({others}):",
        fenced(OPTIMUM.format(file=file, json=plain), "python"),
        *_system_note(recipe),
    ]
    return "\n\n".join(parts)


def _system_note(recipe: Recipe) -> list[str]:
    """What a caller must send where the recipe set a system prompt, which the template alone does not carry."""
    if recipe.format.system is None:
        return []
    return [
        f"The student was trained with the system message {code(json.dumps(recipe.format.system))}. Send it as above"
        " with every conversation: without it the template may put a default of its own, which the student never saw."
    ]


# --- origin ---------------------------------------------------------------------------------------------------------


def origin(draft: Draft) -> str:
    """Whose weights and words are in it, by digest and revision."""
    made = draft.origins
    rows = [["student", *_origin(made.student)]] if made.student != made.base else []
    rows += [["base", *_origin(made.base)]] if made.base else []
    rows += [["teacher", *_origin(one)] for one in made.teachers]
    if made.data:
        counted = f", {made.data.tokens:,} tokens" if made.data.tokens is not None else ""
        rows.append(["training data", f"{code(made.data.id)}, {made.data.examples:,} traces{counted}",
                     code(made.data.digest), ""])  # fmt: skip
    if made.recipe:
        rows.append(["recipe", text(made.recipe.name), f"identity {code(made.recipe.identity)}", ""])
    tools = ", ".join(f"{text(name)} {text(version)}" for name, version in draft.tools.items())
    return (
        f"## Origin\n\n{markdown_table(['what', 'name', 'revision or sha256', 'licence'], rows)}\n\nMade by: {tools}."
    )


def _origin(one: ModelOrigin) -> list[str]:
    engine = f" ({text(one.engine)})" if one.engine else ""
    revision = code(one.revision) if one.revision else "not known"
    return [code(one.id) + engine, revision, text(one.licence) if one.licence else "**not stated**"]


def checking(draft: Draft) -> str:
    """How to check the folder."""
    golden = f", {len(draft.golden)} golden prompts against their tokens" if draft.golden else ""
    return (
        "## Checking it\n\n`distill verify FOLDER` holds every file against its sha256 in `manifest.json`, this card"
        f" and `{BOM_FILE}` against the manifest{golden}; it needs neither torch nor transformers. Where the folder"
        f" has a `{SIGNATURE_FILE}`, `--public-key KEY.pem` checks who made it: take the key from its maker."
    )


# --- checking a card ------------------------------------------------------------------------------------------------


def card_problem(content: str, draft: Draft, files: Files) -> str | None:
    """The first thing in which a card differs from the manifest; None where its tables are those of the manifest."""
    for name, section in (("results", results(draft, files)), ("gates", gates(draft)), ("attempts", attempts(draft))):
        if section not in content:
            return f"its {name} are not those of the manifest"
    return None
