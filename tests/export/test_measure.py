"""A variant is compared where the student was trained to speak, on whole texts and step by step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.config import Gates
from distill.export.measure import TorchStudent, cases, compare_steps, measure
from distill.export.texts import Asked, Texts, text_of
from distill.onnx_decoding import OnnxDecoder

PROMPT, ANSWER = [5, 300, 17, 44, 257], [9, 81, 33, 400, 12, 2]
TEXTS = Texts([text_of(PROMPT, ANSWER)], [Asked([{"role": "user", "content": "?"}], "?", PROMPT)])
LOOSE = Gates(max_kl={"int4": 99}, min_top1={"int4": 0}, max_perplexity={"int4": 99})


@pytest.fixture(scope="module")
def torch(student: Callable[..., Path]) -> TorchStudent:
    return TorchStudent(student())


def test_the_torch_student_is_transformers_model_and_reads_a_text_once(student: Callable[..., Path]) -> None:
    import torch

    one, ids = TorchStudent(student()), TEXTS.documents[0].ids
    expected = one.model(input_ids=torch.tensor([ids])).logits[0].detach().numpy()
    reads = []
    one.model.get_decoder().register_forward_hook(lambda *_: reads.append(1))
    for _ in range(2):
        assert one.logits(ids) == pytest.approx(expected, abs=1e-5)
    assert len(reads) == 1 and one.logits([5, 300]).shape == (2, expected.shape[1])
    one.release()
    assert one.logits(ids) == pytest.approx(expected, abs=1e-5) and "model" not in vars(one)
    assert one.logits([7]).shape == (1, expected.shape[1]) and "model" in vars(one)


def test_steps_are_compared_inside_the_answer_alone(exported: Callable[..., Path], torch: TorchStudent) -> None:
    """A prompt's positions were never trained, and nothing is asked after the end token."""
    decoder = OnnxDecoder(exported(variant="int4"), threads=1, every_position=True)
    found = compare_steps(decoder, torch, TEXTS.documents, steps=64)
    assert found.positions == len(ANSWER)
    assert compare_steps(decoder, torch, TEXTS.documents, steps=2).positions == 2
    rows = range(len(PROMPT) - 1, len(PROMPT) + len(ANSWER) - 1)
    expected = np.abs(torch.logits(TEXTS.documents[0].ids)[rows] - decoder.logits(TEXTS.documents[0].ids)[rows]).max()
    assert found.max_logit_difference == pytest.approx(expected, rel=0.05)


def test_a_variant_that_is_far_off_is_given_up_unless_it_must_not_be(
    exported: Callable[..., Path], torch: TorchStudent
) -> None:
    strict = Gates(max_kl={"int4": 1e-9})
    given_up = measure(exported(variant="int4"), "int4", torch, TEXTS, strict, 1, give_up=True)
    whole = measure(exported(variant="int4"), "int4", torch, TEXTS, strict, 1)
    assert given_up.hopeless and not whole.hopeless
    names = [{gate.name for gate in one.gates} for one in (given_up, whole)]
    assert names[1] - names[0] == {"decode_mean_kl", "decode_top1_agreement"}
    assert not measure(exported(variant="int4"), "int4", torch, TEXTS, LOOSE, 1, give_up=True).hopeless


def test_fp32_is_torch_step_by_step_and_writes_its_text(exported: Callable[..., Path], torch: TorchStudent) -> None:
    gates = {gate.name: gate for gate in measure(exported(), "fp32", torch, TEXTS, Gates(), 1).gates}
    assert {gate.status for gate in gates.values()} == {"passed"}
    assert "2 of 2 layers" in gates["structure"].detail
    # one prompt is there, and one begun answer
    assert gates["greedy_tokens"].detail.startswith("2 of 2 identical")
    assert "CPUExecutionProvider" in gates["structure"].detail


def test_what_other_runtimes_are_asked_has_torchs_answers(torch: TorchStudent, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = cases(torch, TEXTS, count=4)
    logits: Any = torch.logits(PROMPT + ANSWER)
    assert case.prompt_ids == PROMPT and case.document == PROMPT + ANSWER[:-1]
    assert list(case.top1) == [int(logits[place].argmax()) for place in case.compared]
    monkeypatch.setattr("distill.export.measure.PLACES", 2)
    (short,) = cases(torch, TEXTS, count=4)
    assert short.compared == case.compared[:2] and list(short.top1) == list(case.top1[:2])
    assert short.document == PROMPT + ANSWER[:1]
