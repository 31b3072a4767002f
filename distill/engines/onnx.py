"""Generation with an exported variant: the artifact answers as its users will run it.

The tokenizer and template are the artifact's own; decoding is `distill.onnx_decoding`.
"""

import time
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from pathlib import Path

from distill.artifact import locate, refuse_unsafe
from distill.config import FormatConfig, TeacherConfig
from distill.engines import Completion, Request, in_batches
from distill.engines.transformers import completion_of
from distill.format import encode_prompt, render_prompt, with_own_system
from distill.models import ModelSource, load_tokenizer
from distill.onnx_decoding import OnnxDecoder, read_shape
from distill.runs import DigestCache, RunOptions, library_versions
from distill.untrusted import refuse_unsafe_configs


def roots(teacher: TeacherConfig, cache: DigestCache) -> dict[str, str]:
    """The content of the artifact's folder, and the graph where another than its default is named."""
    path = Path(teacher.model)
    graph = locate(path)
    return {"model": cache.of(graph.root)} | ({"graph": graph.file} if path != graph.root else {})


def preflight(teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> None:
    """Refuse what is neither an artifact's folder nor a graph in one, and what is not safe to load."""
    graph = locate(Path(teacher.model))
    refuse_unsafe(graph)
    read_shape(graph.root)


class OnnxEngine:
    """Batched generation with a graph of an artifact."""

    name = "onnx"

    def __init__(
        self, path: Path, format: FormatConfig, batch_size: int, options: RunOptions, variant: str | None = None
    ) -> None:
        self.version = library_versions(["onnxruntime"]).get("onnxruntime", "")
        self.format = format
        self.batch_size: int | None = batch_size
        self.decoder = OnnxDecoder(path, options.cpu_threads, variant=variant)
        root = self.decoder.graph.root
        refuse_unsafe_configs(root)
        self.tokenizer = load_tokenizer(ModelSource(str(root), root))

    @classmethod
    def from_teacher(cls, teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> "OnnxEngine":
        """An exported model as the teacher."""
        return cls(Path(teacher.model), format, teacher.batch_size, options)

    async def generate(self, requests: AsyncIterable[Request]) -> AsyncIterator[Completion]:
        """Answer requests batch by batch, in order."""
        async for batch in in_batches(requests, self.batch_size or 1):
            for completion in self._batch(batch):
                yield completion

    async def close(self) -> None:
        """Free the session."""
        del self.decoder

    def _batch(self, requests: Sequence[Request]) -> list[Completion]:
        started = time.perf_counter()
        texts = [
            render_prompt(self.tokenizer, with_own_system(request.prompt.messages, request.system), self.format)
            for request in requests
        ]
        ids = [encode_prompt(self.tokenizer, text) for text in texts]
        sampling = requests[0].sampling
        generated = self.decoder.generate(
            ids, sampling.max_new_tokens, sampling.temperature, sampling.top_p, seed=[r.seed for r in requests]
        )
        latency = (time.perf_counter() - started) / len(requests)
        return [
            completion_of(
                self.tokenizer, self.format, request, text, len(prompt), new, latency, self.decoder.shape.end_ids
            )
            for request, text, prompt, new in zip(requests, texts, ids, generated)
        ]
