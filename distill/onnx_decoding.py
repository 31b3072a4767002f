"""Run an exported variant: batched text, teacher-forced logits and cached logits from the same graph.

`OnnxDecoder` drives onnxruntime itself. onnxruntime-genai takes 32 rows of one length, and finds padding by token id:
a prompt that contains the pad token (a ChatML prompt whose pad is `<|im_end|>`) is attended wrongly in its batches.
Here every prompt is prefilled alone, straight into its row of one shared key/value cache, and rows of any length then
decode together; a row that ends makes room for the next prompt at once. Nothing is padded, so a row's text does not
depend on its neighbours beyond the rounding of a batched product.
`GenaiDecoder` is onnxruntime-genai as a user of the artifact would call it: one prompt, greedy.
Neither torch nor transformers is needed; prompts and answers are token ids.
"""

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.artifact import GENAI_CONFIG, locate, refuse_unsafe
from distill.errors import ArtifactError, EngineError, MissingExtraError
from distill.untrusted import read_runtime_config, refuse_unsafe_graph

Logits = NDArray[np.float32]

PREFILL_CHUNK = 256
"""Prompt tokens run at once: their logits over the whole vocabulary are what costs memory."""
NUCLEUS_GUESS = 256
"""Most likely tokens sorted first when sampling with `top_p`; all are sorted only where these do not suffice."""


@dataclass(frozen=True)
class Shape:
    """What the loops must know of a variant, from its genai_config.json."""

    layers: int
    heads: int
    head_size: int
    vocabulary: int
    context: int
    end_ids: tuple[int, ...]

    @property
    def bytes_a_token(self) -> int:
        """Key/value cache of one token in fp32."""
        return 2 * 4 * self.layers * self.heads * self.head_size


def read_shape(folder: Path) -> Shape:
    """The shape of an artifact's model.

    Raises EngineError if its genai_config.json is absent or not usable, ArtifactError if it is not safe to follow.
    """
    path = folder / GENAI_CONFIG
    try:
        model = read_runtime_config(path)["model"]
        decoder, ends = model["decoder"], model["eos_token_id"]
        return Shape(
            layers=int(decoder["num_hidden_layers"]),
            heads=int(decoder["num_key_value_heads"]),
            head_size=int(decoder["head_size"]),
            vocabulary=int(model["vocab_size"]),
            context=int(model["context_length"]),
            end_ids=tuple(ends) if isinstance(ends, list) else (int(ends),),
        )
    except ArtifactError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{path}: cannot be used ({type(error).__name__}: {error}); give an artifact's folder"
        ) from error


class Cache:
    """Keys and values of all layers: per layer and kind one array [rows, heads, capacity, head_size].

    Pages that no token reached are never touched, so memory follows the texts, not the capacity.
    """

    def __init__(self, shape: Shape, rows: int, capacity: int, dtype: type[np.floating[Any]] = np.float32) -> None:
        size = (rows, shape.heads, capacity, shape.head_size)
        names = [f"{layer}.{kind}" for layer in range(shape.layers) for kind in ("key", "value")]
        self.arrays: dict[str, NDArray[np.floating[Any]]] = {name: np.empty(size, dtype) for name in names}

    def rows(self, first: int, last: int) -> dict[str, NDArray[np.floating[Any]]]:
        """Views of rows `first` to `last` (exclusive); what runs on them writes into the cache."""
        return {name: array[first:last] for name, array in self.arrays.items()}

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row over another."""
        for array in self.arrays.values():
            array[target, :, :length] = array[source, :, :length]


@dataclass
class Row:
    """One text being written."""

    index: int
    """Place of its prompt in the caller's list."""
    prompt: Sequence[int]
    limit: int
    """New tokens it may have at most."""
    rng: np.random.Generator
    cached: int = 0
    """Tokens whose keys and values are in the cache: all but the last one chosen."""
    tokens: list[int] = field(default_factory=list)
    """New tokens so far."""

    def ended(self, end_ids: frozenset[int]) -> bool:
        """Whether the last token ends the text, or no more may follow."""
        return self.tokens[-1] in end_ids or len(self.tokens) >= self.limit


class OnnxDecoder:
    """A graph of an artifact, loaded into onnxruntime with `threads` CPU threads.

    `path` and `variant` are those of `distill.artifact.locate`.
    `max_batch` rows decode together, fewer if their cache at full length would exceed `cache_gb`. Raises
    MissingExtraError without onnxruntime, EngineError if the graph cannot be loaded, ArtifactError if it or its
    settings lead out of the folder.
    """

    def __init__(
        self, path: Path, threads: int, max_batch: int = 64, cache_gb: float = 4.0, variant: str | None = None
    ) -> None:
        self.graph = locate(path, variant)
        self.shape = read_shape(self.graph.root)
        self.max_batch = max_batch
        self.cache_bytes = int(cache_gb * 2**30)
        self._runtime = _import("onnxruntime")
        self._session = self._load(threads)
        halves = any(value.type == "tensor(float16)" for value in self._session.get_inputs())
        self.dtype: type[np.floating[Any]] = np.float16 if halves else np.float32
        """Of keys, values and logits inside the graph."""
        self.providers: list[str] = list(self._session.get_providers())
        """Execution providers that run it."""

    def _load(self, threads: int) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors only: warnings are about the optimiser, not about results
        path = self.graph.path
        refuse_unsafe_graph(self.graph.root, self.graph.file)
        try:
            return self._runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise EngineError(f"{path}: onnxruntime cannot load it: {_first_line(error)}") from error

    # --- text

    def generate(
        self,
        prompts_ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        eos_ids: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continue every prompt; the new token ids of each, in the order of the prompts.

        A text ends with the end token (which is kept), after `max_new_tokens`, or at the model's context. Arguments
        as in `completions`.
        """
        texts: list[list[int]] = [[] for _ in prompts_ids]
        for index, tokens in self.completions(prompts_ids, max_new_tokens, temperature, top_p, seed, eos_ids):
            texts[index] = tokens
        return texts

    def completions(
        self,
        prompts_ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        eos_ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """The same texts as they end: pairs of a prompt's place in the list and its new token ids.

        `temperature` 0 is greedy. Each prompt draws from its own random stream, of (`seed`, place) or of its own
        seed where one is given for each, so that neighbours cannot change a sample. `eos_ids` default to the
        artifact's. Raises ValueError for an empty prompt or one that fills the context.
        """
        end_ids = frozenset(self.shape.end_ids if eos_ids is None else eos_ids)
        self._check(prompts_ids, max_new_tokens)
        waiting = deque(self._row(place, ids, max_new_tokens, seed) for place, ids in enumerate(prompts_ids))
        capacity = max((len(row.prompt) + row.limit for row in waiting), default=0)
        places = self._places(len(waiting), capacity)
        cache = Cache(self.shape, places, capacity, self.dtype)
        rows: list[Row] = []
        while waiting or rows:
            while waiting and len(rows) < places:
                rows.append(waiting.popleft())
                self._begin(rows[-1], cache.rows(len(rows) - 1, len(rows)), temperature, top_p)
                yield from _take_ended(rows, cache, end_ids)
            if rows:
                self._advance(rows, cache, temperature, top_p)
                yield from _take_ended(rows, cache, end_ids)

    def _check(self, prompts_ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; at least 1 is needed")
        for place, ids in enumerate(prompts_ids):
            if not 0 < len(ids) < self.shape.context:
                raise ValueError(
                    f"prompt {place} has {len(ids)} tokens; between 1 and {self.shape.context - 1} fit the context"
                )

    def _row(self, place: int, ids: Sequence[int], max_new_tokens: int, seed: int | Sequence[int]) -> Row:
        stream = [seed, place] if isinstance(seed, int) else [seed[place]]
        limit = min(max_new_tokens, self.shape.context - len(ids))
        return Row(place, ids, limit, np.random.default_rng(stream))

    def _places(self, prompts: int, capacity: int) -> int:
        affordable = self.cache_bytes // max(1, capacity * self.shape.bytes_a_token)
        return max(1, min(prompts, self.max_batch, affordable))

    def _begin(self, row: Row, views: dict[str, NDArray[np.floating[Any]]], temperature: float, top_p: float) -> None:
        """Prefill a prompt into its row of the cache and choose its first token."""
        while row.cached < len(row.prompt):
            ids = row.prompt[row.cached : row.cached + PREFILL_CHUNK]
            logits_1TV = self._forward(np.array([ids]), np.array([row.cached]), views)
            row.cached += len(ids)
        row.tokens.append(choose(logits_1TV[0, -1], temperature, top_p, row.rng))

    def _advance(self, rows: list[Row], cache: Cache, temperature: float, top_p: float) -> None:
        """One step for all rows: feed each its last token, choose the next."""
        ids_B1 = np.array([[row.tokens[-1]] for row in rows])
        logits_B1V = self._forward(ids_B1, np.array([row.cached for row in rows]), cache.rows(0, len(rows)))
        for row, logits_V in zip(rows, logits_B1V[:, 0], strict=True):
            row.cached += 1
            row.tokens.append(choose(logits_V, temperature, top_p, row.rng))

    # --- logits

    def logits(self, ids: Sequence[int]) -> Logits:
        """Logits after each token of one document; float32 [len(ids), vocabulary]. Raises ValueError as `generate`."""
        return self.cached_decode_logits(ids, len(ids))

    def cached_decode_logits(self, ids: Sequence[int], n_prefill: int) -> Logits:
        """The same logits, with all tokens after the first `n_prefill` fed one by one through the cache."""
        if not 0 < n_prefill <= len(ids) <= self.shape.context:
            raise ValueError(
                f"{len(ids)} tokens with a prefill of {n_prefill}: both must be at least 1, the prefill no longer than"
                f" the text, the text no longer than the context of {self.shape.context}"
            )
        views = Cache(self.shape, 1, len(ids), self.dtype).rows(0, 1)
        out_TV = np.empty((len(ids), self.shape.vocabulary), np.float32)
        starts = [*range(0, n_prefill, PREFILL_CHUNK), *range(n_prefill, len(ids))]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            out_TV[start:end] = self._forward(np.array([ids[start:end]]), np.array([start]), views)[0]
        return out_TV

    def _forward(
        self, ids_BT: NDArray[Any], cached_B: NDArray[Any], views: dict[str, NDArray[np.floating[Any]]]
    ) -> Logits:
        """Run T new tokens of each row behind its `cached_B` tokens; logits [B, T, vocabulary].

        Rows may have different lengths only when T is 1: the kernel reads a row's length from its mask and takes the
        new tokens to be its last. Keys and values are written in place.
        """
        batch, count = ids_BT.shape
        lengths_B = cached_B + count
        mask_BS = (np.arange(lengths_B.max())[None] < lengths_B[:, None]).astype(np.int64)
        out_BTV = np.empty((batch, count, self.shape.vocabulary), self.dtype)
        binding = self._session.io_binding()
        wrap = self._runtime.OrtValue.ortvalue_from_numpy
        binding.bind_ortvalue_input("input_ids", wrap(ids_BT.astype(np.int64)))
        binding.bind_ortvalue_input("attention_mask", wrap(mask_BS))
        for name, array in views.items():
            value = wrap(array)
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_ortvalue_output("logits", wrap(out_BTV))
        self._session.run_with_iobinding(binding)
        if not np.isfinite(out_BTV[:, -1].max()):
            raise EngineError(
                f"{self.graph.path}: the model's logits are not finite; its weights are damaged or overflow"
            )
        return out_BTV


def _take_ended(rows: list[Row], cache: Cache, end_ids: frozenset[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield and remove the rows that ended, keeping the others packed at the front of the cache."""
    for place in range(len(rows) - 1, -1, -1):
        row = rows[place]
        if row.ended(end_ids):
            last = rows.pop()
            if last is not row:
                cache.move(len(rows), place, last.cached)
                rows[place] = last
            yield row.index, row.tokens


def choose(logits_V: Logits, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """The next token: the most likely at temperature 0, else drawn from softmax(logits / temperature).

    With `top_p` below 1 only the most likely tokens whose probabilities first reach `top_p` together can be drawn
    (Holtzman et al. 2020, nucleus sampling). Ties go to the lower id.
    """
    if temperature <= 0:
        return int(logits_V.argmax())
    scaled_V = logits_V.astype(np.float64) / temperature
    weights_V = np.exp(scaled_V - scaled_V.max())
    weights_V /= weights_V.sum()
    tokens = np.arange(weights_V.size) if top_p >= 1 else nucleus(weights_V, top_p)
    cumulative = weights_V[tokens].cumsum()
    drawn = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return int(tokens[min(drawn, tokens.size - 1)])


def nucleus(probabilities_V: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Ids of the fewest tokens, most likely first, whose probabilities reach `top_p` together (at least one)."""
    guess = min(NUCLEUS_GUESS, probabilities_V.size)
    candidates = np.sort(np.argpartition(-probabilities_V, guess - 1)[:guess])
    if probabilities_V[candidates].sum() < top_p:
        candidates = np.arange(probabilities_V.size)
    order = candidates[np.argsort(-probabilities_V[candidates], kind="stable")]
    reached = np.searchsorted(probabilities_V[order].cumsum(), top_p)
    return order[: int(reached) + 1]


class GenaiDecoder:
    """A graph of an artifact, loaded by onnxruntime-genai unmodified; threads and the variant are overlaid in memory.

    Raises MissingExtraError without onnxruntime-genai, EngineError if the graph cannot be loaded, ArtifactError if
    files of the folder lead out of it or are not safe to parse.
    """

    def __init__(self, path: Path, threads: int, variant: str | None = None) -> None:
        graph = locate(path, variant)
        refuse_unsafe(graph)
        self._genai = _import("onnxruntime_genai")
        decoder = {"filename": graph.file, "session_options": {"intra_op_num_threads": threads}}
        try:
            config = self._genai.Config(str(graph.root))
            config.overlay(json.dumps({"model": {"decoder": decoder}}))
            self._model = self._genai.Model(config)
        except RuntimeError as error:
            raise EngineError(f"{graph.path}: onnxruntime-genai cannot load it: {_first_line(error)}") from error

    def greedy(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """The new token ids after one prompt, greedily, with the artifact's own end tokens (kept if reached)."""
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=len(prompt_ids) + max_new_tokens)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(np.array(prompt_ids, np.int32))
        tokens: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return tokens


def _import(name: str) -> Any:
    # Telemetry is on by default in these wheels and is decided at import.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return __import__(name)
    except ImportError as error:
        raise MissingExtraError(name.replace("_", "-"), "export") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
