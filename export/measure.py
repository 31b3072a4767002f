"""Hold one built variant against the torch student: logits over whole texts, cached steps, greedy text.

Everything runs on the CPU provider; what needs another device is a gate that was not run.
"""

import copy
import gc
import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.artifact import locate
from distill.config import Gates
from distill.models import find_model, load_model, return_freed_memory
from distill.onnx_decoding import OnnxDecoder
from distill.progress import say

from .gates import decode_gates, greedy_gate, parity_gates, provider_gate, structure_gate
from .graph import check_weights
from .manifest import GateEntry
from .parity import GreedyParity, Parity, compare_greedy, compare_logits, greedy_from_logits
from .runtimes import Case
from .texts import Text, Texts, until

DECODED_TEXTS = 4
"""Texts whose last tokens are fed one by one through the cache."""
PLACES = 64
"""Places of an answer that other runtimes are asked about: WebAssembly takes up to a third of a second for each."""
FIRST_LOOK = 512
"""Positions after which a variant that is far off is given up."""
HOPELESS = 2.0
"""Times its limit of KL that a variant loses there, to be given up."""
PROVIDERS = {"fp16": ("cuda", "webgpu"), "q4f16": ("webgpu",)}
"""Where a variant is meant to run besides the CPU."""

Logits = NDArray[np.float32]


class TorchStudent:
    """The torch student's teacher-forced logits in fp32; loaded when they are first asked for.

    A text is read once: its final hidden states are kept, and the head's product with them is made whenever it is
    asked for, since every scheme of every variant is compared with the same texts. `release` gives the rest of the
    model back meanwhile.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._hidden: dict[tuple[int, ...], Any] = {}

    @cached_property
    def model(self) -> Any:
        """The loaded model."""
        return load_model(find_model(str(self.checkpoint)))

    @cached_property
    def _head(self) -> Any:
        """The output head, with weights of its own: those of a model may be one mapped file."""
        return copy.deepcopy(self.model.lm_head)

    def release(self) -> None:
        """Let go of the model until a text comes that was not read before."""
        if "model" in vars(self):
            _ = self._head
            del self.model
        return_freed_memory()

    def logits(self, ids: Sequence[int]) -> Logits:
        """Logits after each of the ids; float32 [len(ids), vocabulary]."""
        import torch

        from distill.products import faster_linears

        with torch.inference_mode():
            if (read := tuple(ids)) not in self._hidden:
                with faster_linears(self.model):
                    found = self.model.get_decoder()(input_ids=torch.tensor([read]), use_cache=False)
                self._hidden[read] = found.last_hidden_state[0]
                return_freed_memory()  # what is kept would otherwise lie between holes of what is not
            with faster_linears(self._head):
                return np.asarray(self._head(self._hidden[read]).numpy())


class Measured(NamedTuple):
    """How a variant compares with the torch student."""

    gates: list[GateEntry]
    hopeless: bool
    """Whether the first texts were so far beyond the limit that the rest was not measured."""


def measure(
    artifact: Path,
    variant: str,
    student: TorchStudent,
    texts: Texts,
    limits: Gates,
    threads: int,
    give_up: bool = False,
) -> Measured:
    """Structure, parity on whole texts and on cached steps, and for fp32 greedy text, as gates.

    Whole texts are read after every token; for steps and text the graph is loaded as it ships.

    With `give_up` a variant that loses `HOPELESS` times its limit on the first texts is measured no further. Raises
    ExportError for weights that are zero or logits that are not finite, EngineError for a graph that does not load.
    """
    graph = locate(artifact, variant)
    found = check_weights(graph.path)
    gc.collect()  # the file is mapped as long as the graph, a knot of cycles, is there
    decoder = OnnxDecoder(artifact, threads, variant=variant, every_position=True)
    gates = [structure_gate(variant, found.matrices, found.layers, decoder.providers)]
    gates += [provider_gate(variant, provider) for provider in PROVIDERS.get(variant, ())]
    if give_up:
        first = compare_texts(decoder, student, list(until(texts.documents, FIRST_LOOK)))
        if first.mean_kl > HOPELESS * limits.of("max_kl", variant):
            return Measured([*gates, *parity_gates(variant, first, limits)], hopeless=True)
    parity = compare_texts(decoder, student, texts.documents)
    gates += parity_gates(variant, parity, limits)
    del decoder
    shipped = OnnxDecoder(artifact, threads, variant=variant)
    gates += decode_gates(variant, compare_steps(shipped, student, texts.documents, limits.decode_steps), limits)
    if variant == "fp32":
        gates.append(greedy_gate(variant, compare_decoding(shipped, student, texts, limits)))
    say(
        f"export: {variant}: mean KL {parity.mean_kl:.2g} nats, top-1 {parity.top1_agreement:.2%} of"
        f" {parity.positions}, perplexity {parity.perplexity_ratio:.4f} of the student's"
    )
    return Measured(gates, hopeless=False)


def compare_texts(candidate: OnnxDecoder | TorchStudent, student: TorchStudent, texts: Sequence[Text]) -> Parity:
    """Compare the logits of texts that are read in one go."""
    return compare_logits(
        (student.logits(text.ids)[text.compared] for text in texts),
        (candidate.logits(text.ids)[text.compared] for text in texts),
        (text.following for text in texts),
    )


def compare_steps(decoder: OnnxDecoder, student: TorchStudent, texts: Sequence[Text], steps: int) -> Parity:
    """Compare the last `steps` compared positions of a few texts, their tokens fed one by one through the cache."""
    chosen = sorted(texts, key=lambda text: -len(text.compared))[:DECODED_TEXTS]
    rows = [range(max(text.compared.start, text.compared.stop - steps), text.compared.stop) for text in chosen]
    return compare_logits(
        (student.logits(text.ids)[row.start : row.stop] for text, row in zip(chosen, rows, strict=True)),
        # the first of them is predicted by the prefill, the others by steps
        (
            decoder.cached_decode_logits(text.ids[: row.stop], row.start + 1)
            for text, row in zip(chosen, rows, strict=True)
        ),
        (text.ids[row.start + 1 : row.stop + 1] for text, row in zip(chosen, rows, strict=True)),
    )


def compare_decoding(decoder: OnnxDecoder, student: TorchStudent, texts: Texts, limits: Gates) -> GreedyParity:
    """Greedy text of the variant through its cache, against what torch would have written along it.

    It follows prompts, and where there are fewer than are asked for also the first halves of answers.
    """
    halves = (text.ids[: (text.compared.start + text.compared.stop) // 2 + 1] for text in texts.documents)
    chosen = list(itertools.islice(itertools.chain(texts.prompts, halves), limits.greedy_prompts))
    written = decoder.generate(chosen, limits.greedy_tokens)
    expected = [
        greedy_from_logits(student.logits([*prompt, *tokens]), len(prompt))
        for prompt, tokens in zip(chosen, written, strict=True)
    ]
    return compare_greedy([tokens for tokens, _ in expected], [margins for _, margins in expected], written)


# --- other runtimes ---------------------------------------------------------------------------------------------------


def cases(student: TorchStudent, texts: Texts, count: int) -> list[Case]:
    """Questions for other runtimes, with torch's answers: held-out prompts and how texts go on that begin with them."""
    asked = {tuple(one.ids): one for one in texts.asked}
    found: list[Case] = []
    for text in texts.documents:
        prompt = asked.get(tuple(text.ids[: text.compared.start + 1]))
        if prompt is not None and len(found) < count:
            compared = text.compared[:PLACES]
            top1 = student.logits(text.ids)[compared].argmax(-1).tolist()
            document = text.ids[: compared.stop]
            found.append(Case(prompt.messages, prompt.rendered, prompt.ids, document, compared, top1))
    return found
