"""The export stage: a student becomes quantized ONNX, is measured against torch and the task, and is packaged.

Every variant is built aside and moved into place; parity, greedy comparison and task evaluation are kept as they are
made, so a killed export does only what is left. The artifact is written last; a failed gate leaves it unsealed.
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.artifact import graph_bytes
from distill.config import ExportConfig, Recipe
from distill.errors import ExportError, MissingExtraError
from distill.evaluation import difference, evaluate, onnx_engine, read_items, set_prompts
from distill.format import encode_prompt, render_prompt, set_template
from distill.models import ModelSource, find_model, load_config, load_model, load_tokenizer, set_threads
from distill.onnx_decoding import GenaiDecoder, OnnxDecoder
from distill.plan import set_sources
from distill.progress import say
from distill.records import Item, Message, Prompt, write_json
from distill.runs import PARTIAL, OpenRun, RunOptions, SealedRun, Step, file_digest, library_versions, open_run

from .card import write_card
from .gates import accuracy_gate, greedy_gate, loader_gate, not_passed, parity_gates, refuse_failures
from .graph import build_variant, refuse_unsupported
from .manifest import (
    CARD_FILE,
    Draft,
    GateEntry,
    GoldenPrompt,
    ModelOrigin,
    Origins,
    result_digest,
    write_manifest,
)
from .parity import compare_greedy, compare_logits, greedy_from_logits

PROBES = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "If a train leaves at nine and arrives at noon, how long is the journey?",
    "List three colours.",
)
"""Prompts for parity and golden tokens where the recipe brings none."""

GOLDEN_TOKENS = 32
DOCUMENT_TOKENS = 1024
"""Longest document in the parity comparison; its logits exist in memory at once."""


class Document(NamedTuple):
    """A text in token ids and the positions whose predictions are compared."""

    ids: list[int]
    compared: range


class Texts(NamedTuple):
    """What the variants are compared on."""

    documents: list[Document]
    prompts: list[list[int]]


def preflight(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Refuse missing packages and models that the exporter would drop something of."""
    for package in ("onnxruntime", "onnxruntime_genai", "onnx_ir"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(package.replace("_", "-"), "export") from error
    name = _export(recipe).model or (recipe.student.init if recipe.student else "")
    refuse_unsupported(load_config(find_model(name)), name)


def run(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Build, measure, package and seal."""
    export = _export(recipe)
    with open_run(step, options) as run:
        set_threads(options)
        checkpoint = plain_checkpoint(recipe, step, run)
        artifact = run.path("artifact")
        artifact.mkdir(exist_ok=True)
        remove_unfinished(artifact)
        seconds: dict[str, float] = {variant: build(checkpoint, variant, run, artifact) for variant in export.variants}
        texts = comparison_texts(recipe, step, checkpoint)
        gates = [gate for variant in export.variants for gate in measure(variant, checkpoint, texts, export, run)]
        summaries = evaluate_variants(recipe, step, run)
        gates += task_gates(recipe, step, run)
        golden, loader_gates = golden_prompts(export, artifact, texts, options)
        gates += loader_gates
        write_json(run.path("gates.json"), {"gates": [gate.model_dump(mode="json") for gate in gates]})
        package(recipe, step, run, gates, golden, summaries, seconds)
        refuse_failures(gates, options.require)


def plain_checkpoint(recipe: Recipe, step: Step, run: OpenRun) -> Path:
    """A folder of a plain transformers checkpoint with its tokenizer: the student's own, or made from its source."""
    if "model" in step.upstream:
        return step.result("model").path("model")
    folder = run.work / "checkpoint"
    if (folder / "config.json").exists():
        return folder
    name, revision = _source(recipe)
    source = find_model(name, revision)
    tokenizer = load_tokenizer(source)
    set_template(tokenizer, recipe.format)
    part = run.work / "checkpoint.unfinished"
    load_model(source).save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return folder


def build(checkpoint: Path, variant: str, run: OpenRun, artifact: Path) -> float:
    """Build one variant unless it is there; returns the seconds it took (kept for a resume)."""
    note = run.path(f"build-{variant}.json")
    if not note.exists():
        built = run.work / variant
        shutil.rmtree(built, ignore_errors=True)
        started = time.perf_counter()
        build_variant(checkpoint, variant, built)
        merge(built, artifact)
        write_json(note, {"seconds": time.perf_counter() - started})
    seconds = float(json.loads(note.read_text())["seconds"])
    say(f"export: {variant}: {graph_bytes(artifact, variant) / 1e6:,.1f} MB in {seconds:.0f} s")
    return seconds


def merge(built: Path, artifact: Path) -> None:
    """Move a folder with one variant into the artifact, where it becomes the default one.

    What the variants share comes out alike from each build and is replaced by its equal.
    """
    (artifact / "onnx").mkdir(exist_ok=True)
    for source in [*(built / "onnx").iterdir(), *(path for path in built.iterdir() if path.is_file())]:
        os.replace(source, artifact / source.relative_to(built))
    shutil.rmtree(built)


def remove_unfinished(artifact: Path) -> None:
    """Remove what a killed attempt left half-written, before the manifest could list it."""
    for path in artifact.glob(f"*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# --- parity ---------------------------------------------------------------------------------------------------------


def comparison_texts(recipe: Recipe, step: Step, checkpoint: Path) -> Texts:
    """Held-out prompts, continued by the student's own evaluated answers where there are any.

    With answers, only the positions that predict them are compared: what a student would predict inside a prompt or
    after its end token was never trained and is never used. Without, every position of the prompts is.
    """
    tokenizer = load_tokenizer(ModelSource(str(checkpoint), checkpoint))
    items: Sequence[Item] = list(read_items(step.result("student").folder)) if "student" in step.upstream else []
    if items:
        prompts = [item.prompt for item in items]
        answers = [list(item.trace.token_ids or ()) for item in items]
    else:
        prompts = _held_out(recipe, step)
        answers = [[] for _ in prompts]
    ids = [encode_prompt(tokenizer, render_prompt(tokenizer, p.messages, recipe.format)) for p in prompts]
    documents = [document_of(prompt, answer) for prompt, answer in zip(ids, answers) if len(prompt) < DOCUMENT_TOKENS]
    return Texts(_until(documents, _export(recipe).gates.parity_tokens), ids)


def document_of(prompt: list[int], answer: list[int]) -> Document:
    """A prompt and its answer, cut to the longest length that is compared."""
    text = (prompt + answer)[:DOCUMENT_TOKENS]
    return Document(text, range(len(prompt) - 1, len(text) - 1) if answer else range(len(text)))


def _held_out(recipe: Recipe, step: Step) -> list[Prompt]:
    if "prompts" in step.upstream and recipe.evaluate:
        path = step.result("prompts").path("heldout.jsonl")
        return set_prompts(recipe.evaluate, _export(recipe).set, path)
    return [Prompt.of([Message(role="user", content=probe)]) for probe in PROBES]


def _until(documents: Sequence[Document], tokens: int) -> list[Document]:
    """The first documents that give so many positions to compare, or all of them."""
    chosen: list[Document] = []
    for document in documents:
        if sum(len(document.compared) for document in chosen) >= tokens:
            break
        chosen.append(document)
    return chosen


def measure(variant: str, checkpoint: Path, texts: Texts, export: ExportConfig, run: OpenRun) -> list[GateEntry]:
    """Logits against torch in fp32, and for the fp32 variant greedy tokens; kept in parity-VARIANT.json."""
    path = run.path(f"parity-{variant}.json")
    if path.exists():
        return [GateEntry.model_validate(gate) for gate in json.loads(path.read_text())["gates"]]
    torch_logits = TorchLogits(checkpoint)
    decoder = OnnxDecoder(run.path("artifact"), run.options.cpu_threads, variant=variant)
    parity = compare_logits(
        (torch_logits(ids)[compared] for ids, compared in texts.documents),
        (decoder.logits(ids)[compared] for ids, compared in texts.documents),
    )
    gates = parity_gates(variant, parity, export.gates)
    if variant == "fp32":
        gates.append(greedy_gate(variant, compare_decoding(decoder, torch_logits, texts.prompts, export)))
    write_json(path, {"gates": [gate.model_dump(mode="json") for gate in gates], "parity": parity._asdict()})
    say(
        f"export: {variant}: mean KL {parity.mean_kl:.2g} nats, top-1 {parity.top1_agreement:.2%} of {parity.positions}"
    )
    return gates


class TorchLogits:
    """The torch student's teacher-forced logits in fp32: ids -> float32 [len(ids), vocabulary]."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = load_model(ModelSource(str(checkpoint), checkpoint))

    def __call__(self, ids: Sequence[int]) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """Logits after each of the ids."""
        import torch

        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([list(ids)])).logits[0]
        return np.asarray(logits.numpy(), dtype=np.float32)


def compare_decoding(
    decoder: OnnxDecoder, torch_logits: TorchLogits, prompts: list[list[int]], export: ExportConfig
) -> Any:
    """Greedy text of the variant through its cache, against what torch would have written along it."""
    chosen = prompts[: export.gates.greedy_prompts]
    written = decoder.generate(chosen, export.gates.greedy_tokens)
    expected = [
        greedy_from_logits(torch_logits([*prompt, *tokens]), len(prompt)) for prompt, tokens in zip(chosen, written)
    ]
    return compare_greedy([tokens for tokens, _ in expected], [margins for _, margins in expected], written)


# --- the task -------------------------------------------------------------------------------------------------------


def evaluate_variants(recipe: Recipe, step: Step, run: OpenRun) -> dict[str, dict[str, Any]]:
    """Evaluate every variant on the gate's set, where the recipe has one; summaries by variant."""
    if recipe.evaluate is None or "prompts" not in step.upstream:
        return {}
    export = _export(recipe)
    prompts = _held_out(recipe, step)
    summaries: dict[str, dict[str, Any]] = {}
    for variant in export.variants:
        engine = onnx_engine(recipe, run.path("artifact"), variant, run.options)
        folder = run.path(f"eval-{variant}")
        folder.mkdir(exist_ok=True)
        summaries[variant] = evaluate(
            engine,
            prompts,
            recipe.evaluate,
            variant,
            export.set,
            folder,
            run.options,
            set_sources(recipe, export.set),
        )
    return summaries


def task_gates(recipe: Recipe, step: Step, run: OpenRun) -> list[GateEntry]:
    """The paired drop in accuracy of every variant against the torch student."""
    export = _export(recipe)
    limit = export.gates.max_accuracy_drop
    if "student" not in step.upstream or not recipe.evaluate:
        why = "the recipe does not evaluate its student; add `student` to evaluate.models"
        return [accuracy_gate(variant, None, limit, why) for variant in export.variants]
    student = list(read_items(step.result("student").folder))
    return [
        accuracy_gate(variant, difference(student, list(read_items(run.path(f"eval-{variant}")))), limit)
        for variant in export.variants
    ]


# --- packaging ------------------------------------------------------------------------------------------------------


def golden_prompts(
    export: ExportConfig, artifact: Path, texts: Texts, options: RunOptions
) -> tuple[list[GoldenPrompt], list[GateEntry]]:
    """Prompts with the tokens that onnxruntime-genai writes after them, and whether our decoder agrees."""
    golden, gates = [], []
    chosen = texts.prompts[: export.golden_prompts]
    for variant in export.variants:
        genai, ours = (
            GenaiDecoder(artifact, options.cpu_threads, variant),
            OnnxDecoder(artifact, options.cpu_threads, variant=variant),
        )
        expected = [genai.greedy(ids, GOLDEN_TOKENS) for ids in chosen]
        same = sum(ours.generate([ids], GOLDEN_TOKENS)[0] == tokens for ids, tokens in zip(chosen, expected))
        gates.append(loader_gate(variant, same, len(chosen)))
        golden += [
            GoldenPrompt(variant=variant, prompt_ids=tuple(ids), expected_ids=tuple(tokens))
            for ids, tokens in zip(chosen, expected)
        ]
    return golden, gates


def package(
    recipe: Recipe,
    step: Step,
    run: OpenRun,
    gates: list[GateEntry],
    golden: list[GoldenPrompt],
    summaries: dict[str, dict[str, Any]],
    seconds: dict[str, float],
) -> SealedRun | None:
    """Write the card and the manifest; seal unless a gate failed."""
    artifact = run.path("artifact")
    export = _export(recipe)
    sizes: dict[str, int] = {variant: graph_bytes(artifact, variant) for variant in export.variants}
    card = write_card(recipe, step, gates, summaries, sizes)
    (artifact / CARD_FILE).write_text(card, encoding="utf-8")
    timed = {"tokens", "seconds", "tokens_per_s"}
    manifest = write_manifest(
        artifact,
        Draft(
            name=recipe.name,
            variants=tuple(export.variants),
            origins=origins(recipe, step),
            tools=library_versions(),
            options={"variants": list(export.variants), "gates": export.gates.model_dump(mode="json")},
            gates=tuple(gates),
            golden=tuple(golden),
            measured={
                "build_seconds": seconds,
                "evaluation": {v: {k: s[k] for k in timed if k in s} for v, s in summaries.items()},
            },
        ),
    )
    if not_passed(gates, run.options.require):
        return None
    return run.seal(digest=result_digest(manifest), counts={"bytes": sizes, "evaluation": summaries, **_tally(gates)})


def _tally(gates: Sequence[GateEntry]) -> dict[str, int]:
    return {
        f"gates_{status}": sum(gate.status == status for gate in gates) for status in ("passed", "failed", "not_run")
    }


def origins(recipe: Recipe, step: Step) -> Origins:
    """Whose weights and words are in the artifact."""
    name, revision = _source(recipe)
    base = ModelOrigin(id=name, revision=revision, licence=recipe.student.licence if recipe.student else None)
    if "model" not in step.upstream:
        return Origins(student=base)
    weights = step.result("model").path("model/model.safetensors")
    student = ModelOrigin(id=step.upstream["model"].folder.name, revision=file_digest(weights), licence=base.licence)
    teacher = recipe.teacher
    if teacher is None:
        return Origins(student=student, base=base)
    taught = ModelOrigin(id=teacher.model or teacher.engine, revision=teacher.revision, licence=teacher.licence)
    return Origins(student=student, base=base, teacher=taught)


def _source(recipe: Recipe) -> tuple[str, str]:
    """Name and revision of the model that is exported, or that the student came from."""
    export = _export(recipe)
    if export.model:
        return export.model, "main"
    assert recipe.student is not None  # the recipe's own validation
    return recipe.student.init, recipe.student.revision


def _export(recipe: Recipe) -> ExportConfig:
    if recipe.export is None:
        raise ExportError("the recipe has no export section")
    return recipe.export
