"""Attention per document: the function against one written out, whole models against documents alone, no leak."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from distill import attention
from distill.attention import PER_DOCUMENT, per_document_attention
from distill.models import find_model, load_model

TinyModel = Callable[[str], Path]
FAMILIES = ("llama", "qwen2", "qwen3")
LENGTHS = [1, 17, 5, 6, 5, 30, 31, 2]
"""Documents of a pack: some of like length, which are attended side by side, some alone, one of a single token."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


# --- the function ---------------------------------------------------------------------------------------------------


def naive_attention(query: Any, key: Any, value: Any, bounds: list[int], scale: float) -> Any:
    """Softmax attention written out with one block-diagonal causal mask over the whole pack; [tokens, heads, dim]."""
    tokens = query.shape[2]
    document = np.searchsorted(np.asarray(bounds[1:]), np.arange(tokens), side="right")
    allowed = (document[:, None] == document[None]) & (np.arange(tokens)[:, None] >= np.arange(tokens)[None])
    group = query.shape[1] // key.shape[1]
    out = np.zeros((tokens, query.shape[1], value.shape[3]))
    for head in range(query.shape[1]):
        scores = query[0, head] @ key[0, head // group].T * scale
        scores = np.where(allowed, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ value[0, head // group]
    return out


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 24), min_size=1, max_size=10),
    st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]),
    st.sampled_from([None, 0.3]),
    st.integers(0, 2**31),
)
def test_attention_per_document_is_block_diagonal_causal_attention(
    lengths: list[int], heads: tuple[int, int], scaling: float | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    query, key, value = (rng.standard_normal((1, h, tokens, 8)) for h in (heads[0], heads[1], heads[1]))
    bounds = [0, *np.cumsum(lengths).tolist()]
    ours, _ = per_document_attention(
        None, *map(torch.from_numpy, (query, key, value)), None, scaling=scaling, cu_seq_lens_q=bounds
    )
    expected = naive_attention(query, key, value, bounds, 8**-0.5 if scaling is None else scaling)
    assert np.abs(ours[0].numpy() - expected).max() < 1e-12


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_attention_in_blocks_has_the_gradients_of_torchs_own(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [3, 40, 41, 7, 90]
    bounds = [0, *np.cumsum(lengths).tolist()]
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, h, sum(lengths), 8) for h in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    weights = torch.randn(1, sum(lengths), heads[0], 8, generator=generator, dtype=torch.float64)

    def gradients() -> tuple[Any, ...]:
        out, _ = per_document_attention(None, *inputs, None, scaling=0.4, cu_seq_lens_q=bounds)
        return out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)

    monkeypatch.setattr(attention, "BLOCK", (16, 16))
    small = gradients()
    monkeypatch.setattr(attention, "BLOCK", (64, 64))
    whole = gradients()
    query, key, value = inputs
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, a:b],
            key[:, :, a:b],
            value[:, :, a:b],
            is_causal=True,
            scale=0.4,
            enable_gqa=heads[0] != heads[1],
        )
        for a, b in zip(bounds, bounds[1:])
    ]
    reference = torch.cat(parts, 2).transpose(1, 2)
    expected = (reference.detach(), *torch.autograd.grad((reference * weights).sum(), inputs))
    for found in (small, whole):
        assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-12


def test_in_bf16_blocks_are_as_close_to_exact_attention_as_torchs_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(1, h, 200, 64, generator=generator, dtype=torch.float64) for h in (9, 3, 3)]
    rounded = [x.bfloat16().requires_grad_() for x in exact]
    wide = [x.detach().double().requires_grad_() for x in rounded]
    weights = torch.randn(1, 200, 9, 64, generator=generator, dtype=torch.float64)

    def torchs(inputs: list[Any]) -> Any:
        return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True).transpose(1, 2)

    def ours(inputs: list[Any]) -> Any:
        return per_document_attention(None, *inputs, None, cu_seq_lens_q=[0, 200])[0]

    reference = torch.autograd.grad((torchs(wide) * weights).sum(), wide)
    errors = []
    for attend in (ours, torchs):
        found = torch.autograd.grad((attend(rounded).double() * weights).sum(), rounded)
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(found, reference, strict=True)])
    assert all(mine < 0.01 and mine < 2.5 * theirs for mine, theirs in zip(*errors, strict=True)), errors


def test_dropout_is_left_to_torch_and_still_stays_inside_documents() -> None:
    ones = torch.ones(1, 2, 9, 4)
    value = torch.cat([torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 5, 4)], 2)
    torch.manual_seed(0)
    out, _ = per_document_attention(None, ones, ones, value, None, dropout=0.5, cu_seq_lens_q=[0, 4, 9])
    assert not out[0, :4].any(), "the second document's values never reach the first"
    assert len(out[0, 4:].unique()) > 2, "weights were dropped"
    plain, _ = per_document_attention(None, ones, ones, value, None, cu_seq_lens_q=[0, 4, 9])
    assert torch.allclose(plain[0, 4:], torch.ones(5, 2, 4))


def test_boundaries_may_be_a_tensor_as_flash_attention_takes_them() -> None:
    query = torch.randn(1, 2, 9, 4, dtype=torch.float64)
    one, _ = per_document_attention(None, query, query, query, None, cu_seq_lens_q=[0, 4, 9])
    other, _ = per_document_attention(
        None, query, query, query, None, cu_seq_lens_q=torch.tensor([0, 4, 9], dtype=torch.int32)
    )
    assert torch.equal(one, other)


def test_without_boundaries_attention_raises_instead_of_leaking(tiny_model: TinyModel) -> None:
    model = load_model(find_model(str(tiny_model("llama"))), attention=PER_DOCUMENT)
    with pytest.raises(ValueError, match="takes cu_seq_lens_q"):
        model(torch.arange(3, 9)[None])


def test_a_document_beyond_the_sliding_window_raises_instead_of_seeing_too_much() -> None:
    query = torch.randn(1, 2, 9, 4)
    per_document_attention(None, query, query, query, None, cu_seq_lens_q=[0, 4, 9], sliding_window=5)
    with pytest.raises(ValueError, match="documents may have 4 tokens"):
        per_document_attention(None, query, query, query, None, cu_seq_lens_q=[0, 4, 9], sliding_window=4)


def test_boundaries_seen_while_evaluating_serve_training_too() -> None:
    query = torch.randn(1, 2, 11, 4, requires_grad=True)
    with torch.inference_mode():
        per_document_attention(None, query, query, query, None, cu_seq_lens_q=[0, 7, 11])
    out, _ = per_document_attention(None, query, query, query, None, cu_seq_lens_q=[0, 7, 11])
    out.sum().backward()
    assert query.grad is not None


# --- whole models ---------------------------------------------------------------------------------------------------


class Packed:
    """Random documents packed, and each alone, through the same weights in float64."""

    def __init__(self, folder: Path, lengths: list[int]) -> None:
        self.lengths = lengths
        self.bounds = [0, *np.cumsum(lengths).tolist()]
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(3, 512, (sum(lengths),), generator=generator)
        self.positions = torch.cat([torch.arange(n) for n in lengths])[None]
        self.packed, self.alone = (self._load(folder, attention) for attention in (PER_DOCUMENT, "sdpa"))
        self.readout = torch.randn(64, 5, generator=generator, dtype=torch.float64)

    @staticmethod
    def _load(folder: Path, attention: str) -> Any:
        model = load_model(find_model(str(folder)), "float64", "cpu", attention)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
        return model

    def together(self, ids: Any = None, **changes: Any) -> Any:
        """Hidden states of the whole pack."""
        given = {"position_ids": self.positions, "cu_seq_lens_q": self.bounds} | changes
        ids = self.ids if ids is None else ids
        return self.packed.model(input_ids=ids[None], use_cache=False, **given).last_hidden_state[0]

    def one_by_one(self) -> Any:
        """Hidden states of each document by itself, as stock transformers computes them."""
        parts = [self.alone.model(part[None], use_cache=False) for part in self.ids.split(self.lengths)]
        return torch.cat([part.last_hidden_state[0] for part in parts])

    def gradients(self, model: Any, hidden: Any) -> dict[str, Any]:
        """Gradients of a readout that weighs every token differently."""
        weights = torch.linspace(0.5, 2, len(hidden), dtype=torch.float64)
        model.zero_grad()
        ((hidden @ self.readout).tanh().sum(-1) * weights).sum().backward()
        return {name: p.grad for name, p in model.model.named_parameters()}


@pytest.fixture(scope="module", params=FAMILIES)
def pack(request: pytest.FixtureRequest, tiny_model: TinyModel) -> Packed:
    return Packed(tiny_model(request.param), LENGTHS)


def largest(values: Collection[Any]) -> float:
    return max(float(value.detach().abs().max()) for value in values)


def test_packed_documents_have_the_hidden_states_and_gradients_of_documents_alone(pack: Packed) -> None:
    together, alone = pack.together(), pack.one_by_one()
    assert largest([together - alone]) < 1e-10
    ours, theirs = pack.gradients(pack.packed, together), pack.gradients(pack.alone, alone)
    assert ours.keys() == theirs.keys()
    assert largest([ours[name] - theirs[name] for name in ours]) < 1e-10
    assert min(float(gradient.abs().max()) for gradient in theirs.values()) > 1e-3, "every weight took part"


def test_plain_causal_attention_over_the_pack_fails_that_check(pack: Packed) -> None:
    pack.packed.set_attn_implementation("sdpa")
    try:
        # a mask of ones is what collators of trainers without packing support send
        mask = torch.ones(1, len(pack.ids), dtype=torch.long)
        leaking = pack.together(attention_mask=mask)
    finally:
        pack.packed.set_attn_implementation(PER_DOCUMENT)
    difference = leaking - pack.one_by_one()
    assert largest([difference]) > 1e-2
    assert largest([difference[: pack.bounds[1]]]) < 1e-10, "only the first document has none before it"


def test_positions_that_run_on_through_the_pack_change_nothing_but_rounding(pack: Packed) -> None:
    """Rotary attention sees distances only; positions restart so that no document leaves the trained range."""
    onwards = pack.together(position_ids=torch.arange(len(pack.ids))[None])
    assert largest([onwards - pack.one_by_one()]) < 1e-4


@pytest.mark.parametrize("document", [1, 4, 6])
def test_changing_one_document_leaves_the_logits_of_all_others_bit_equal(pack: Packed, document: int) -> None:
    start, end = pack.bounds[document : document + 2]
    changed = pack.ids.clone()
    changed[start:end] = (changed[start:end] + 1) % 512
    with torch.no_grad():
        before, after = (pack.packed.lm_head(pack.together(ids)) for ids in (pack.ids, changed))
    outside = torch.ones(len(pack.ids), dtype=torch.bool)
    outside[start:end] = False
    assert torch.equal(before[outside], after[outside])
    assert (before[~outside] != after[~outside]).any(-1).all()


def test_changing_a_token_leaves_the_tokens_before_it_bit_equal(pack: Packed) -> None:
    start, end = pack.bounds[5:7]
    middle = (start + end) // 2
    changed = pack.ids.clone()
    changed[middle] = (changed[middle] + 1) % 512
    with torch.no_grad():
        before, after = pack.together(), pack.together(changed)
    differs = (before != after).any(-1)
    assert not differs[:middle].any() and differs[middle:end].all() and not differs[end:].any()
