"""The train stage: one phase of a student, from examples to a saved checkpoint.

Reads the selected examples and the model to start from (the base, or the phase before), refuses what would train
silently wrong, trains with checkpoints, and saves a plain transformers folder whose tokenizer, template and end
tokens agree with what was trained.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.config import Recipe, SftPhase, StudentConfig
from distill.engines.transformers import end_ids
from distill.errors import FormatError, ModelError
from distill.format import check_markers_survive, encode_prompt, render_prompt, set_template
from distill.models import (
    PER_DOCUMENT,
    ModelSource,
    choose_device,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    quiet_loading,
    set_threads,
)
from distill.progress import progress
from distill.records import Example, Message, Prompt, read_records
from distill.runs import OpenRun, RunOptions, Step, file_digest, open_run

from .data import Documents, check_vocabulary, encode_examples
from .loop import StepReport, Trainer, write_metrics


def preflight(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Refuse, before any work: a base that is not there or damaged, no template, a limit beyond the context."""
    student = _student(recipe)
    if step.args["phase"] > 0:
        return
    attention_for(student, choose_device(options))
    source = find_model(student.init, student.revision)
    config = load_config(source)
    context = int(config.max_position_embeddings)
    if recipe.format.max_tokens > context:
        raise FormatError(
            f"format.max_tokens is {recipe.format.max_tokens:,}, but {student.init}'s context is {context:,} tokens;"
            f" set format.max_tokens={context} or less"
        )
    tokenizer = load_tokenizer(source)
    require_end_token(tokenizer)
    set_template(tokenizer, recipe.format)
    check_markers_survive(tokenizer, recipe.format)
    render_prompt(tokenizer, [Message(role="user", content="?")], recipe.format)


def run(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Train phase `step.args["phase"]` and seal its run."""
    student = _student(recipe)
    phase = student.phases[step.args["phase"]]
    examples = step.result("examples").path("examples.jsonl")
    source = _start(student, step)
    with open_run(step, options) as run:
        set_threads(options)
        device = choose_device(options)
        tokenizer = load_tokenizer(source)
        set_template(tokenizer, recipe.format)
        model = load_model(source, "float32", device, attention_for(student, device))
        agree_on_end(model, tokenizer)
        documents = encode_examples(
            read_records(examples, Example),
            tokenizer,
            recipe.format,
            int(model.config.max_position_embeddings),
            end_ids(model),
        )
        check_vocabulary(documents, model.get_input_embeddings().num_embeddings)
        counts = train(model, documents, phase, student.precision, run)
        save_student(model, tokenizer, run.path("model"))
        check_saved(run.path("model"), tokenizer, next(read_records(examples, Example)).prompt, recipe)
        run.seal(digest=file_digest(run.path("model/model.safetensors")), counts={**documents.counts, **counts})


def train(model: Any, documents: Documents, phase: SftPhase, precision: str, run: OpenRun) -> dict[str, Any]:
    """Train in place, writing metrics.jsonl and checkpoints; returns what was counted."""
    from distill.interrupts import graceful

    if phase.gradient_checkpointing:
        # transformers renamed it in the middle of version 5
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    trainer = Trainer(model, documents, phase, precision, run.work)
    append = write_metrics(run.path("metrics.jsonl"), trainer.resumed_from)
    total = sum(documents.lengths[index] for chosen in trainer.plan for index in chosen)
    done = sum(documents.lengths[index] for chosen in trainer.plan[: trainer.resumed_from] for index in chosen)
    with graceful() as stop, progress(f"train {run.step.name}", total, run.options, unit="tok", done=done) as bar:
        for report in trainer.run(stop):
            append({**report._asdict(), "tokens_per_s": round(report.tokens / report.seconds, 1)})
            bar.advance(report.tokens, step=f"{report.step}/{len(trainer.plan)}", loss=f"{report.loss:.3f}")
    return summarise(trainer, run.path("metrics.jsonl"), phase)


def summarise(trainer: Trainer, metrics: Path, phase: SftPhase) -> dict[str, Any]:
    """Totals over all steps, from metrics.jsonl, so that they are right after a resume too."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    reports = [StepReport(**{name: row[name] for name in StepReport._fields}) for row in rows]
    tokens, packs = sum(r.tokens for r in reports), sum(r.packs for r in reports)
    return {
        "steps": len(trainer.plan),
        "tokens": tokens,
        "supervised_tokens": sum(r.supervised for r in reports),
        "packing_efficiency": round(tokens / max(1, packs * phase.micro_batch_tokens), 4),
        "first_loss": reports[0].loss if reports else None,
        "last_loss": reports[-1].loss if reports else None,
        "train_seconds": round(sum(r.seconds for r in reports), 3),
    }


def attention_for(student: StudentConfig, device: str) -> str:
    """Attention implementation for packed documents on a device.

    Raises ModelError for flash-attention in fp32, which it cannot compute.
    """
    if student.attention == "flash_attention_2" and student.precision == "fp32":
        raise ModelError("student.attention flash_attention_2 computes in bf16; set student.precision=bf16")
    if student.attention != "auto":
        return student.attention
    from transformers.utils import is_flash_attn_2_available

    flash = device.startswith("cuda") and student.precision == "bf16" and is_flash_attn_2_available()
    return "flash_attention_2" if flash else PER_DOCUMENT


def require_end_token(tokenizer: Any) -> None:
    """Refuse a tokenizer without an end token."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the student's tokenizer has no eos_token; set one, or the student never learns to stop")


def agree_on_end(model: Any, tokenizer: Any) -> None:
    """Make tokenizer, config and generation_config name the same end and pad tokens.

    Documents end with the tokenizer's eos_token; other ids that the model stopped at are kept after it. What else the
    base's generation_config advised (a repetition penalty, a temperature) was for another model than the student.
    """
    from transformers import GenerationConfig

    require_end_token(tokenizer)
    ends = [tokenizer.eos_token_id, *(i for i in end_ids(model) if i != tokenizer.eos_token_id)]
    chosen = ends[0] if len(ends) == 1 else ends
    model.generation_config = GenerationConfig(bos_token_id=model.config.bos_token_id)
    for config in (model.config, model.generation_config):
        config.eos_token_id = chosen
        config.pad_token_id = tokenizer.pad_token_id


def save_student(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a plain transformers checkpoint aside and move it into place."""
    part = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    with quiet_loading():
        model.save_pretrained(part, max_shard_size="100GB")
        tokenizer.save_pretrained(part)
    os.replace(part, folder)


def check_saved(folder: Path, tokenizer: Any, prompt: Prompt, recipe: Recipe) -> None:
    """The saved folder gives the same prompt ids and stops at the token that training ended with.

    Raises FormatError naming the file that disagrees.
    """
    saved = load_tokenizer(ModelSource(str(folder), folder))
    text = render_prompt(saved, prompt.messages, recipe.format)
    if encode_prompt(saved, text) != encode_prompt(tokenizer, render_prompt(tokenizer, prompt.messages, recipe.format)):
        raise FormatError(f"{folder}: the saved tokenizer or template gives other prompt ids than training used")
    for name in ("config.json", "generation_config.json"):
        named = json.loads((folder / name).read_text()).get("eos_token_id")
        ends: Sequence[int] = [named] if isinstance(named, int) else named or []
        if tokenizer.eos_token_id not in ends:
            raise FormatError(f"{folder / name}: does not stop at the trained end token {tokenizer.eos_token_id}")


def _start(student: StudentConfig, step: Step) -> ModelSource:
    """The model a phase starts from."""
    if "model" in step.upstream:
        folder = step.result("model").path("model")
        return ModelSource(str(folder), folder)
    return find_model(student.init, student.revision)


def _student(recipe: Recipe) -> StudentConfig:
    assert recipe.student is not None  # the plan has no train step without it
    return recipe.student
