"""The texts that variants are compared on, and those that GPTQ is calibrated on.

Compared are held-out prompts with the student's own evaluated answers: what a student would predict inside a prompt or
after its end token was never trained and is never used. Where it was not evaluated it writes answers itself, once.
Calibration uses the training set, never what is compared.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import ExportConfig, Recipe
from distill.errors import ExportError
from distill.evaluation import read_items, set_prompts
from distill.format import encode_document, encode_prompt, render_prompt, with_system
from distill.models import ModelSource, load_tokenizer, return_freed_memory
from distill.onnx_decoding import OnnxDecoder
from distill.progress import progress, say
from distill.records import Example, Message, Prompt, read_records, write_json
from distill.runs import OpenRun, RunOptions, Step

from .graph import build_variant

PROBES = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "If a train leaves at nine and arrives at noon, how long is the journey?",
    "List three colours.",
    "What is 17 times 6? Show your working.",
    "Explain why the sky is blue, in two sentences.",
    "Name an animal that lives in water and one that lives on land.",
    "Tom has five apples and gives two away. How many are left?",
    "Write a short poem about winter.",
    "What does a computer's memory do?",
    "Give me a recipe for pancakes.",
    "Which number comes next: 2, 4, 8, 16?",
    "How do plants make food?",
    "Translate 'good morning' into French.",
    "Write a Python function that adds two numbers.",
    "What is the difference between weather and climate?",
)
"""Prompts where the recipe brings none."""

DOCUMENT_TOKENS = 1024
"""Longest document in a comparison; its logits exist in memory at once."""
TEMPERATURE = 0.6
"""Of texts that the student writes itself: what DeepSeek recommends for R1 and its distillations."""
WRITTEN_TOKENS = 256
"""Longest answer that the student writes itself for a comparison."""
AT_ONCE = 24
"""Texts that are written together: more would not be much faster here, and their caches are most of the memory."""
CALIBRATION_SEED = 1_000_000
"""Far from the seeds of what is compared."""


class Text(NamedTuple):
    """A text in token ids and the positions whose predictions are compared."""

    ids: list[int]
    compared: range

    @property
    def following(self) -> list[int]:
        """The tokens that follow the compared positions, as far as the text has them."""
        return self.ids[self.compared.start + 1 : self.compared.stop + 1]


class Asked(NamedTuple):
    """A prompt, as messages, as the template renders it, and in token ids."""

    messages: list[dict[str, str]]
    rendered: str
    ids: list[int]


class Texts(NamedTuple):
    """What the variants are compared on."""

    documents: list[Text]
    asked: list[Asked]
    """Held-out prompts."""

    @property
    def prompts(self) -> list[list[int]]:
        """Their token ids."""
        return [one.ids for one in self.asked]


def text_of(prompt: Sequence[int], answer: Sequence[int]) -> Text:
    """A prompt and its answer, cut to the longest length that is compared; without an answer all of it is."""
    ids = [*prompt, *answer][:DOCUMENT_TOKENS]
    return Text(ids, range(len(prompt) - 1, len(ids) - 1) if answer else range(len(ids)))


def comparison_texts(recipe: Recipe, export: ExportConfig, step: Step, checkpoint: Path, run: OpenRun) -> Texts:
    """Held-out prompts, continued by the student's answers, with at least `parity_tokens` positions where there are."""
    tokenizer = load_tokenizer(ModelSource(str(checkpoint), checkpoint))
    wanted = export.gates.parity_tokens
    if "student" in step.upstream:
        items = list(read_items(step.result("student").folder))
        asked = [_asked(tokenizer, item.prompt, recipe) for item in items]
        pairs = [[one.ids, list(item.trace.token_ids or ())] for one, item in zip(asked, items, strict=True)]
    else:
        asked = [_asked(tokenizer, prompt, recipe) for prompt in held_out(recipe, export, step)]
        pairs = written_texts(checkpoint, [one.ids for one in asked], wanted, run)
    texts = comparable(pairs)
    return Texts(list(until(texts, wanted)), asked)


def comparable(pairs: Sequence[Sequence[list[int]]]) -> list[Text]:
    """The texts of prompts that leave room for an answer; those without an answer only where none has one.

    Says how many are left out; raises ExportError if nothing is left.
    """
    short = [(prompt, answer) for prompt, answer in pairs if len(prompt) < DOCUMENT_TOKENS]
    kept = [pair for pair in short if pair[1]] or short
    if not kept:
        raise ExportError(
            f"every held-out prompt has {DOCUMENT_TOKENS:,} tokens or more, so no answer can be compared; add shorter"
            " ones to the set of export.set"
        )
    if left_out := len(pairs) - len(kept):
        say(f"export: {left_out} of {len(pairs)} held-out texts are not compared: too long, or without an answer")
    return [text_of(prompt, answer) for prompt, answer in kept]


def held_out(recipe: Recipe, export: ExportConfig, step: Step) -> list[Prompt]:
    """The prompts of the task gate's set; probes of our own where the recipe has none."""
    if "prompts" in step.upstream and recipe.evaluate:
        return set_prompts(recipe.evaluate, export.set, step.result("prompts").path("heldout.jsonl"))
    return [Prompt.of([Message(role="user", content=probe)]) for probe in PROBES]


def until(texts: Sequence[Text], tokens: int) -> Iterator[Text]:
    """The first texts that give so many positions to compare, or all of them."""
    given = 0
    for text in texts:
        if given >= tokens:
            return
        given += len(text.compared)
        yield text


def _asked(tokenizer: Any, prompt: Prompt, recipe: Recipe) -> Asked:
    rendered = render_prompt(tokenizer, prompt.messages, recipe.format)
    return Asked(with_system(prompt.messages, recipe.format.system), rendered, encode_prompt(tokenizer, rendered))


# --- texts of the student's own writing, and of its training ----------------------------------------------------------


def written_texts(checkpoint: Path, prompts: Sequence[list[int]], tokens: int, run: OpenRun) -> list[list[list[int]]]:
    """Pairs of a prompt and the torch student's answer to it, until there are `tokens`; kept for a resume."""
    path = run.work / "written.json"
    if not path.exists():
        write_json(path, {"pairs": list(_enough(sampled(checkpoint, prompts, 0, run), tokens, run.options))})
        return_freed_memory()
    return list(json.loads(path.read_text())["pairs"])


def calibration_texts(checkpoint: Path, step: Step, recipe: Recipe, tokens: int, run: OpenRun) -> list[list[int]]:
    """Token ids to calibrate on: the training set's documents, or where there is none what the student writes."""
    source = ModelSource(str(checkpoint), checkpoint)
    tokenizer = load_tokenizer(source)
    if examples := _examples(step):
        documents = (
            encode_document(tokenizer, one.prompt.messages, one.reasoning, one.answer, recipe.format).ids
            for one in read_records(examples, Example)
        )
        return list(_up_to((ids[:DOCUMENT_TOKENS] for ids in documents), tokens))
    probes = [Prompt.of([Message(role="user", content=probe)]) for probe in PROBES]
    prompts = [_asked(tokenizer, probe, recipe).ids for probe in probes]
    written = list(_enough(sampled(checkpoint, prompts, CALIBRATION_SEED, run), tokens, run.options))
    return_freed_memory()
    return [[*prompt, *answer] for prompt, answer in written]


def _examples(step: Step) -> Path | None:
    """The training set of the student that is exported; None where it was not trained here."""
    while "model" in step.upstream:
        step = step.upstream["model"]
        if "examples" in step.upstream:
            return step.result("examples").path("examples.jsonl")
    return None


def _up_to(documents: Iterable[list[int]], tokens: int) -> Iterator[list[int]]:
    given = 0
    for ids in documents:
        if given >= tokens:
            return
        given += len(ids)
        yield ids


def _enough(
    pairs: Iterable[tuple[list[int], list[int]]], tokens: int, options: RunOptions
) -> Iterator[list[list[int]]]:
    """Pairs until their answers have so many tokens."""
    with progress("export: the student writes texts to compare", tokens, options, unit="tok") as bar:
        for prompt, answer in pairs:
            yield [prompt, answer]
            bar.advance(len(answer))
            if bar.done >= tokens:
                return


def sampled(
    checkpoint: Path, prompts: Sequence[list[int]], seed: int, run: OpenRun
) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts with answers that the student draws, round after round without end.

    The fp32 graph writes them: its distributions are torch's (the gates see to that), and it is several times as fast.
    """
    folder = run.work / "writer"
    if not folder.exists():
        build_variant(checkpoint, "fp32", folder)
    decoder = OnnxDecoder(folder, run.options.cpu_threads, max_batch=AT_ONCE)
    rounds = itertools.cycle(prompts)
    for number in itertools.count():
        batch = list(itertools.islice(rounds, AT_ONCE))
        seeds = [seed + AT_ONCE * number + place for place in range(len(batch))]
        answers = decoder.generate(batch, WRITTEN_TOKENS, temperature=TEMPERATURE, seed=seeds)
        yield from zip(batch, answers, strict=True)
