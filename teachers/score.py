"""The score stage: what a teacher would have said at every supervised token of the traces, stored for training.

Reads the selected examples, renders them exactly as training will, lets the teacher read them, and keeps its
distribution in the form that the recipe asks for (`distill.logprobs`). One run a teacher, in shards of some thousand
rows: a killed run goes on with the first shard that is not there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.attention import PER_DOCUMENT, final_hidden
from distill.config import Logprobs, Recipe, TeacherModel
from distill.documents import Array, Documents
from distill.errors import DataError, ModelError, naming
from distill.format import set_template
from distill.interrupts import graceful
from distill.logprobs import MANIFEST, Facts, LogprobCache, Rows, document_key, joined_rows, write_manifest, write_shard
from distill.models import (
    DTYPE_NAMES,
    ModelSource,
    choose_device,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    model_digest,
    require_context,
    set_threads,
)
from distill.progress import progress, say
from distill.records import digest_json
from distill.runs import DigestCache, RunOptions, Step, library_versions, open_run
from distill.token_store import tokenize, tokenizer_digest
from distill.vocabularies import different_ends, exchange_, shared_vocabulary

from .distributions import SAMPLER, kept, uniforms

SHARD_ROWS = 32768
"""Supervised tokens of a shard, about."""
LOGIT_ROWS = 1024
"""Rows whose logits are made together, in the teacher's precision."""
CHUNK_ROWS = 128
"""Rows whose probabilities exist at the same time; 128 x 151,936 take 78 MB in fp32 and twice that while drawing."""

Scorer = Callable[[Sequence[int]], Iterator[tuple[int, Rows]]]
"""Scores documents by number; yields each with its rows, in any order."""


def preflight(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Refuse, before any work: a teacher that is not there, another tokenizer, an engine that is not installed."""
    logprobs, teacher = _logprobs(recipe), teacher_of(recipe, step)
    with naming(logprobs.key(teacher.name)):
        source = find_model(teacher.model, teacher.revision)
        require_context(f"teacher {teacher.name}", load_config(source), recipe.format.max_tokens)
    if teacher.engine == "vllm":
        from .served import require

        with naming(logprobs.key(teacher.name)):
            require(recipe, teacher, options)
    if logprobs.alignment == "same_tokenizer":
        own, theirs = document_tokenizer(recipe, source), load_tokenizer(source)
        shared_vocabulary(own, theirs, teacher.name)
        if teacher.engine == "vllm" and different_ends(own, theirs):
            raise ModelError(
                f"logprobs.teachers.{teacher.name} ends its answers with token {theirs.eos_token_id}, the student with"
                f" {own.eos_token_id}; vLLM's likeliest tokens cannot be exchanged: score with engine: transformers"
            )


def run(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Score the documents of the selected examples with the teacher `step.args["teacher"]`; seal the run."""
    set_threads(options)
    logprobs, teacher = _logprobs(recipe), teacher_of(recipe, step)
    source = find_model(teacher.model, teacher.revision)
    tokenizer = document_tokenizer(recipe, source)
    examples = step.result("examples").path("examples.jsonl")
    ends = [tokenizer.eos_token_id]
    documents = tokenize(examples, "examples", tokenizer, recipe.format, ends, options, "examples")
    with open_run(step, options) as run:
        digest = tokenizer_digest(tokenizer)
        if logprobs.alignment == "spans":
            from .alignment import spans_scorer

            spool = run.work / "readings.bin"
            facts, score, more = spans_scorer(recipe, teacher, tokenizer, digest, documents, examples, spool, options)
        else:
            facts, score, more = same_tokens_scorer(recipe, teacher, tokenizer, digest, documents, options)
        try:
            shards = capture(documents, facts, score, run.folder, options, f"score {step.name}")
        finally:
            getattr(score, "close", lambda: None)()
        made_by = {
            "name": teacher.name,
            "model": teacher.model if source.folder is None else Path(teacher.model).name,
            "revision": teacher.revision,
            "content": model_digest(source, DigestCache()),
            "precision": teacher.precision,
            "engine": teacher.engine,
            "versions": library_versions(("distill", "torch", "transformers", "vllm")),
            "sampler": SAMPLER if facts.draws else None,
        }
        write_manifest(run.folder, facts, shards, made_by, **more)
        cache = LogprobCache(run.folder)
        rows = cache.manifest["rows"]
        size = (run.folder / MANIFEST).stat().st_size + sum(one["bytes"] for one in cache.manifest["shards"])
        say(f"{step.label}: {len(cache):,} documents, {rows:,} rows, {size / max(1, rows):.1f} bytes a row")
        counts = {"documents": len(cache), "rows": rows, "bytes_per_row": round(size / max(1, rows), 2), **more}
        run.seal(digest=digest_json([one["sha256"] for one in cache.manifest["shards"]]), counts=counts)


def teacher_of(recipe: Recipe, step: Step) -> TeacherModel:
    """The teacher that a step scores with."""
    return next(one for one in _logprobs(recipe).teachers if one.name == step.args["teacher"])


def document_tokenizer(recipe: Recipe, teacher: ModelSource) -> Any:
    """The tokenizer that training will render documents with: the student's, or the teacher's without one.

    Raises ModelError for new tokens, which a teacher does not have.
    """
    source = teacher
    if recipe.student is not None:
        source = find_model(recipe.student.init, recipe.student.revision)
    tokenizer = load_tokenizer(source)
    set_template(tokenizer, recipe.format)
    known = tokenizer.get_vocab()
    if recipe.student and (new := [token for token in recipe.student.new_tokens if token not in known]):
        raise ModelError(
            f"student.new_tokens adds {new[0]!r}, which no teacher of logprobs knows; leave it out, or train the new"
            " tokens in an sft phase of another recipe first"
        )
    return tokenizer


# --- capture --------------------------------------------------------------------------------------------------------


def shards_of(documents: Documents) -> list[list[int]]:
    """Document numbers of every shard, in order; documents that hold the same ids are scored once."""
    shards: list[list[int]] = []
    room, seen = 0, set()
    for index in range(len(documents)):
        key = document_key(documents.ids(index))
        if key in seen:
            continue
        seen.add(key)
        if room <= 0:
            shards.append([])
            room = SHARD_ROWS
        shards[-1].append(index)
        room -= len(documents.supervised(index))
    return shards


def capture(
    documents: Documents, facts: Facts, score: Scorer, folder: Path, options: RunOptions, label: str
) -> list[Path]:
    """Write every shard that is not there; returns all of them."""
    planned = shards_of(documents)
    paths = [folder / f"shard-{number:05d}.safetensors" for number in range(len(planned))]
    tokens = [sum(int(documents.lengths[index]) for index in chosen) for chosen in planned]
    done = sum(count for count, path in zip(tokens, paths) if path.exists())
    with graceful() as stop, progress(label, sum(tokens), options, unit="tok", done=done) as bar:
        for chosen, path in zip(planned, paths):
            if path.exists():
                continue
            found: dict[int, Rows] = {}
            for index, rows in score(chosen):
                found[index] = rows
                bar.advance(int(documents.lengths[index]))
                stop.raise_if_requested()
            write_shard(path, [(document_key(documents.ids(index)), found[index]) for index in chosen], facts)
    return paths


def same_tokens_scorer(
    recipe: Recipe, teacher: TeacherModel, tokenizer: Any, digest: str, documents: Documents, options: RunOptions
) -> tuple[Facts, Scorer, dict[str, Any]]:
    """Scores documents as they are, with a teacher that has their tokenizer."""
    logprobs = _logprobs(recipe)
    source = find_model(teacher.model, teacher.revision)
    theirs = load_tokenizer(source)
    vocabulary = shared_vocabulary(tokenizer, theirs, teacher.name)
    if (highest := documents.highest) >= vocabulary:
        raise DataError(
            f"logprobs.teachers.{teacher.name}: documents have token {highest}, but only the first {vocabulary:,}"
            " tokens mean the same in both tokenizers; take a teacher of the student's family, or alignment: spans"
        )
    facts = Facts.of(logprobs, vocabulary, digest)
    if teacher.engine == "vllm":
        from .served import ServedScorer

        return facts, ServedScorer(recipe, teacher, documents, facts, options), {}
    ends = different_ends(tokenizer, theirs)
    more = {"ends_exchanged": list(ends)} if ends else {}
    return facts, LiveScorer(load_teacher(teacher, options), documents, facts, logprobs, ends), more


def load_teacher(teacher: TeacherModel, options: RunOptions) -> Any:
    """The teacher's model, ready to read packed documents."""
    device = choose_device(options)
    source = find_model(teacher.model, teacher.revision)
    return load_model(source, DTYPE_NAMES[teacher.precision], device, PER_DOCUMENT)


@dataclass(frozen=True)
class LiveScorer:
    """A teacher in memory that scores documents, packed up to `micro_batch_tokens` a pass."""

    model: Any
    documents: Documents
    facts: Facts
    logprobs: Logprobs
    ends: tuple[int, int] | None = None
    """End tokens of student and teacher where they differ."""

    def __call__(self, chosen: Sequence[int]) -> Iterator[tuple[int, Rows]]:
        """See `Scorer`."""
        for batch in batches(self.documents.lengths, chosen, self.logprobs.micro_batch_tokens):
            with torch.no_grad():
                scored = list(self._scored(batch))
            yield from scored

    def _scored(self, batch: Sequence[int]) -> Iterator[tuple[int, Rows]]:
        hidden_TH, bounds = read_packed(self.model, [self.documents.ids(index) for index in batch])
        head_VH = self.model.get_output_embeddings().weight[: self.facts.vocabulary]
        for index, start in zip(batch, bounds):
            places = torch.from_numpy(start + self.documents.supervised(index) - 1).to(hidden_TH.device)
            key = document_key(self.documents.ids(index))
            numbers = uniforms(self.facts.seed, key, len(places), self.facts.draws) if self.facts.draws else None
            parts = []
            for rows, log_p in log_probabilities(hidden_TH[places], head_VH, self.facts.temperature, self.ends):
                parts.append(kept(log_p, None if numbers is None else numbers[rows], self.facts))
            yield index, joined_rows(parts)


def log_probabilities(
    hidden_NH: torch.Tensor, head_VH: torch.Tensor, temperature: float, ends: tuple[int, int] | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """log softmax(logits / T) in fp32 of a few rows at a time, [rows, V], with which rows they are."""
    for first in range(0, len(hidden_NH), LOGIT_ROWS):
        logits = exchange_(hidden_NH[first : first + LOGIT_ROWS] @ head_VH.T, ends)
        for start in range(0, len(logits), CHUNK_ROWS):
            some = logits[start : start + CHUNK_ROWS]
            rows = slice(first + start, first + start + len(some))
            yield rows, (some.float() / temperature).log_softmax(-1)


def batches(lengths: Mapping[int, int] | Array, chosen: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Documents of like length together, up to so many tokens (at least one)."""
    batch: list[int] = []
    room = 0
    for index in sorted(chosen, key=lambda one: (-lengths[one], one)):
        length = int(lengths[index])
        if batch and length > room:
            yield batch
            batch, room = [], 0
        room = (room if batch else budget) - length
        batch.append(index)
    if batch:
        yield batch


def read_packed(model: Any, ids: Sequence[Array]) -> tuple[torch.Tensor, list[int]]:
    """Final hidden states [T, H] of documents laid end to end, and where each begins (and the last one ends)."""
    bounds = [0, *np.cumsum([len(one) for one in ids]).tolist()]
    ids_BT = torch.from_numpy(np.concatenate(ids).astype(np.int64))[None].to(model.device)
    positions_BT = torch.from_numpy(np.concatenate([np.arange(len(one)) for one in ids]))[None].to(model.device)
    return final_hidden(model, positions_BT, bounds, input_ids=ids_BT)[0], bounds


def _logprobs(recipe: Recipe) -> Logprobs:
    assert recipe.logprobs is not None  # the plan has no score step without it
    return recipe.logprobs
