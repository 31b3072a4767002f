"""Cross-entropy in chunks: the same number and the same gradients as dense PyTorch, in less memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distill.students.data import Documents
from distill.students.loop import pack_loss
from distill.students.losses import cross_entropy
from distill.students.packing import Pack, lay_out, pack_step

ROWS, HIDDEN, VOCABULARY = 29, 6, 17
CHUNKS = [1, 7, ROWS]


def inputs(dtype: Any = torch.float64, scale: float = 3.0) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def gradients(loss: Any, *leaves: Any) -> list[Any]:
    return list(torch.autograd.grad(loss, leaves))


def largest(ours: list[Any], theirs: list[Any]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs, strict=True))


# --- the function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
def test_value_and_both_gradients_are_those_of_dense_cross_entropy(chunk: int) -> None:
    hidden, weight, targets = inputs()
    ours = cross_entropy(hidden, weight, targets, chunk)
    dense = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert ours.dtype == torch.float64
    assert abs(float((ours - dense).detach())) < 1e-10
    # the same through a scale, as a mean or a second loss beside it would apply one
    expected = gradients(dense * -0.37, hidden, weight)
    assert largest(gradients(ours * -0.37, hidden, weight), expected) < 1e-12


@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_are_those_of_finite_differences(chunk: int) -> None:
    hidden, weight, targets = inputs()
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy(h, w, targets, chunk), (hidden, weight))


def test_two_tokens_by_hand() -> None:
    # logits (ln 3, 0): p = 3/4, 1/4. Targets 0 and 1: loss = ln(4/3) + ln 4; d loss / d logits = p - onehot
    hidden = torch.tensor([[np.log(3.0)], [np.log(3.0)]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64, requires_grad=True)
    loss = cross_entropy(hidden, weight, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(np.log(4 / 3) + np.log(4), abs=1e-15)
    by_hidden, by_weight = gradients(loss, hidden, weight)
    assert by_hidden.flatten().tolist() == pytest.approx([-0.25, 0.75])
    # rows of the weight: ln 3 * (sum over tokens of p - onehot) = ln 3 * (+0.5, -0.5)
    assert by_weight.flatten().tolist() == pytest.approx([0.5 * np.log(3), -0.5 * np.log(3)])


def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    hidden, weight, targets = inputs(torch.float32, scale=1e4)
    ours = cross_entropy(hidden, weight, targets, 7)
    dense = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    assert torch.isfinite(ours) and ours.item() == pytest.approx(dense.item(), rel=1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(ours, hidden, weight))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_bf16_inputs_are_reduced_in_fp32(chunk: int) -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    ours = cross_entropy(hidden, weight, targets, chunk)
    # the logits of a bf16 product, taken as exact from there on
    logits = (hidden @ weight.T).double()
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-6)
    by_hidden, by_weight = gradients(ours, hidden, weight)
    assert by_hidden.dtype == by_weight.dtype == torch.bfloat16
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    dense = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
    assert largest([by_hidden, by_weight], gradients(dense, *exact)) < 0.1, "bf16 keeps three digits"


def test_no_rows_is_no_loss() -> None:
    hidden, weight, targets = inputs()
    loss = cross_entropy(hidden[:0], weight, targets[:0])
    assert loss.item() == 0 and not gradients(loss, weight)[0].any()


class Saved:
    """The largest number of elements that autograd keeps between forward and backward."""

    def __init__(self) -> None:
        self.largest = 0

    def __call__(self, tensor: Any) -> Any:
        self.largest = max(self.largest, tensor.numel())
        return tensor


def test_nothing_as_large_as_rows_times_vocabulary_is_kept_for_the_backward_pass() -> None:
    hidden, weight, targets = inputs()
    ours, theirs = Saved(), Saved()
    with torch.autograd.graph.saved_tensors_hooks(ours, lambda tensor: tensor):
        cross_entropy(hidden, weight, targets, 7)
    with torch.autograd.graph.saved_tensors_hooks(theirs, lambda tensor: tensor):
        F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert ours.largest == max(ROWS, VOCABULARY) * HIDDEN < ROWS * VOCABULARY
    assert theirs.largest >= ROWS * VOCABULARY, "the check sees what dense cross-entropy keeps"


# --- on a model -----------------------------------------------------------------------------------------------------


def dense_loss(model: Any, documents: Documents) -> Any:
    """The summed loss of documents one by one with transformers' own head, attention and labels of -100."""
    total = 0
    for ids, prompt in zip(documents.ids, documents.prompt_tokens, strict=True):
        tokens = torch.from_numpy(ids).long()[None]
        labels = tokens.clone()
        labels[:, :prompt] = -100
        logits = model(tokens, use_cache=False).logits[0]
        total = total + F.cross_entropy(logits[:-1], labels[0, 1:], ignore_index=-100, reduction="sum")
    return total


def packed_loss(model: Any, documents: Documents, budget: int = 10_000) -> tuple[Any, list[Pack]]:
    lengths = documents.lengths
    packs = [
        lay_out(documents.ids, documents.prompt_tokens, pack)
        for pack in pack_step(range(len(lengths)), lengths, budget)
    ]
    return sum(pack_loss(model, pack) for pack in packs), packs


def all_gradients(model: Any, loss: Any) -> dict[str, Any]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_loss_of_a_pack_is_that_of_its_documents_alone_with_masked_labels(
    live: Callable[..., Any], make_documents: Callable[..., Documents], family: str, tied: bool
) -> None:
    documents = make_documents([9, 14, 5, 6, 20], [3, 1, 4, 2, 11])
    ours = live(family, "float64", tie_word_embeddings=tied)
    theirs = live(family, "float64", attention="sdpa", tie_word_embeddings=tied)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied
    ours.get_input_embeddings().padding_idx = theirs.get_input_embeddings().padding_idx = None
    loss, _ = packed_loss(ours, documents)
    dense = dense_loss(theirs, documents)
    assert loss.item() == pytest.approx(dense.item(), abs=1e-9)
    mine, reference = all_gradients(ours, loss), all_gradients(theirs, dense)
    assert mine.keys() == reference.keys() and ("lm_head.weight" in mine) is not tied
    assert largest(list(mine.values()), list(reference.values())) < 1e-9


def test_masks_go_by_position_where_the_pad_token_is_the_end_token(
    live: Callable[..., Any], make_documents: Callable[..., Documents]
) -> None:
    end = 2
    documents = make_documents([8, 11], [4, 5])
    for ids, prompt in zip(documents.ids, documents.prompt_tokens, strict=True):
        ids[1] = ids[prompt + 1] = ids[-1] = end  # in the prompt, inside the completion, and at the end
    model = live("llama", "float64")
    loss, [pack] = packed_loss(model, documents)
    assert pack.targets_N.tolist().count(end) == 4, "both ends and both inside; none of the prompts'"
    assert loss.item() == pytest.approx(dense_loss(live("llama", "float64", attention="sdpa"), documents).item())

    # what a collator does that masks by id where pad == eos: the end is never learnt, and the loss is another one
    by_id = Documents(documents.ids, documents.prompt_tokens, {})
    _, [pack] = packed_loss(model, by_id)
    kept = pack.targets_N != end
    wrong = pack_loss(model, pack._replace(rows_N=pack.rows_N[kept], targets_N=pack.targets_N[kept]))
    assert abs(wrong.item() - loss.item()) > 1


def test_cutting_a_step_into_eight_four_or_one_micro_batches_changes_no_gradient(
    live: Callable[..., Any], make_documents: Callable[..., Documents]
) -> None:
    documents = make_documents([9, 3, 5, 6, 14, 2, 8, 7], [3, 1, 4, 2, 11, 1, 4, 6])
    model = live("qwen2", "float64")
    cut = []
    for budget in (1, 17, 54):
        loss, packs = packed_loss(model, documents, budget)
        cut.append((len(packs), loss.item(), list(all_gradients(model, loss).values())))
    assert [packs for packs, _, _ in cut] == [8, 4, 1]
    (_, whole, expected) = cut[-1]
    for _, loss, found in cut[:-1]:
        assert loss == pytest.approx(whole, abs=1e-9)
        assert largest(found, expected) < 1e-9


def test_averaging_the_means_of_micro_batches_would_change_the_gradient(
    live: Callable[..., Any], make_documents: Callable[..., Documents]
) -> None:
    documents = make_documents([9, 3, 5, 6, 14, 2, 8, 7], [3, 1, 4, 2, 11, 1, 4, 6])
    model = live("qwen2", "float64")
    _, packs = packed_loss(model, documents, 17)
    by_token = sum(pack_loss(model, pack) for pack in packs) / sum(len(pack.rows_N) for pack in packs)
    by_batch = sum(pack_loss(model, pack) / len(pack.rows_N) for pack in packs) / len(packs)
    right, wrong = (list(all_gradients(model, loss).values()) for loss in (by_token, by_batch))
    assert largest(right, wrong) > 1e-3
