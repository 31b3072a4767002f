"""Parity numbers are right by hand and by a peer, and greedy texts may differ only at near ties."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distill.errors import ExportError
from distill.export.parity import (
    NEAR_TIE,
    ROWS_AT_ONCE,
    compare_greedy,
    compare_logits,
    first_difference,
    greedy_from_logits,
    kl_divergence,
    log_softmax,
)

LOGITS = arrays(np.float32, (3, 5), elements=st.floats(-20, 20, width=32))


def log(*probabilities: float) -> np.ndarray[Any, Any]:
    return np.log(np.array([probabilities], np.float32))


def test_kl_of_two_known_distributions() -> None:
    # 1/2 ln(1/2 : 1/4) + 1/2 ln(1/2 : 3/4) = ln 2 - 1/2 ln 3
    found = compare_logits([log(0.5, 0.5)], [log(0.25, 0.75)])
    assert found.mean_kl == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)
    assert found.max_logit_difference == pytest.approx(math.log(2), rel=1e-6)
    assert found.positions == 1


def test_kl_is_of_the_reference_from_the_candidate_and_not_the_other_way() -> None:
    one, other = log(0.9, 0.1), log(0.5, 0.5)
    assert compare_logits([one], [other]).mean_kl == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-6)
    assert compare_logits([other], [one]).mean_kl == pytest.approx(-0.5 * math.log(4 * 0.9 * 0.1), rel=1e-6)


def test_positions_count_once_whatever_their_document() -> None:
    same, wrong = log(0.7, 0.3), log(0.3, 0.7)
    documents = [np.repeat(same, 3, axis=0), same]
    found = compare_logits(documents, [documents[0], wrong])
    assert found.positions == 4
    assert found.top1_agreement == 0.75
    assert found.mean_kl == pytest.approx(0.4 * math.log(7 / 3) / 4, rel=1e-6)


def test_perplexity_is_of_the_tokens_that_follow() -> None:
    reference, candidate = (
        np.concatenate([log(0.5, 0.5), log(0.8, 0.2)]),
        np.concatenate([log(0.25, 0.75), log(0.4, 0.6)]),
    )
    found = compare_logits([reference], [candidate], [[0, 0]])
    assert found.perplexity == pytest.approx((0.5 * 0.8) ** -0.5)
    assert found.perplexity_ratio == pytest.approx(((0.5 * 0.8) / (0.25 * 0.4)) ** 0.5)
    # the last position of a text has no token that follows
    assert compare_logits([reference], [candidate], [[0]]).perplexity == pytest.approx(2.0)
    assert math.isnan(compare_logits([reference], [candidate]).perplexity_ratio)


def test_a_near_tie_that_differs_is_counted() -> None:
    reference = np.array([[1.0, 1.0 - NEAR_TIE / 2], [1.0, 1.0 - 2 * NEAR_TIE]], np.float32)
    found = compare_logits([reference], [reference[:, ::-1]])
    assert found.top1_agreement == 0 and found.near_ties == 1


def test_every_part_of_a_long_document_is_compared() -> None:
    reference = np.zeros((2 * ROWS_AT_ONCE + 5, 4), np.float32)
    candidate = reference.copy()
    candidate[-1, 2] = 3
    found = compare_logits([reference], [candidate])
    assert found.max_logit_difference == 3
    assert found.top1_agreement == 1 - 1 / len(reference)


@given(LOGITS, st.floats(-50, 50))
def test_adding_a_constant_to_all_logits_changes_no_distribution(logits: np.ndarray[Any, Any], shift: float) -> None:
    wide = logits.astype(np.float64)
    assert np.abs(kl_divergence(log_softmax(wide), log_softmax(wide + shift))).max() < 1e-9


@given(LOGITS, LOGITS)
def test_kl_is_a_peer_librarys_and_not_negative(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> None:
    import torch

    found = kl_divergence(log_softmax(one.astype(np.float64)), log_softmax(other.astype(np.float64)))
    p, q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1) for x in (one, other))
    peer = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert found == pytest.approx(peer.numpy(), rel=1e-9, abs=1e-9)
    assert found.min() > -1e-9


def test_documents_are_read_one_at_a_time() -> None:
    held: list[int] = []

    def documents(step: int) -> Iterator[np.ndarray[Any, Any]]:
        for _ in range(50):
            held.append(step)
            assert abs(held.count(1) - held.count(2)) <= 1
            yield log(0.5, 0.5)

    assert compare_logits(documents(1), documents(2)).positions == 50


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("who", ["reference", "candidate"])
def test_logits_that_are_not_finite_never_pass(who: str, value: float) -> None:
    good, bad = np.zeros((5, 3), np.float32), np.zeros((5, 3), np.float32)
    bad[3, 1] = value
    pair = ([bad], [good]) if who == "reference" else ([good], [bad])
    with pytest.raises(ExportError, match=f"document 0: the {who}'s logits at position 3 are not finite"):
        compare_logits(*pair)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"document 0: shapes \(2, 3\) and \(2, 4\) differ"):
        compare_logits([np.zeros((2, 3), np.float32)], [np.zeros((2, 4), np.float32)])
    with pytest.raises(ValueError, match="shorter"):
        compare_logits([np.zeros((2, 3), np.float32)] * 2, [np.zeros((2, 3), np.float32)])
    with pytest.raises(ValueError, match="no positions"):
        compare_logits([], [])


# --- greedy text ------------------------------------------------------------------------------------------------------


def test_equal_texts_pass() -> None:
    found = compare_greedy([[1, 2], [3]], [[5.0, 0.0], [1.0]], [[1, 2], [3]])
    assert (found.prompts, found.identical, found.near_ties, found.differences) == (2, 2, 0, ())
    assert found.passed


def test_a_first_difference_at_a_near_tie_is_allowed_and_counted() -> None:
    found = compare_greedy([[1, 2, 9]], [[5.0, NEAR_TIE / 2, 5.0]], [[1, 7, 8]])
    assert found.passed
    assert (found.identical, found.near_ties) == (0, 1)


@pytest.mark.parametrize(
    ("expected", "margins", "found", "position", "tokens"),
    [
        ([1, 2, 9], [5.0, NEAR_TIE, 0.0], [1, 7, 8], 1, (2, 7)),
        ([1, 2, 9], [0.0, 1.0, 0.0], [1, 7, 9], 1, (2, 7)),
        ([1, 2], [0.0, 0.0], [1], 1, (2, None)),
        ([1], [0.0], [1, 2], 1, (None, 2)),
    ],
    ids=["at the limit", "only the first counts", "candidate stopped", "candidate went on"],
)
def test_any_other_difference_fails(
    expected: list[int], margins: list[float], found: list[int], position: int, tokens: tuple[int | None, int | None]
) -> None:
    result = compare_greedy([[4], expected], [[9.0], margins], [[4], found])
    assert not result.passed
    (difference,) = result.differences
    assert (difference.prompt, difference.position) == (1, position)
    assert (difference.expected, difference.found) == tokens


def test_greedy_inputs_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="2 reference tokens with 1 margins"):
        compare_greedy([[1, 2]], [[0.5]], [[1, 2]])
    with pytest.raises(ValueError, match="shorter"):
        compare_greedy([[1]], [[0.5]], [])


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_the_first_difference_is_where_the_common_prefix_ends(one: list[int], other: list[int]) -> None:
    index = first_difference(one, other)
    if index is None:
        assert one == other
    else:
        assert one[:index] == other[:index]
        assert one[index : index + 1] != other[index : index + 1]


def test_one_forward_pass_along_a_text_gives_the_references_own_greedy_text(
    torch_student: Callable[..., Any], exported: Callable[..., Path]
) -> None:
    import torch

    from distill.onnx_decoding import OnnxDecoder

    model, prompt = torch_student("llama"), [1, 40, 41, 42]
    candidate = OnnxDecoder(exported("llama"), threads=2).generate([prompt], 16, eos_ids=[])[0]

    def along(text: list[int]) -> tuple[list[int], list[float]]:
        with torch.no_grad():
            return greedy_from_logits(model(torch.tensor([prompt + text])).logits[0].numpy(), len(prompt))

    tokens, margins = along(candidate)
    assert len(tokens) == len(margins) == len(candidate)
    assert compare_greedy([tokens], [margins], [candidate]).identical == 1
    assert min(margins) > 0
    altered = [*candidate[:5], (candidate[5] + 1) % 512, *candidate[6:]]
    tokens, margins = along(altered)
    assert tokens[:6] == candidate[:6]
    (difference,) = compare_greedy([tokens], [margins], [altered]).differences
    assert (difference.position, difference.expected, difference.found) == (5, candidate[5], altered[5])


def test_margins_are_best_minus_second_best() -> None:
    logits = np.array([[9, 9, 9], [1, 4, 2.5], [0, 0, 0], [7, 7, 7]], np.float32)
    assert greedy_from_logits(logits, 2) == ([1, 0], [1.5, 0.0])
