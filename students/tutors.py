"""Where a pass's targets come from: a cache that the score stage has made, or teachers in memory beside the student.

A `Tutor` gives the targets of a pack. The cached one finds each document by its ids, so shuffling, packing and a resume
cannot give a document another one's rows; the one in memory reads the very cells that the student reads.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from distill.attention import PER_DOCUMENT, final_hidden
from distill.config import KdPhase, Logprobs, OnPolicyPhase
from distill.documents import Array, Documents
from distill.errors import DataError, ModelError, naming
from distill.logprobs import SPANS, Facts, LogprobCache, Rows, joined_rows, open_cache, require_fit
from distill.models import DTYPE_NAMES, find_model, load_config, load_model, load_tokenizer, require_context
from distill.token_store import tokenizer_digest
from distill.vocabularies import different_ends, shared_vocabulary

from .distillation import CutHead, Drawn, DrawnBy, Head, InMemory, Known, Masked, Targets, Together
from .fused import lean
from .hidden import HiddenMatch, attach, captured_by
from .objective import Lesson, PackTensors, as_attended
from .packing import Pack


class Tutor(Protocol):
    """Gives what the teachers say about a pack."""

    def lesson(self, documents: Documents, pack: Pack, tensors: PackTensors) -> Lesson:
        """What is known of the pack's supervised rows, on the student's device."""


# --- from a cache ---------------------------------------------------------------------------------------------------


class CachedTargets(NamedTuple):
    """Rows of a cache for the supervised rows of a pack; either part may be empty."""

    vocabulary: int
    tail: str
    head_ids_NK: Tensor
    head_log_p_NK: Tensor
    tail_log_p_N: Tensor
    offsets: Array
    """Where each row's single tokens begin (and the last one's end)."""
    row_E: Tensor
    id_E: Tensor
    share_E: Tensor
    seen_N: Tensor

    def chunk(self, start: int, end: int) -> "CachedTargets":
        """See `Targets`."""
        first, last = int(self.offsets[start]), int(self.offsets[end])
        rows, entries = slice(start, end), slice(first, last)
        return self._replace(
            head_ids_NK=self.head_ids_NK[rows],
            head_log_p_NK=self.head_log_p_NK[rows],
            tail_log_p_N=self.tail_log_p_N[rows],
            offsets=self.offsets[start : end + 1] - first,
            row_E=self.row_E[entries] - start,
            id_E=self.id_E[entries],
            share_E=self.share_E[entries],
            seen_N=self.seen_N[rows],
        )

    def at(self, start: int, end: int) -> Known:
        """See `Targets`."""
        own = self.chunk(start, end)
        known: Known
        if len(self.id_E):
            known = Drawn(own.row_E, own.id_E, own.share_E)
        elif self.tail == "bucket":
            known = Head(own.head_ids_NK, own.head_log_p_NK, own.tail_log_p_N)
        else:
            known = CutHead(own.head_ids_NK, own.head_log_p_NK, self.tail == "renormalised_biased")
        return known if bool(own.seen_N.all()) else Masked(known, own.seen_N)


class CachedTutor(NamedTuple):
    """Looks documents up in the caches of one or several teachers."""

    caches: Sequence[LogprobCache]
    weights: Sequence[float]
    tail: str = "bucket"

    def lesson(self, documents: Documents, pack: Pack, tensors: PackTensors) -> Lesson:
        """See `Tutor`."""
        found: list[Targets] = [self._of(cache, documents, pack, tensors.ids_BT.device) for cache in self.caches]
        return Lesson(found[0] if len(found) == 1 else Together(found, self.weights))

    def _of(self, cache: LogprobCache, documents: Documents, pack: Pack, device: Any) -> CachedTargets:
        rows = joined_rows(
            [cache.rows(documents.ids(index), len(documents.supervised(index))) for index in pack.documents]
        )
        return cached_targets(chosen_rows(rows, pack.places_N), cache, self.tail, device)


def chosen_rows(rows: Rows, places_N: Array) -> Rows:
    """Some of the rows, by ascending number."""
    if len(places_N) == rows.number:
        return rows
    keep = np.zeros(rows.number, bool)
    keep[places_N] = True
    of_entries = np.repeat(keep, rows.sizes)
    return Rows(
        rows.head_ids[keep], rows.head_log_p[keep], rows.tail_log_p[keep], rows.sizes[keep],
        rows.ids[of_entries], rows.counts[of_entries], rows.seen[keep],
    )  # fmt: skip


def cached_targets(rows: Rows, cache: LogprobCache, tail: str, device: Any) -> CachedTargets:
    """Rows as tensors; drawn tokens as shares, of a hybrid's tail together with its head."""
    facts = cache.facts
    sizes, row_E, id_E = rows.sizes, np.repeat(np.arange(rows.number), rows.sizes), rows.ids
    share_E = rows.counts.astype(np.float32) / max(1, facts.draws)
    if facts.form == "hybrid":
        share_E = share_E * np.exp(rows.tail_log_p)[row_E]
        places = np.repeat(np.arange(rows.number), facts.k)
        order = np.argsort(np.concatenate([places, row_E]), kind="stable")
        row_E = np.concatenate([places, row_E])[order]
        id_E = np.concatenate([rows.head_ids.reshape(-1), id_E])[order]
        share_E = np.concatenate([np.exp(rows.head_log_p).reshape(-1), share_E])[order]
        sizes = sizes + facts.k

    def put(array: Array, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)

    return CachedTargets(
        facts.vocabulary,
        tail,
        put(rows.head_ids, torch.int64),
        put(rows.head_log_p, torch.float32),
        put(rows.tail_log_p, torch.float32),
        np.concatenate([[0], np.cumsum(sizes)]),
        put(row_E, torch.int64),
        put(id_E, torch.int64),
        put(share_E, torch.float32),
        put(rows.seen, torch.bool),
    )


# --- in memory ------------------------------------------------------------------------------------------------------


class TutorInMemory(NamedTuple):
    """Teachers beside the student, each reading every pass; their logits exist a chunk of rows at a time."""

    models: Sequence[Any]
    weights: Sequence[float]
    vocabulary: int
    """Tokens that mean the same to the student and to every teacher."""
    temperature: float
    drawn_only: bool = False
    """Whether only the text's own tokens are looked at (`sampled_reverse_kl`)."""
    match: HiddenMatch | None = None
    """Which hidden states of the first teacher are learned too."""
    ends: Sequence[tuple[int, int] | None] = ()
    """End tokens of the student and of each teacher, where they differ."""

    @torch.no_grad()
    def lesson(self, documents: Documents, pack: Pack, tensors: PackTensors) -> Lesson:
        """See `Tutor`."""
        found: list[Targets] = []
        features: list[Tensor] = []
        for number, model in enumerate(self.models):
            with captured_by(self.match if not found else None, model, teacher=True) as states:
                hidden_NH = self._read(model, tensors)
            features += [state_BTH.flatten(0, 1)[tensors.rows_N] for state_BTH in states]
            head_VH = model.get_output_embeddings().weight
            ends = self.ends[number] if self.ends else None
            own: Targets = InMemory(hidden_NH, head_VH, self.vocabulary, self.temperature, ends)
            found.append(DrawnBy(own, tensors.targets_N) if self.drawn_only else own)
        return Lesson(found[0] if len(found) == 1 else Together(found, self.weights), features)

    def _read(self, model: Any, tensors: PackTensors) -> Tensor:
        cells = as_attended(tensors, model.config._attn_implementation)
        with lean(model):
            hidden = final_hidden(model, cells.positions_BT, cells.bounds, input_ids=cells.ids_BT)
        return hidden.flatten(0, 1)[tensors.rows_N]


# --- opening them ---------------------------------------------------------------------------------------------------


def cached_tutor(
    folders: Mapping[str, Path], logprobs: Logprobs, phase: KdPhase, model: Any, tokenizer: Any, documents: Documents
) -> CachedTutor:
    """A tutor over the caches of all teachers, by name.

    Raises DataError for a cache that was made for another tokenizer, template, form or temperature, for caches that do
    not share a vocabulary, and for a document that is in none.
    """
    rows = model.get_output_embeddings().weight.shape[0]
    digest, shares = tokenizer_digest(tokenizer), logprobs.weights()
    caches = {name: open_cache(folder) for name, folder in folders.items()}
    for cache in caches.values():
        wanted = Facts.of(logprobs, min(rows, cache.facts.vocabulary), digest)
        if logprobs.alignment == "spans":  # how many tokens are spelled alike is the teacher's
            wanted = wanted._replace(alignment=SPANS, k=cache.facts.k)
        require_fit(cache.facts, wanted, cache.folder)
        if (coverage := cache.manifest.get("coverage", 1.0)) < logprobs.min_coverage:
            raise DataError(
                f"{cache.folder}: {coverage:.0%} of its rows are aligned, logprobs.min_coverage is"
                f" {logprobs.min_coverage:.0%}; take a teacher whose tokenizer is closer, or lower it"
            )
        cache.require(documents.ids(index) for index in range(len(documents)))
    if len(sizes := {cache.facts.vocabulary for cache in caches.values()}) > 1:
        raise DataError(
            f"the teachers of logprobs share {' and '.join(f'{size:,}' for size in sorted(sizes))} tokens with the"
            " student; a mixture takes one vocabulary: take teachers with the same tokenizer, or teacher: memory"
        )
    return CachedTutor(list(caches.values()), [shares[name] for name in caches], phase.tail)


def tutor_in_memory(
    logprobs: Logprobs, phase: KdPhase, model: Any, tokenizer: Any, documents: Documents, attention: str
) -> TutorInMemory:
    """A tutor over models that are loaded beside the student.

    Raises ModelError for a teacher with another tokenizer or (on-policy) other end tokens, DataError for documents with
    tokens that a teacher does not know.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    shares = logprobs.weights()
    models: list[Any] = []
    ends: list[tuple[int, int] | None] = []
    for teacher in logprobs.teachers:
        source = find_model(teacher.model, teacher.revision)
        theirs = load_tokenizer(source)
        vocabulary = min(vocabulary, shared_vocabulary(tokenizer, theirs, teacher.name))
        ends.append(different_ends(tokenizer, theirs))
        kind = PER_DOCUMENT if teacher.precision == "fp32" and attention == "flash_attention_2" else attention
        own = load_model(source, DTYPE_NAMES[teacher.precision], str(model.device), kind)
        vocabulary = min(vocabulary, own.get_output_embeddings().weight.shape[0])
        models.append(own.requires_grad_(False))
    require_known(documents, vocabulary)
    drawn_only = isinstance(phase, OnPolicyPhase) and phase.divergence == "sampled_reverse_kl"
    match = attach(phase.hidden, model, models[0]) if phase.hidden else None
    return TutorInMemory(models, [*shares.values()], vocabulary, phase.temperature, drawn_only, match, ends)


def require_teachers(logprobs: Logprobs, phase: KdPhase, tokenizer: Any, most_tokens: int) -> None:
    """Refuse, before any work, teachers in memory that do not fit.

    Raises ModelError for another tokenizer, a context below `most_tokens`, and on-policy for a teacher that ends its
    answers with another token: it would call every end that the student writes a mistake.
    """
    for teacher in logprobs.teachers:
        where = f"logprobs.teachers.{teacher.name}"
        with naming(logprobs.key(teacher.name)):
            source = find_model(teacher.model, teacher.revision)
            require_context(f"teacher {teacher.name}", load_config(source), most_tokens)
        theirs = load_tokenizer(source)
        shared_vocabulary(tokenizer, theirs, teacher.name)
        if isinstance(phase, OnPolicyPhase) and different_ends(tokenizer, theirs):
            raise ModelError(
                f"{where} ends its answers with token {theirs.eos_token_id}, the student with {tokenizer.eos_token_id};"
                " on-policy training takes equal end tokens: choose the teacher's instruct or base twin that has them"
            )


def require_known(documents: Documents, vocabulary: int) -> None:
    """Refuse documents with tokens that not every teacher knows."""
    if (highest := documents.highest) >= vocabulary:
        raise DataError(
            f"documents have token {highest}, but only the first {vocabulary:,} tokens mean the same to student and"
            " teachers; take teachers of the student's family, without student.new_tokens"
        )
