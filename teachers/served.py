"""Scoring by vLLM: the likeliest tokens of every supervised position, from its prompt log-probabilities."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from distill.config import Recipe, TeacherConfig, TeacherModel
from distill.documents import Documents
from distill.errors import EngineError, ModelError
from distill.logprobs import Facts, Rows, empty_rows
from distill.models import DTYPE_NAMES, load_config
from distill.runs import RunOptions

IN_FLIGHT = 64
"""Documents that vLLM reads at once."""


def as_teacher(teacher: TeacherModel) -> TeacherConfig:
    """The engine's configuration for a model that only reads."""
    options = teacher.vllm
    if options.dtype == "auto":
        options = options.model_copy(update={"dtype": DTYPE_NAMES[teacher.precision]})
    return TeacherConfig(engine="vllm", model=teacher.model, revision=teacher.revision, vllm=options)


def require(recipe: Recipe, teacher: TeacherModel, options: RunOptions) -> None:
    """Refuse what vLLM cannot do here. Raises MissingExtraError, ModelError or EngineError."""
    from distill.engines.vllm import model_source, preflight

    preflight(as_teacher(teacher), recipe.format, options)
    context = int(load_config(model_source(as_teacher(teacher))).max_position_embeddings)
    context = min(context, teacher.vllm.max_model_len or context)
    if recipe.format.max_tokens >= context:
        raise ModelError(
            f"teacher {teacher.name}: vLLM reads documents of up to {context - 1:,} tokens here, one less than the"
            f" context; set format.max_tokens={context - 1} or raise its vllm.max_model_len"
        )


class ServedScorer:
    """Lets vLLM read documents, some at a time; each comes with its `k` likeliest tokens and the mass of all others."""

    def __init__(self, recipe: Recipe, teacher: TeacherModel, documents: Documents, facts: Facts, options: RunOptions):
        from distill.engines.vllm import VllmEngine

        self._documents = documents
        self._facts = facts
        self._engine = VllmEngine.from_teacher(as_teacher(teacher), recipe.format, options)
        self._loop = asyncio.new_event_loop()

    def __call__(self, chosen: Sequence[int]) -> Iterator[tuple[int, Rows]]:
        """Score documents by number."""
        for at in range(0, len(chosen), IN_FLIGHT):
            some = chosen[at : at + IN_FLIGHT]
            found = self._loop.run_until_complete(self._all(some))
            yield from zip(some, found, strict=True)

    def close(self) -> None:
        """Stop vLLM."""
        self._loop.run_until_complete(self._engine.close())
        self._loop.close()

    async def _all(self, chosen: Sequence[int]) -> list[Rows]:
        return list(await asyncio.gather(*(self._one(index) for index in chosen)))

    async def _one(self, index: int) -> Rows:
        ids = self._documents.ids(index).tolist()
        scores = await self._engine.score(ids, self._documents.supervised(index).tolist(), self._facts.k)
        return rows_of(scores.top_ids_PK, scores.top_logprobs_PK, self._facts)


def rows_of(ids_PK: Any, log_p_PK: Any, facts: Facts) -> Rows:
    """Rows of the likeliest tokens; what they leave of 1 is the mass of all others.

    Raises EngineError for tokens beyond the shared vocabulary: the mass inside it cannot be told.
    """
    if ids_PK.size and int(ids_PK.max()) >= facts.vocabulary:
        raise EngineError(
            f"vLLM names token {int(ids_PK.max())} among the likeliest, which is no token of the tokenizer (it has"
            f" {facts.vocabulary:,}); score with engine: transformers"
        )
    rows = empty_rows(len(ids_PK), facts.k)
    rest = np.log(np.clip(1.0 - np.exp(log_p_PK.astype(np.float64)).sum(-1), 1e-12, 1.0))
    return rows._replace(head_ids=ids_PK.astype(np.int64), head_log_p=log_p_PK, tail_log_p=rest.astype(np.float32))
