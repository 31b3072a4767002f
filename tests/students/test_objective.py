"""The objective on random two-layer models: packs, batches and micro-batches against documents alone in PyTorch."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distill.attention import PER_DOCUMENT, block_mask, boundaries
from distill.config import LossWeights, SftPhase
from distill.documents import Documents
from distill.models import seeded
from distill.students.fused import lean
from distill.students.objective import PackTensors, StudentObjective, noisy
from distill.students.packing import Pack, lay_out, lay_side_by_side

Live = Callable[..., Any]
MakeDocuments = Callable[..., Documents]
MakePhase = Callable[..., SftPhase]
Layout = Callable[..., Pack]

FAMILIES = ("llama", "qwen2", "qwen3")
TOLERANCE = {PER_DOCUMENT: 1e-10, "sdpa": 1e-10, "eager": 1e-6}
"""Of float64; transformers' eager attention takes its softmax in fp32."""
OF_SUMS = {PER_DOCUMENT: 1e-10, "sdpa": 1e-10, "eager": 22e-6}
"""The same for sums over 22 rows, which training divides by."""
LENGTHS, PROMPTS = [9, 3, 5, 6, 14, 2, 8, 7], [3, 1, 4, 2, 11, 1, 4, 6]
EVERYTHING = {"loss_weights": {"think": 0.25, "answer": 2.0, "eos": 5.0}, "label_smoothing": 0.1, "z_loss": 0.02}


@pytest.fixture
def documents(make_documents: MakeDocuments) -> Documents:
    return make_documents(LENGTHS, PROMPTS)


@pytest.fixture
def student(live: Live, phase: MakePhase) -> Callable[..., StudentObjective]:
    """A function that gives a family's objective in float64 whose pad token learns like any other."""

    def make(family: str = "llama", attention: str = PER_DOCUMENT, given: Any = None, **changes: Any) -> Any:
        model = live(family, "float64", attention=attention, **changes)
        model.get_input_embeddings().padding_idx = None
        return StudentObjective(model, phase(**(given or {}))).train()

    return make


def packs_of(documents: Documents, groups: Sequence[Sequence[int]], phase: SftPhase, layout: Layout) -> list[Any]:
    return [PackTensors.of(layout(documents, group, phase.loss_weights), "cpu") for group in groups]


def loss_and_gradients(objective: StudentObjective, packs: list[PackTensors]) -> tuple[Any, dict[str, Any]]:
    """The summed losses of packs and their gradients by parameter."""
    return with_gradients(objective.model, sum(objective(pack).total for pack in packs))


def with_gradients(model: Any, loss: Any) -> tuple[Any, dict[str, Any]]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def dense_losses(model: Any, documents: Documents, phase: SftPhase) -> tuple[Any, Any]:
    """Total and rows of documents one by one with transformers' own head and attention and torch's own loss."""
    by_segment = torch.tensor([0.0, phase.loss_weights.think, phase.loss_weights.answer, phase.loss_weights.eos])
    total, rows = torch.zeros(()), []
    for index in range(len(documents)):
        tokens = torch.from_numpy(documents.ids(index)).long()
        weights = by_segment[torch.from_numpy(documents.segments(index)).long()][1:]
        logits = model(tokens[None], use_cache=False).logits[0, :-1]
        one = F.cross_entropy(logits, tokens[1:], reduction="none", label_smoothing=phase.label_smoothing)
        one = one + phase.z_loss * logits.logsumexp(-1).square()
        total = total + (one * weights).sum()
        nll = -torch.log_softmax(logits, -1).gather(-1, tokens[1:, None]).squeeze(-1)
        rows.append(nll[weights > 0].detach())
    return total, torch.cat(rows)


def largest(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def everything(documents: Documents) -> list[int]:
    return list(range(len(documents)))


# --- packs against documents alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", TOLERANCE)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_has_the_log_probabilities_and_gradients_of_its_documents_alone(
    student: Callable[..., StudentObjective], documents: Documents, family: str, tied: bool, attention: str
) -> None:
    ours = student(family, attention, tie_word_embeddings=tied)
    theirs = student(family, "sdpa", tie_word_embeddings=tied).model
    assert (ours.model.lm_head.weight is ours.model.model.embed_tokens.weight) is tied
    [pack] = packs_of(documents, [everything(documents)], ours.phase, lay_out)
    found = ours(pack)
    dense, rows = dense_losses(theirs, documents, ours.phase)
    assert float((found.nll_N - rows).abs().max()) < TOLERANCE[attention]
    assert float((found.total - dense).detach().abs()) < OF_SUMS[attention]
    (_, mine), (_, reference) = with_gradients(ours.model, found.total), with_gradients(theirs, dense)
    assert largest(mine, reference) < OF_SUMS[attention] and ("lm_head.weight" in mine) is not tied
    assert min(float(gradient.abs().max()) for gradient in reference.values()) > 1e-3, "every weight took part"


@pytest.mark.parametrize("layout", [lay_out, lay_side_by_side], ids=["packed", "bucketed"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("terms", [*EVERYTHING, "all"])
def test_weights_smoothing_and_z_loss_are_those_of_plain_pytorch(
    student: Callable[..., StudentObjective], documents: Documents, terms: str, tied: bool, layout: Layout
) -> None:
    given = EVERYTHING if terms == "all" else {terms: EVERYTHING[terms]}
    ours = student("qwen2", given=given, tie_word_embeddings=tied)
    theirs = student("qwen2", "sdpa", tie_word_embeddings=tied).model
    [pack] = packs_of(documents, [everything(documents)], ours.phase, layout)
    loss, mine = loss_and_gradients(ours, [pack])
    dense, reference = with_gradients(theirs, dense_losses(theirs, documents, ours.phase)[0])
    assert loss.item() == pytest.approx(dense.item(), abs=1e-10)
    assert largest(mine, reference) < 1e-10
    _, plain = with_gradients(theirs, dense_losses(theirs, documents, SftPhase(kind="sft"))[0])
    assert largest(plain, reference) > 0.01, "the terms matter"


def test_a_part_without_weight_is_not_among_the_rows(
    student: Callable[..., StudentObjective], documents: Documents
) -> None:
    ours = student(given={"loss_weights": {"think": 0.0, "answer": 1.0, "eos": 0.5}})
    [pack] = packs_of(documents, [everything(documents)], ours.phase, lay_out)
    dense, rows = dense_losses(student(attention="sdpa").model, documents, ours.phase)
    found = ours(pack)
    assert len(found.nll_N) == len(rows) < sum(LENGTHS) - sum(PROMPTS)
    assert float((found.nll_N - rows).abs().max()) < 1e-10
    assert found.total.item() == pytest.approx(dense.item(), abs=1e-9)


def test_masks_go_by_position_where_the_pad_token_is_the_end_token(
    student: Callable[..., StudentObjective], make_documents: MakeDocuments
) -> None:
    end, prompts = 2, [4, 5]
    documents = make_documents([8, 11], prompts)
    for index, prompt in enumerate(prompts):
        ids = documents.ids(index)
        ids[ids == end] = 3
        ids[1] = ids[prompt + 1] = ids[-1] = end  # in the prompt, inside the completion, and at the end
    ours = student()
    [pack] = packs_of(documents, [[0, 1]], ours.phase, lay_out)
    assert pack.targets_N.tolist().count(end) == 4, "both ends and both inside; none of the prompts'"
    loss = ours(pack).total.item()
    dense, _ = dense_losses(student(attention="sdpa").model, documents, ours.phase)
    assert loss == pytest.approx(dense.item(), abs=1e-9)

    # what a collator does that masks by id where pad == eos: the end is never learnt, and the loss is another one
    kept = pack.targets_N != end
    by_id = pack._replace(
        rows_N=pack.rows_N[kept], targets_N=pack.targets_N[kept], weights_N=pack.weights_N[kept]
    )  # fmt: skip
    assert abs(ours(by_id).total.item() - loss) > 1


# --- nothing crosses ------------------------------------------------------------------------------------------------


def logits_of(objective: StudentObjective, pack: PackTensors) -> Any:
    """Logits of all cells, [cells, vocabulary]."""
    with torch.no_grad():
        return objective.model.lm_head(objective.hidden(pack)).flatten(0, 1)


def with_another(pack: PackTensors, cells: slice) -> PackTensors:
    ids = pack.ids_BT.clone().flatten()
    ids[cells] = (ids[cells] + 1) % 512
    return pack._replace(ids_BT=ids.view_as(pack.ids_BT))


@pytest.mark.parametrize("document", [0, 3, 7])
@pytest.mark.parametrize("attention", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_changing_one_document_leaves_the_logits_of_all_others_bit_equal(
    student: Callable[..., StudentObjective], documents: Documents, family: str, attention: str, document: int
) -> None:
    objective = student(family, attention)
    [pack] = packs_of(documents, [everything(documents)], objective.phase, lay_out)
    assert pack.bounds is not None
    own = slice(*pack.bounds[document : document + 2])
    before, after = logits_of(objective, pack), logits_of(objective, with_another(pack, own))
    outside = torch.ones(len(before), dtype=torch.bool)
    outside[own] = False
    assert torch.equal(before[outside], after[outside])
    assert (before[own] != after[own]).any(-1).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_plain_causal_packing_fails_that_check(
    student: Callable[..., StudentObjective], documents: Documents, attention: str
) -> None:
    """The same pack without boundaries, as a collator that concatenates and nothing more would lay it out."""
    objective = student("llama", attention)
    [pack] = packs_of(documents, [everything(documents)], objective.phase, lay_out)
    assert pack.bounds is not None
    own, end = slice(*pack.bounds[3:5]), pack.bounds[4]
    leaking = pack._replace(bounds=None, positions_BT=torch.arange(len(pack.ids_BT[0]))[None])
    before, after = logits_of(objective, leaking), logits_of(objective, with_another(leaking, own))
    assert (before[end:] != after[end:]).any(-1).all()
    dense, _ = dense_losses(objective.model, documents, objective.phase)
    assert abs(objective(leaking).total.item() - dense.item()) > 0.1


@pytest.mark.parametrize("attention", TOLERANCE)
def test_what_stands_in_the_padding_of_a_batch_is_neither_seen_nor_taught(
    student: Callable[..., StudentObjective], documents: Documents, attention: str
) -> None:
    objective = student("qwen3", attention)
    [pack] = packs_of(documents, [everything(documents)], objective.phase, lay_side_by_side)
    longest = pack.ids_BT.shape[1]
    real = torch.cat([torch.arange(longest) < length for length in LENGTHS])
    ids = pack.ids_BT.flatten().clone()
    ids[~real] = 77
    other = pack._replace(ids_BT=ids.view_as(pack.ids_BT))
    before, after = logits_of(objective, pack), logits_of(objective, other)
    assert torch.equal(before[real], after[real]) and not torch.equal(before[~real], after[~real])
    (loss, mine), (same, others) = (loss_and_gradients(objective, [one]) for one in (pack, other))
    assert torch.equal(loss, same)
    assert all(torch.equal(mine[name], others[name]) for name in mine)


# --- micro-batches and batches --------------------------------------------------------------------------------------

CUTS = {
    "8 x 1": [[index] for index in range(8)],
    "4 x 2": [[0, 5], [1, 4], [2, 7], [3, 6]],
    "1 x 8": [list(range(8))],
}


@pytest.mark.parametrize("given", [{}, EVERYTHING], ids=["plain", "with every term"])
@pytest.mark.parametrize("attention", TOLERANCE)
def test_neither_the_cut_into_micro_batches_nor_their_layout_changes_a_gradient(
    student: Callable[..., StudentObjective], documents: Documents, attention: str, given: dict[str, Any]
) -> None:
    objective = student("qwen2", attention, given)
    found = {}
    for layout in (lay_out, lay_side_by_side):
        for name, groups in CUTS.items():
            packs = packs_of(documents, groups, objective.phase, layout)
            assert [pack.bounds is not None for pack in packs] == [layout is lay_out] * len(groups)
            found[layout.__name__, name] = loss_and_gradients(objective, packs)
    loss, expected = found["lay_out", "1 x 8"]
    for case, (other, gradients) in found.items():
        assert abs(float(other - loss)) < OF_SUMS[attention], case
        assert largest(gradients, expected) < OF_SUMS[attention], case


def test_averaging_the_means_of_micro_batches_would_change_the_gradient(
    student: Callable[..., StudentObjective], documents: Documents
) -> None:
    objective = student("qwen2")
    packs = packs_of(documents, CUTS["4 x 2"], objective.phase, lay_out)
    losses = [objective(pack).total for pack in packs]
    rows = [len(pack.rows_N) for pack in packs]
    _, right = with_gradients(objective.model, sum(losses) / sum(rows))
    losses = [objective(pack).total for pack in packs]
    _, wrong = with_gradients(objective.model, sum(loss / n for loss, n in zip(losses, rows)) / len(packs))
    assert largest(right, wrong) > 1e-3


# --- without gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [lay_out, lay_side_by_side], ids=["packed", "bucketed"])
@pytest.mark.parametrize("given", [{}, {"loss_weights": EVERYTHING["loss_weights"]}, EVERYTHING], ids=range(3))
@pytest.mark.parametrize("attention", TOLERANCE)
def test_what_is_measured_without_gradients_is_what_trains_but_for_smoothing_and_z_loss(
    student: Callable[..., StudentObjective],
    documents: Documents,
    attention: str,
    given: dict[str, Any],
    layout: Layout,
) -> None:
    objective = student("llama", attention, given)
    [pack] = packs_of(documents, [everything(documents)], objective.phase, layout)
    trained = objective(pack)
    objective.eval()
    with torch.no_grad():
        measured = objective(pack)
    assert float((measured.nll_N - trained.nll_N).abs().max()) < 1e-12
    plain = StudentObjective(
        objective.model, objective.phase.model_copy(update={"label_smoothing": 0.0, "z_loss": 0.0})
    )
    assert measured.total.item() == pytest.approx(plain(pack).total.item(), abs=1e-10)
    assert trained.total.requires_grad and not measured.total.requires_grad


# --- memory ---------------------------------------------------------------------------------------------------------


def test_the_backward_pass_keeps_nothing_as_large_as_rows_times_vocabulary(
    student: Callable[..., StudentObjective], make_documents: MakeDocuments
) -> None:
    documents = make_documents([30, 31, 60, 40], [2, 3, 4, 1])
    objective = student()
    [pack] = packs_of(documents, [[0, 1, 2, 3]], objective.phase, lay_out)
    saved: list[int] = []

    def keep(tensor: Any) -> Any:
        saved.append(tensor.numel())
        return tensor

    too_large = len(pack.rows_N) * 512
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(pack)
    assert max(saved) == 512 * 64 < too_large, "the gradient of the head"
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dense_losses(student(attention="sdpa").model, documents, objective.phase)
    assert sum(n for n in saved if n >= 512 * 28) >= too_large, "the check sees what dense cross-entropy keeps"


@pytest.mark.parametrize("leaner", [False, True], ids=["transformers' own code", "lean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_activations_changes_no_gradient(
    live: Live, phase: MakePhase, make_documents: MakeDocuments, family: str, leaner: bool
) -> None:
    documents = make_documents([9, 14, 5], [3, 1, 4])
    found = []
    for checkpointed in (False, True):
        model = live(family, "bfloat16", attention_dropout=0.2)
        if checkpointed:
            model.activation_checkpointing_enable()
        objective = StudentObjective(model, phase(neftune_alpha=5.0)).train()
        [pack] = packs_of(documents, [[0, 1, 2]], objective.phase, lay_out)
        with lean(model, leaner) as changed, seeded(3, "cpu"):
            assert bool(changed) is leaner
            found.append(loss_and_gradients(objective, [pack]))
    (loss, plain), (same, recomputed) = found
    assert torch.equal(loss, same)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


# --- noise on the embeddings ----------------------------------------------------------------------------------------


def test_noise_has_the_size_of_its_own_document_whoever_shares_the_pack() -> None:
    width, alpha = 4096, 3.0
    noise = noisy(torch.zeros(1, 13, width), [0, 4, 13], alpha)[0]
    # alpha / sqrt(tokens x width): 3 / sqrt(4 x 4096) = 3 / 128 and 3 / sqrt(9 x 4096) = 1 / 64
    for rows, size in ((noise[:4], 3 / 128), (noise[4:], 1 / 64)):
        assert 0.999 * size < float(rows.abs().max()) <= size
        assert float(rows.mean()) == pytest.approx(0, abs=0.01 * size)
        assert float(rows.std()) == pytest.approx(size / 3**0.5, rel=0.02), "uniform"
        assert float((rows[0] * rows[1]).mean()) == pytest.approx(0, abs=0.03 * size**2), "independent"
    batch = noisy(torch.zeros(2, 9, width), None, alpha)
    assert 0.999 / 64 < float(batch.abs().max()) <= 1 / 64 and not torch.equal(batch[0], batch[1])


def test_noise_is_added_to_the_embeddings_in_training_only(
    student: Callable[..., StudentObjective], documents: Documents
) -> None:
    plain, noised = student(), student(given={"neftune_alpha": 5.0})
    [pack] = packs_of(documents, [everything(documents)], plain.phase, lay_out)
    with seeded(1, "cpu"):
        found = noised(pack)
    assert abs(found.total.item() - plain(pack).total.item()) > 1e-3
    with seeded(1, "cpu"):
        embedded = noisy(plain.model.get_input_embeddings()(pack.ids_BT), pack.bounds, 5.0)
        given = {"position_ids": pack.positions_BT, "cu_seq_lens_q": pack.bounds, "use_cache": False}
        logits = plain.model(inputs_embeds=embedded, **given).logits[0, pack.rows_N]
    expected = F.cross_entropy(logits, pack.targets_N, reduction="sum")
    assert found.total.item() == pytest.approx(expected.item(), abs=1e-9)
    noised.eval()
    assert noised(pack).total.item() == plain(pack).total.item()
    around = StudentObjective(noised.model, noised.phase)
    assert around(pack).total.item() == plain(pack).total.item(), "what is put around a model that evaluates, too"


# --- what attention is given ----------------------------------------------------------------------------------------


def test_flash_attention_is_given_the_same_boundaries_as_tensors(live: Live, make_documents: MakeDocuments) -> None:
    model = live()
    pack = PackTensors.of(lay_out(make_documents([5, 7], [1, 2]), [0, 1]), "cpu")
    assert boundaries(model, pack.bounds) == {"cu_seq_lens_q": [0, 5, 12]}
    model.config._attn_implementation = "flash_attention_2"
    given = boundaries(model, pack.bounds)
    assert given.keys() == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == [0, 5, 12]
    assert given["cu_seq_lens_q"].dtype == torch.int32
    assert given["max_length_q"] == given["max_length_k"] == 7
    assert boundaries(model, None) == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_mask_of_a_pack_by_hand(dtype: Any) -> None:
    mask = block_mask([0, 2, 3, 6], dtype, "cpu")
    allowed = [
        "x.....",
        "xx....",
        "..x...",
        "...x..",
        "...xx.",
        "...xxx",
    ]
    expected = np.where(np.array([list(row) for row in allowed]) == "x", 0.0, torch.finfo(dtype).min)
    assert mask.dtype == dtype and mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].double().tolist() == expected.tolist()


def test_weights_of_a_pack_are_those_of_its_segments(make_documents: MakeDocuments) -> None:
    weights = LossWeights(think=0.5, answer=2.0, eos=3.0)
    pack = PackTensors.of(lay_out(make_documents([8, 4], [3, 2]), [0, 1], weights), "cpu")
    # 3 prompt tokens, 2 of reasoning, 2 of answer, an end; then 2, 0, 1, 1; a row stands before what it predicts
    assert pack.rows_N.tolist() == [2, 3, 4, 5, 6, 9, 10]
    assert pack.weights_N.tolist() == [0.5, 0.5, 2, 2, 3, 2, 3]
