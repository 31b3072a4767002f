"""The export stage: a student becomes quantized ONNX, is measured against torch and the task, and is packaged.

Every variant climbs its ladder of schemes (`attempts`) until one passes its gates; parity and task evaluation are kept
as they are made, so a killed export does only what is left. The artifact is written last; a failed gate leaves it
unsealed.
"""

import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.artifact import VARIANT_FILES, graph_bytes, locate
from distill.config import ExportConfig, Recipe
from distill.errors import ExportError, MissingExtraError
from distill.evaluation import difference, evaluate, load_summary, onnx_engine, read_items, retained
from distill.format import set_template
from distill.models import (
    ModelSource,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    return_freed_memory,
    set_threads,
)
from distill.onnx_decoding import GenaiDecoder, OnnxDecoder
from distill.plan import set_sources
from distill.progress import progress, say
from distill.records import write_json
from distill.runs import LIBRARIES, PARTIAL, OpenRun, RunOptions, SealedRun, Step, library_versions, open_run

from .attempts import Climbing, Tried, climb, read_tried, rungs_of
from .bench import bench
from .bom import write_bom
from .card import card, first_messages
from .gates import accuracy_gate, gain_gate, loader_gate, not_passed, refuse_failures
from .gguf import gguf_gates
from .graph import refuse_unsupported, weight_bytes
from .manifest import (
    BOM_FILE,
    CARD_FILE,
    Attempt,
    Draft,
    GateEntry,
    GoldenPrompt,
    hash_files,
    result_digest,
    write_manifest,
)
from .measure import Measured, TorchStudent, cases, measure
from .origins import ancestry_of_export, evaluated, licence_reading, origins
from .package import write_loader_files
from .quantize import Rounded, gptq
from .runtimes import Case, end_token_gate, runtime_gates
from .schemes import Scheme
from .texts import Texts, calibration_texts, comparison_texts, held_out

TOOLS = (*LIBRARIES, "onnx", "onnx-ir", "cyclonedx-python-lib")
"""Libraries that the manifest names with their versions."""
PACKAGES = {"cyclonedx": "cyclonedx-python-lib"}
"""Packages that are installed under another name than they are imported by."""
GOLDEN_TOKENS = 32


def preflight(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Refuse missing packages and models that the exporter would drop something of."""
    for package in ("onnxruntime", "onnxruntime_genai", "onnx_ir", "cyclonedx"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(PACKAGES.get(package, package.replace("_", "-")), "export") from error
    export = _export(recipe)
    name = export.model or (recipe.student.init if recipe.student else "")
    config = load_config(find_model(name))
    refuse_unsupported(config, name)
    if not (recipe.student and recipe.student.prune):  # a pruned one is smaller: its own run says whether it fits
        for variant in export.variants:
            rungs_of(variant, config, export)


def run(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Build, measure, package and seal."""
    export = _export(recipe)
    with open_run(step, options) as run:
        set_threads(options)
        checkpoint = plain_checkpoint(recipe, step, run)
        artifact = run.path("artifact")
        artifact.mkdir(exist_ok=True)
        remove_unfinished(artifact)
        texts = comparison_texts(recipe, export, step, checkpoint, run)
        student = TorchStudent(checkpoint)
        climbing = climbing_of(recipe, step, run, student, texts)
        config = load_config(find_model(str(checkpoint)))
        for variant in export.variants:
            climb(checkpoint, config, variant, export, run, climbing)
        tried: dict[str, list[Tried]] = {variant: read_tried(run, variant) for variant in export.variants}
        gates = [gate for variant in export.variants for gate in tried[variant][-1].gates]
        write_loader_files(artifact)
        golden, loader_gates = golden_prompts(export, artifact, texts, options)
        gates += [*loader_gates, end_token_gate(artifact), *other_runtimes(export, run, student, texts)]
        if export.gguf:
            note = run.path(f"gguf-{export.gguf}.json")
            gates += gguf_gates(checkpoint, export.gguf, artifact, note, student, texts, export.gates)
        write_json(run.path("gates.json"), {"gates": [gate.model_dump(mode="json") for gate in gates]})
        package(recipe, step, run, gates, golden, tried)
        refuse_failures(gates, options.require)


def other_runtimes(export: ExportConfig, run: OpenRun, student: TorchStudent, texts: Texts) -> list[GateEntry]:
    """Gates of each runtime for each variant; kept once all were measured, since what is missing may be added."""
    found: list[GateEntry] = []
    questions: list[Case] = []
    for variant in export.variants if export.runtimes else ():
        note = run.path(f"runtimes-{variant}.json")
        if note.exists():
            found += [GateEntry.model_validate(gate) for gate in json.loads(note.read_text())["gates"]]
            continue
        questions = questions or cases(student, texts, export.runtime_prompts)
        limit, threads = export.gates.of("min_top1", variant), run.options.cpu_threads
        artifact, names = run.path("artifact"), export.runtimes
        gates = runtime_gates(artifact, variant, questions, limit, runtimes=names, threads=threads)
        if all(gate.value is not None for gate in gates if gate.name.endswith("_prompts")):
            write_json(note, {"gates": [gate.model_dump(mode="json") for gate in gates]})
        found += gates
    return found


def climbing_of(recipe: Recipe, step: Step, run: OpenRun, student: TorchStudent, texts: Texts) -> Climbing:
    """How this recipe's attempts are made and judged."""
    export, checkpoint = _export(recipe), student.checkpoint

    @functools.cache
    def calibration() -> list[list[int]]:
        return calibration_texts(checkpoint, step, recipe, export.four_bits.calibration_tokens, run)

    def round_weights(scheme: Scheme) -> Iterator[Mapping[str, Rounded]]:
        documents = calibration()
        model = load_model(ModelSource(str(checkpoint), checkpoint))
        with progress(f"export: {scheme}", model.config.num_hidden_layers, run.options, unit="layers") as bar:
            for matrices in gptq(model, documents, scheme):
                yield matrices
                bar.advance()

    def parity(variant: str, folder: Path, give_up: bool) -> Measured:
        measured = measure(folder, variant, student, texts, export.gates, run.options.cpu_threads, give_up)
        student.release()  # what is built next needs the memory
        return measured

    def task(variant: str, folder: Path, items: Path) -> list[GateEntry]:
        evaluate_variant(recipe, step, run, variant, folder, items)
        return task_gates(recipe, step, variant, items)

    return Climbing(round_weights, parity, task)


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


def remove_unfinished(artifact: Path) -> None:
    """Remove what a killed attempt left half-written, before the manifest could list it."""
    for path in artifact.rglob(f"*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# --- the task -------------------------------------------------------------------------------------------------------


def evaluate_variant(recipe: Recipe, step: Step, run: OpenRun, variant: str, folder: Path, items: Path) -> None:
    """Evaluate a variant on the gate's set, where the recipe has one; items and summary go to `items`."""
    if recipe.evaluate is None or "prompts" not in step.upstream:
        return
    export = _export(recipe)
    engine = onnx_engine(recipe, folder, variant, run.options)
    sources = set_sources(recipe, export.set)
    prompts = held_out(recipe, export, step)
    evaluate(engine, prompts, recipe.evaluate, variant, export.set, items, run.options, sources)


def task_gates(recipe: Recipe, step: Step, variant: str, items: Path) -> list[GateEntry]:
    """The paired drop in accuracy against the torch student, and how much of its gain over the base is kept."""
    limits = _export(recipe).gates
    if "student" not in step.upstream or not recipe.evaluate:
        why = "the recipe does not evaluate its student; add `student` to evaluate.models"
        return [
            accuracy_gate(variant, None, limits.max_accuracy_drop, why),
            gain_gate(variant, None, None, limits.min_gain_retained, why),
        ]
    student, found = list(read_items(step.result("student").folder)), list(read_items(items))
    drop = accuracy_gate(variant, difference(student, found), limits.max_accuracy_drop)
    if "base" not in step.upstream:
        why = "the recipe does not evaluate the base; add `base` to evaluate.models"
        return [drop, gain_gate(variant, None, None, limits.min_gain_retained, why)]
    base = list(read_items(step.result("base").folder))
    kept = retained(base, student, found)
    return [drop, gain_gate(variant, difference(student, base), kept, limits.min_gain_retained)]


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
        del genai, ours
        return_freed_memory()
    return golden, gates


def package(
    recipe: Recipe,
    step: Step,
    run: OpenRun,
    gates: list[GateEntry],
    golden: list[GoldenPrompt],
    tried: Mapping[str, Sequence[Tried]],
) -> SealedRun | None:
    """Write bill of materials, card and manifest; seal unless a gate failed."""
    artifact = run.path("artifact")
    export = _export(recipe)
    ancestry = ancestry_of_export(recipe, step)
    sizes: dict[str, int] = {variant: graph_bytes(artifact, variant) for variant in export.variants}
    summaries: dict[str, dict[str, Any]] = {
        variant: dict(load_summary(run.path(f"eval-{variant}")))
        for variant in export.variants
        if recipe.evaluate is not None and "prompts" in step.upstream
    }
    timed = {"tokens", "seconds", "tokens_per_s"}
    draft = Draft(
        name=recipe.name,
        variants=tuple(export.variants),
        default=locate(artifact).variant,
        origins=origins(recipe, step, ancestry),
        licences=licence_reading(ancestry),
        tools=library_versions(TOOLS),
        options={
            "variants": {variant: tried[variant][-1].scheme for variant in export.variants},
            "gates": export.gates.model_dump(mode="json"),
            "format": recipe.format.model_dump(include={"system", "open_marker", "close_marker"}),
        },
        gates=tuple(gates),
        evaluation=tuple(evaluated(recipe, step, summaries)),
        attempts=tuple(_attempt(variant, one) for variant in export.variants for one in tried[variant]),
        golden=tuple(golden),
        measured={
            "build_seconds": {variant: tried[variant][-1].build_seconds for variant in export.variants},
            "evaluation": {v: {k: s[k] for k in timed if k in s} for v, s in summaries.items()},
            "bench": {variant: benchmark(variant, run) for variant in export.variants} if export.bench else {},
        },
    )
    for question in draft.licences.questions:
        say(f"export: warning: {question}")
    files = {name: entry for name, entry in hash_files(artifact).items() if name not in (BOM_FILE, CARD_FILE)}
    write_bom(artifact, draft, files)
    parts = {str(one): weight_bytes(artifact / VARIANT_FILES[one])._asdict() for one in export.variants}
    readme = card(draft, files, ancestry, first_messages(recipe, step), parts)
    (artifact / CARD_FILE).write_text(readme, encoding="utf-8")
    manifest = write_manifest(artifact, draft, files)
    if not_passed(gates, run.options.require):
        return None
    return run.seal(digest=result_digest(manifest), counts={"bytes": sizes, "evaluation": summaries, **_tally(gates)})


def _attempt(variant: str, one: Tried) -> Attempt:
    """What was tried, without its times."""
    return Attempt(variant=variant, scheme=one.scheme, bytes=one.bytes, gates=one.gates, chosen=one.chosen)


def benchmark(variant: str, run: OpenRun) -> dict[str, Any]:
    """What `distill bench` says of a variant on this machine; kept for a resume."""
    note = run.path(f"bench-{variant}.json")
    if not note.exists():
        write_json(note, bench(run.path("artifact"), variant, run.options.cpu_threads, quiet=run.options.quiet))
    return dict(json.loads(note.read_text(encoding="utf-8")))


def _tally(gates: Sequence[GateEntry]) -> dict[str, int]:
    return {
        f"gates_{status}": sum(gate.status == status for gate in gates) for status in ("passed", "failed", "not_run")
    }


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
