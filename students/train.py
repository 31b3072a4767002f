"""The train stage: one phase of a student, from examples to a saved checkpoint.

Reads the selected examples and the model to start from (the base, a pruned one, or the phase before), refuses what
would train silently wrong, trains with checkpoints, and saves a plain transformers folder whose tokenizer, template and
end tokens agree with what was trained. Started in several processes, all of them train and the main one writes.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from distill.attention import PER_DOCUMENT
from distill.config import KdPhase, OnPolicyPhase, Recipe, StudentConfig, TrainingPhase
from distill.documents import Documents, check_context, check_vocabulary, joined
from distill.engines.transformers import context_of, end_ids
from distill.errors import DataError, FormatError, ModelError, TrainingError
from distill.evaluation import set_prompts
from distill.format import check_markers_survive, encode_prompt, render_prompt, set_template
from distill.interrupts import graceful
from distill.models import (
    ModelSource,
    choose_device,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    quiet_loading,
    set_threads,
)
from distill.processes import launched, shared_by
from distill.progress import progress, say
from distill.records import Example, Message, Prompt, read_records
from distill.runs import OpenRun, RunOptions, Step, file_digest, follow_run, open_run
from distill.token_store import tokenize

from .adapters import check_adapters, load_in_four_bits, merged, require_peft, with_adapters
from .check import require_sound, subject_of
from .distributed import World, joined_world, local_device
from .harness import require_harness
from .loop import StepReport, Trainer, write_metrics
from .monitor import Watcher
from .on_policy import Guard, Rollouts
from .packing import Source
from .replay import write_chats
from .throughput import peak_flops, peak_memory_mb, shape_of
from .trackers import require_trackers, trackers
from .tutors import Tutor, TutorInMemory, cached_tutor, require_teachers, tutor_in_memory
from .vocabulary import add_tokens
from .writers import require_writer, writer_of
from .zero import check_zero

HELDOUT_SEED = "heldout"


def preflight(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Refuse, before any work: a base that is not there or damaged, no template, a limit beyond the context."""
    student = _student(recipe)
    phase = student.phases[step.args["phase"]]
    attention_for(student, choose_device(options))
    require_peft(phase.lora)
    require_harness(phase.monitor)
    require_trackers(student.trackers)
    check_zero(shared_by(student.parallel), phase, launched().size)
    if student.parallel == "fsdp" and launched().size == 1:
        raise TrainingError(
            "student.parallel is fsdp, but this is the only process; start it with torchrun --nproc-per-node N -m"
            " distill train …, or set student.parallel=auto"
        )
    writes = phase.monitor and (phase.monitor.sets or phase.monitor.lm_eval)
    if student.parallel == "fsdp" and phase.lora and writes:
        raise TrainingError(
            "student.parallel is fsdp, whose shards hold the adapters alone when a monitor wants answers; remove"
            " monitor.sets and lm_eval, or set student.parallel=ddp"
        )
    if isinstance(phase, KdPhase) and phase.teacher == "memory":
        assert recipe.logprobs is not None  # the recipe's own validation
        tokenizer = load_tokenizer(find_model(student.init, student.revision))
        require_teachers(recipe.logprobs, phase, tokenizer, recipe.format.max_tokens)
    if isinstance(phase, OnPolicyPhase):
        require_writer(phase)
    if isinstance(phase, OnPolicyPhase) and (shared := shared_by(student.parallel)) in ("fsdp", "zero3"):
        raise TrainingError(
            f"student.parallel is {shared}, which scatters the model, but in an on_policy phase every process writes"
            " answers; set student.parallel=ddp, zero1 or zero2"
        )
    if "model" in step.upstream:
        return
    source = find_model(student.init, student.revision)
    config = load_config(source)
    check_adapters(config, phase.lora)
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
    set_threads(options)
    device = local_device(choose_device(options))
    with joined_world(device) as world:
        with (open_run if world.main else follow_run)(step, options) as run:
            world.wait()  # the folder is there
            ready = prepare(recipe, step, options, device, world)
            require_sound(subject_of(ready, recipe, options))
            counts = train(ready, recipe, run, world)
            world.wait()
            if world.main:
                run.seal(digest=file_digest(run.path("model/model.safetensors")), counts=counts)
            world.wait()


class Ready(NamedTuple):
    """What a phase trains with."""

    model: Any
    tokenizer: Any
    documents: Documents
    sources: list[Source]
    heldout: Documents | None
    phase: TrainingPhase
    student: StudentConfig
    source: ModelSource
    counts: dict[str, Any]


def prepare(recipe: Recipe, step: Step, options: RunOptions, device: str, world: World) -> Ready:
    """Load the model and tokenize the data, the main process first; the same checks as every training."""
    student = _student(recipe)
    phase = student.phases[step.args["phase"]]
    source = start_of(student, step)
    tokenizer = load_tokenizer(source)
    set_template(tokenizer, recipe.format)
    attention = attention_for(student, device)
    if phase.lora is not None and phase.lora.quantize == "nf4":
        model = load_in_four_bits(source, device, attention)
    else:
        model = load_model(source, "float32", device, attention)
    check_adapters(model.config, phase.lora)
    added = add_tokens(model, tokenizer, student.new_tokens)
    agree_on_end(model, tokenizer)
    check_markers_survive(tokenizer, recipe.format)
    check_context(recipe.format, int(model.config.max_position_embeddings))
    if not world.main:
        world.wait()
    sets = tokenized(recipe, phase, step, tokenizer, end_ids(model), options)
    if world.main:
        world.wait()
    documents = joined(list(sets.values()))
    world.agree("training data", documents.digest)
    check_vocabulary(documents, model.get_input_embeddings().num_embeddings)
    sources, heldout = split(sets, phase)
    counts = {**sets["traces"].counts, **({"heldout_traces": len(heldout)} if heldout else {})}
    counts |= {f"replay/{name}": len(one) for name, one in sets.items() if name != "traces"}
    counts |= {"new_tokens": len(added)} if added else {}
    if phase.lora is not None:
        model = with_adapters(model, phase.lora, phase.seed)
    return Ready(model, tokenizer, documents, sources, heldout, phase, student, source, counts)


def tokenized(
    recipe: Recipe, phase: TrainingPhase, step: Step, tokenizer: Any, ends: Sequence[int], options: RunOptions
) -> dict[str, Documents]:
    """The documents of the traces and of every replay set, from the store of tokenized data or made now."""
    examples = step.result("examples").path("examples.jsonl")
    sets = {"traces": tokenize(examples, "examples", tokenizer, recipe.format, ends, options, "examples")}
    for replay in phase.replay:
        label = f"replay set {replay.name}"
        with tempfile.TemporaryDirectory(prefix="chats-", dir=options.runs / "tokens") as folder:
            chats = Path(folder) / f"{replay.name}.jsonl"
            write_chats(replay, recipe.format, chats)
            sets[replay.name] = tokenize(chats, "chats", tokenizer, recipe.format, ends, options, label)
    return sets


def split(sets: dict[str, Documents], phase: TrainingPhase) -> tuple[list[Source], Documents | None]:
    """What each epoch takes of the joined sets, and the traces set aside for the held-out loss.

    Raises DataError if nothing would be left to train on.
    """
    import random

    traces = len(sets["traces"])
    order = list(range(traces))
    if phase.heldout_traces >= traces:
        raise DataError(
            f"student.phases.N.heldout_traces is {phase.heldout_traces}, but there are {traces} traces; set it lower"
        )
    random.Random(f"{HELDOUT_SEED}:{phase.seed}").shuffle(order)
    aside = sorted(order[: phase.heldout_traces])
    sources = [Source(sorted(order[phase.heldout_traces :]))]
    start = traces
    for replay in phase.replay:
        size = len(sets[replay.name])
        sources.append(Source(range(start, start + size), replay.weight))
        start += size
    return sources, sets["traces"].subset(aside) if aside else None


def train(ready: Ready, recipe: Recipe, run: OpenRun, world: World) -> dict[str, Any]:
    """Train, writing metrics.jsonl and checkpoints, then save the student; returns what was counted."""
    phase, student = ready.phase, ready.student
    checkpoint_activations(ready.model, phase)
    look = watcher(ready, recipe, run) if phase.monitor else None
    tutor = tutor_of(ready, recipe, run.step) if isinstance(phase, KdPhase) else None
    rollouts = rollouts_of(phase, ready, tutor) if isinstance(phase, OnPolicyPhase) else None
    trainer = Trainer(
        ready.model,
        ready.documents,
        phase,
        student.precision,
        run.work,
        ready.sources,
        world,
        shared_by(student.parallel),
        look,
        tutor,
        rollouts,
    )
    say_plan(trainer, run)
    append = write_metrics(run.path("metrics.jsonl"), trainer.resumed_from) if world.main else lambda values: None
    lengths = ready.documents.lengths
    tokens = [sum(int(lengths[index]) for index in chosen) for chosen in trainer.plan]
    usage = Usage.of(trainer, run.options)
    settings = {**phase.model_dump(mode="json"), "precision": student.precision, "init": student.init}
    with (
        closing(rollouts.writer) if rollouts else nullcontext(),
        graceful() as stop,
        progress(
            f"train {run.step.name}",
            sum(tokens),
            run.options if world.main else quiet(run.options),
            unit="tok",
            done=sum(tokens[: trainer.resumed_from]),
        ) as bar,
        trackers(
            student.trackers if world.main else (), "distill", run.step.name, run.folder / "trackers", settings
        ) as send,
    ):
        for report in trainer.run(stop):
            values = usage.row(report) if isinstance(report, StepReport) else dict(report)
            append(values)
            send(values, values["step"])
            if isinstance(report, StepReport):
                bar.advance(report.tokens, step=f"{report.step}/{len(trainer.plan)}", loss=f"{report.loss:.3f}")
    save(trainer, ready, recipe, run)
    counts = {**ready.counts, **summarise(trainer, run.path("metrics.jsonl"), phase)} if world.main else {}
    if world.main:
        write_student_card(recipe, run, counts)
    return counts


def tutor_of(ready: Ready, recipe: Recipe, step: Step) -> Tutor:
    """Where a distilling phase gets its teachers' distributions."""
    phase, logprobs = ready.phase, recipe.logprobs
    assert isinstance(phase, KdPhase) and logprobs is not None  # the recipe's own validation
    if phase.teacher == "cache":
        folders = {teacher.name: step.result(f"logprobs:{teacher.name}").folder for teacher in logprobs.teachers}
        return cached_tutor(folders, logprobs, phase, ready.model, ready.tokenizer, ready.documents)
    attention = attention_for(ready.student, str(ready.model.device))
    return tutor_in_memory(logprobs, phase, ready.model, ready.tokenizer, ready.documents, attention)


def rollouts_of(phase: OnPolicyPhase, ready: Ready, tutor: Tutor | None) -> Rollouts:
    """What lets the student answer for itself, in tokens and at lengths that the teachers know too."""
    assert isinstance(tutor, TutorInMemory)  # the recipe's own validation
    context = min(context_of(model) for model in (ready.model, *tutor.models))
    if phase.writer == "vllm" and phase.vllm.max_model_len:
        context = min(context, phase.vllm.max_model_len)
    writer = writer_of(phase, int(ready.tokenizer.pad_token_id), tutor.vocabulary, context)
    return Rollouts(phase, writer, Guard.of(phase), context)


class Usage(NamedTuple):
    """What turns a step's report into a row of metrics: speed, memory and use of the hardware."""

    trainer: Trainer
    shape: Any
    peak: float
    device: str

    @classmethod
    def of(cls, trainer: Trainer, options: RunOptions) -> "Usage":
        """For a trainer, with the machine's peak measured now."""
        device = str(trainer.model.device)
        precision = "bf16" if trainer.model.dtype.itemsize == 2 else "fp32"
        peak = peak_flops(precision, device, options.cpu_threads) * trainer.world.size
        return cls(trainer, shape_of(trainer.model), peak, device)

    def row(self, report: StepReport) -> dict[str, Any]:
        """The report as plain values with tokens/s, MFU and memory."""
        flops = self.shape.flops(self.trainer.last_lengths, report.supervised)
        return {
            **report._asdict(),
            "tokens_per_s": round(report.tokens / report.seconds, 1),
            "supervised_per_s": round(report.supervised / report.seconds, 1),
            "mfu": round(flops / report.seconds / self.peak, 4),
            "memory_mb": round(peak_memory_mb(self.device), 1),
            **(self.trainer.rollouts.guard.last if self.trainer.rollouts else {}),
        }


def quiet(options: RunOptions) -> RunOptions:
    """The same options, for a process that says nothing."""
    from dataclasses import replace

    return replace(options, quiet=True)


def say_plan(trainer: Trainer, run: OpenRun) -> None:
    """Say what the plan comes to before it runs: packing must not make training shorter unseen."""
    if run.options.quiet or not trainer.world.main:
        return
    steps, documents = len(trainer.plan), sum(map(len, trainer.plan))
    say(
        f"{run.step.label}: {documents:,} documents ({documents / max(1, steps):,.1f} a step) in {steps:,} steps"
        + (f", going on after step {trainer.resumed_from:,}" if trainer.resumed_from else "")
    )
    if steps < 20:
        say(
            f"{run.step.label}: only {steps} optimizer steps; if that is fewer than meant, lower"
            f" student.phases.{run.step.args['phase']}.step_tokens ({trainer.phase.step_tokens:,})"
        )


def watcher(ready: Ready, recipe: Recipe, run: OpenRun) -> Watcher:
    """The monitor's look, with the problems of its sets."""
    monitor = ready.phase.monitor
    assert monitor is not None and run.step.args.get("sets") is not None
    prompts: dict[str, list[Prompt]] = {}
    for name in monitor.sets:
        assert recipe.evaluate is not None  # the recipe's own validation
        folder = run.step.args["sets"][name].folder
        prompts[name] = set_prompts(recipe.evaluate, name, folder / "heldout.jsonl")[: monitor.problems]
    return Watcher(monitor, recipe, ready.tokenizer, ready.heldout, prompts, run.folder / "looks", quiet(run.options))


def checkpoint_activations(model: Any, phase: TrainingPhase) -> None:
    """Recompute activations where the phase asks for it."""
    if phase.gradient_checkpointing:
        # transformers renamed it in the middle of version 5
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()


def summarise(trainer: Trainer, metrics: Path, phase: TrainingPhase) -> dict[str, Any]:
    """Totals over all steps, from metrics.jsonl, so that they are right after a resume too."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    reports = [StepReport(**{name: row[name] for name in StepReport._fields}) for row in rows if "loss" in row]
    looks = [row for row in rows if "loss" not in row]
    tokens, packs, cells = (sum(getattr(r, name) for r in reports) for name in ("tokens", "packs", "cells"))
    room = packs * phase.micro_batch_tokens if phase.batching == "packed" else cells
    stopped = trainer.stopping
    return {
        "steps": len(reports),
        "steps_planned": len(trainer.plan),
        "tokens": tokens,
        "supervised_tokens": sum(r.supervised for r in reports),
        "packs": packs,
        "packing_efficiency": round(tokens / max(1, room), 4),
        "first_loss": reports[0].loss if reports else None,
        "last_loss": reports[-1].loss if reports else None,
        **({"best_step": stopped.best_step, "best": stopped.best} if stopped.best_step is not None else {}),
        **({"looks": {"first": looks[0], "last": looks[-1]}} if looks else {}),
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


# --- saving ---------------------------------------------------------------------------------------------------------


def save(trainer: Trainer, ready: Ready, recipe: Recipe, run: OpenRun) -> None:
    """Write the student as a plain checkpoint and check what was written; every process takes part."""
    from .weights import Replica

    model = ready.model
    if not isinstance(trainer.weights, Replica) or ready.phase.lora is not None:
        state = trainer.weights.state()
        model = plain_student(ready, state, recipe) if trainer.world.main else None
    if trainer.world.main:
        save_student(model, ready.tokenizer, run.path("model"))
        prompt = next(read_records(run.step.result("examples").path("examples.jsonl"), Example)).prompt
        check_saved(run.path("model"), ready.tokenizer, prompt, recipe)


def plain_student(ready: Ready, state: dict[str, Any], recipe: Recipe) -> Any:
    """The trained student in one piece on the CPU, adapters merged, rounded to what it was trained in."""
    import torch

    from .weights import DTYPES

    model = load_model(ready.source, "float32", "cpu", "sdpa")
    add_tokens(model, load_tokenizer(ready.source), ready.student.new_tokens)
    agree_on_end(model, ready.tokenizer)
    if ready.phase.lora is not None:
        model = merged(model, ready.phase.lora, state, ready.phase.seed)
    else:
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name in own.keys() & state.keys():  # a state may hold projections, which are no part of the student
                own[name].copy_(state[name])
    for parameter in model.parameters():  # not `to`: the rotary tables stay fp32
        parameter.data = parameter.data.to(DTYPES[ready.student.precision])
    model.config.dtype = DTYPES[ready.student.precision]
    return model


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


def write_student_card(recipe: Recipe, run: OpenRun, counts: dict[str, Any]) -> None:
    """Put the model card beside the weights."""
    from .card import facts_of, write_card

    rows = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    write_card(run.path("model"), facts_of(recipe, run.step, counts, [row for row in rows if "loss" not in row]))


def start_of(student: StudentConfig, step: Step) -> ModelSource:
    """The model a phase starts from."""
    if "model" in step.upstream:
        folder = step.result("model").path("model")
        return ModelSource(str(folder), folder)
    return find_model(student.init, student.revision)


def _student(recipe: Recipe) -> StudentConfig:
    assert recipe.student is not None  # the plan has no train step without it
    return recipe.student
