"""Run an exported variant: batched text, teacher-forced logits and cached logits from the same graph.

`OnnxDecoder` drives onnxruntime itself. onnxruntime-genai takes 32 rows of one length, and finds padding by token id:
a prompt that contains the pad token (a ChatML prompt whose pad is `<|im_end|>`) is attended wrongly in its batches.
Here every prompt is prefilled alone, straight into its row of one shared key/value cache, and rows of any length then
decode together; a row that ends makes room for the next prompt at once (`distill.onnx_batching`).
`GenaiDecoder` is onnxruntime-genai as a user of the artifact would call it: one prompt, greedy.
Neither torch nor transformers is needed; prompts and answers are token ids.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.artifact import locate, refuse_unsafe, runtime_settings
from distill.errors import EngineError, MissingExtraError
from distill.onnx_batching import PREFILL_CHUNK, Batch, Cache, Logits, Row, Views
from distill.untrusted import refuse_unsafe_graph

EVERY_POSITION = "every_position"
"""A constant of our graphs, int64 [1]: 0 as they ship, logits after the last token only; 1 gives them after each."""


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
    """The shape of an artifact's model; raises as `distill.artifact.runtime_settings`."""
    with runtime_settings(folder) as settings:
        model = settings["model"]
        decoder, ends = model["decoder"], model["eos_token_id"]
        return Shape(
            layers=int(decoder["num_hidden_layers"]),
            heads=int(decoder["num_key_value_heads"]),
            head_size=int(decoder["head_size"]),
            vocabulary=int(model["vocab_size"]),
            context=int(model["context_length"]),
            end_ids=tuple(ends) if isinstance(ends, list) else (int(ends),),
        )


class OnnxDecoder:
    """A graph of an artifact, loaded into onnxruntime with `threads` CPU threads.

    `path` and `variant` are those of `distill.artifact.locate`.
    `max_batch` rows decode together, fewer if their cache at full length would exceed `cache_gb`. With
    `every_position` the graph computes logits after each token, which `logits` needs and text does not. Raises
    MissingExtraError without onnxruntime, EngineError if the graph cannot be loaded, ArtifactError if it or its
    settings lead out of the folder.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        max_batch: int = 64,
        cache_gb: float = 4.0,
        variant: str | None = None,
        every_position: bool = False,
    ) -> None:
        self.graph = locate(path, variant)
        self.shape = read_shape(self.graph.root)
        self.max_batch = max_batch
        self.cache_bytes = int(cache_gb * 2**30)
        self._runtime = _import("onnxruntime")
        self._session = self._load(threads, every_position)
        declared = next(value.shape for value in self._session.get_outputs() if value.name == "logits")
        self._last_only = declared[1] == 1 and not every_position
        self._unbound_logits = declared[1] == 1 and every_position  # logits come out in a shape that cannot be bound
        halves = any(value.type == "tensor(float16)" for value in self._session.get_inputs())
        self.dtype: type[np.floating[Any]] = np.float16 if halves else np.float32
        """Of keys, values and logits inside the graph."""
        self.providers: list[str] = list(self._session.get_providers())
        """Execution providers that run it."""

    def _load(self, threads: int, every_position: bool) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = threads
        if every_position:
            self._switch = self._runtime.OrtValue.ortvalue_from_numpy(np.array([1], np.int64))
            options.add_initializer(EVERY_POSITION, self._switch)  # in place of the file's; nobody else owns it
            options.enable_cpu_mem_arena = False  # such logits are large, and it would keep twice as much
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
        rows = [
            Row(ids, self._limit(ids, max_new_tokens), _stream(seed, place), end_ids, temperature, top_p, place)
            for place, ids in enumerate(prompts_ids)
        ]
        if not rows:
            return
        capacity = max(row.reserved for row in rows)
        places = self._places(len(rows), capacity)
        batch = Batch(self._forward, Cache(self.shape, places, capacity, self.dtype), places)
        batch.waiting.extend(rows)
        while batch.busy:
            for row in batch.step():
                if row.ended:
                    yield row.index, row.tokens

    def open_batch(self, places: int, capacity: int, kept: int) -> Batch:
        """An empty batch of up to `places` rows for whoever runs it step by step; its cache takes `cache_gb` at most.

        The longest text may have `capacity` tokens, and the starts of `kept` ended ones are kept for others to share.
        """
        cache = Cache(self.shape, places + kept, capacity, self.dtype)
        return Batch(self._forward, cache, places, max(self.cache_bytes // cache.bytes_a_token, capacity))

    def _check(self, prompts_ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; at least 1 is needed")
        for place, ids in enumerate(prompts_ids):
            if not 0 < len(ids) < self.shape.context:
                raise ValueError(
                    f"prompt {place} has {len(ids)} tokens; between 1 and {self.shape.context - 1} fit the context"
                )

    def _limit(self, ids: Sequence[int], max_new_tokens: int) -> int:
        return min(max_new_tokens, self.shape.context - len(ids))

    def _places(self, prompts: int, capacity: int) -> int:
        affordable = self.cache_bytes // max(1, capacity * self.shape.bytes_a_token)
        return max(1, min(prompts, self.max_batch, affordable))

    # --- logits

    def logits(self, ids: Sequence[int]) -> Logits:
        """Logits after each token of one document; float32 [len(ids), vocabulary].

        Raises ValueError as `generate`, and where the decoder was not loaded with `every_position`; EngineError for a
        graph that gives the last ones all the same.
        """
        if self._last_only:
            raise ValueError("logits after each token take a decoder that was loaded with every_position=True")
        out_TV, done = np.empty((len(ids), self.shape.vocabulary), np.float32), 0
        for piece_TV in self._read(ids, len(ids)):
            if len(piece_TV) != min(PREFILL_CHUNK, len(ids) - done):
                raise EngineError(f"{self.graph.path}: gives logits after the last token alone; export it again")
            out_TV[done : done + len(piece_TV)] = piece_TV
            done += len(piece_TV)
        return out_TV

    def cached_decode_logits(self, ids: Sequence[int], n_prefill: int) -> Logits:
        """Logits after the first `n_prefill` tokens and after each that follows, fed one by one through the cache.

        float32 [len(ids) - n_prefill + 1, vocabulary]. Raises ValueError as `generate`.
        """
        pieces = list(self._read(ids, n_prefill))
        prefilled = -(-n_prefill // PREFILL_CHUNK)
        return np.concatenate([pieces[prefilled - 1][-1:], *pieces[prefilled:]])

    def _read(self, ids: Sequence[int], n_prefill: int) -> Iterator[Logits]:
        """Logits of the prefill's pieces, then of each token after it."""
        if not 0 < n_prefill <= len(ids) <= self.shape.context:
            raise ValueError(
                f"{len(ids)} tokens with a prefill of {n_prefill}: both must be at least 1, the prefill no longer than"
                f" the text, the text no longer than the context of {self.shape.context}"
            )
        views = Cache(self.shape, 1, len(ids), self.dtype).rows(0, 1)
        starts = [*range(0, n_prefill, PREFILL_CHUNK), *range(n_prefill, len(ids))]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield self._forward(np.array([ids[start:end]]), np.array([start]), views)[0]

    def _forward(self, ids_BT: NDArray[Any], cached_B: NDArray[Any], views: Views) -> Logits:
        """Run T new tokens of each row behind its `cached_B` tokens; logits [B, T or 1, vocabulary].

        Rows may have different lengths only when T is 1: the kernel reads a row's length from its mask and takes the
        new tokens to be its last. Keys and values are written in place.
        """
        batch, count = ids_BT.shape
        lengths_B = cached_B + count
        mask_BS = (np.arange(lengths_B.max())[None] < lengths_B[:, None]).astype(np.int64)
        binding = self._session.io_binding()
        wrap = self._runtime.OrtValue.ortvalue_from_numpy
        binding.bind_ortvalue_input("input_ids", wrap(ids_BT.astype(np.int64)))
        binding.bind_ortvalue_input("attention_mask", wrap(mask_BS))
        for name, array in views.items():
            value = wrap(array)
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        if self._unbound_logits:
            binding.bind_output("logits")
        else:
            out_BTV = np.empty((batch, 1 if self._last_only else count, self.shape.vocabulary), self.dtype)
            binding.bind_ortvalue_output("logits", wrap(out_BTV))
        self._session.run_with_iobinding(binding)
        if self._unbound_logits:
            out_BTV = binding.get_outputs()[-1].numpy()
        if not np.isfinite(out_BTV[:, -1].max()):
            raise EngineError(
                f"{self.graph.path}: the model's logits are not finite; its weights are damaged or overflow"
            )
        return out_BTV


def _stream(seed: int | Sequence[int], place: int) -> np.random.Generator:
    """The random stream of a prompt."""
    return np.random.default_rng([seed, place] if isinstance(seed, int) else [seed[place]])


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
        generator = self._generator(len(prompt_ids) + max_new_tokens)
        generator.append_tokens(np.array(prompt_ids, np.int32))
        tokens: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))  # its sequence lacks the end token
        return tokens

    def rendered(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[int]]:
        """What the artifact's own template and tokenizer make of a question: text and token ids."""
        tokenizer = self._genai.Tokenizer(self._model)
        prompt = tokenizer.apply_chat_template(json.dumps([dict(one) for one in messages]), add_generation_prompt=True)
        return prompt, [int(token) for token in tokenizer.encode(prompt)]

    def preferred(self, ids: Sequence[int], places: range) -> list[int]:
        """The likeliest token after each of some places in a text, which are fed one by one; [len(places)]."""
        generator = self._generator(len(ids) + 1)
        found: list[int] = []
        for start, place in zip((0, *(one + 1 for one in places)), places):
            generator.append_tokens(np.array(ids[start : place + 1], np.int32))
            found.append(int(generator.get_output("logits")[0, -1].argmax()))
        return found

    def _generator(self, max_length: int) -> Any:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=max_length)
        return self._genai.Generator(self._model, params)


def _import(name: str) -> Any:
    # Telemetry is on by default in these wheels and is decided at import.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return __import__(name)
    except ImportError as error:
        raise MissingExtraError(name.replace("_", "-"), "export") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
