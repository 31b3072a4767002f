"""Compare a variant with the torch student: pure functions over logits and tokens, one document at a time.

Nothing here loads a model. Logits come in as float32 arrays [positions, vocabulary], reference first; all sums are in
float64. What is good enough is the gates' business.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.errors import ExportError

NEAR_TIE = 1e-3
"""Two best logits closer than this may come out in either order: fp32 sums are rounded differently by each runtime."""

ROWS_AT_ONCE = 16
"""Positions compared together: bounds the float64 copies, whatever the length of the document, and keeps them small
enough for a processor's cache."""


class Parity(NamedTuple):
    """How far a candidate's next-token distributions are from the reference's."""

    max_logit_difference: float
    """max over positions t and tokens v of |reference[t, v] - candidate[t, v]|."""
    mean_kl: float
    """Mean over positions of KL(reference || candidate), in nats a token."""
    top1_agreement: float
    """Share of positions where both prefer the same token."""
    positions: int
    near_ties: int
    """Positions that prefer another token where the reference's two best logits are closer than `NEAR_TIE`."""
    perplexity: float
    """The reference's, exp of its mean negative log-likelihood of the tokens that follow; nan where none is given."""
    perplexity_ratio: float
    """The candidate's perplexity over the reference's; nan where no following tokens are given."""


Following = Iterable[Sequence[int]]


def compare_logits(
    reference: Iterable[NDArray[np.float32]], candidate: Iterable[NDArray[np.float32]], following: Following = ()
) -> Parity:
    """Compare the logits of documents, given pairwise in the same order; both iterables are read one at a time.

    With p = softmax(reference[t]) and q = softmax(candidate[t]), KL_t = sum_v p_v (log p_v - log q_v). Every position
    counts once, whatever its document. `following` are the tokens that really follow a document's positions, as many
    as there are. Raises ValueError if there is nothing to compare, the numbers of documents differ or a pair's shapes
    do; ExportError if a logit is not finite.
    """
    largest, kl_sum, agreed, near_ties, positions = 0.0, 0.0, 0, 0, 0
    losses: list[NDArray[np.float64]] = []
    pairs = zip(reference, candidate, strict=True)
    for document, ((expected_TV, found_TV), next_T) in enumerate(_with_following(pairs, following)):
        if expected_TV.shape != found_TV.shape:
            raise ValueError(f"document {document}: shapes {expected_TV.shape} and {found_TV.shape} differ")
        for start in range(0, len(expected_TV), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            p_TV, q_TV = expected_TV[rows].astype(np.float64), found_TV[rows].astype(np.float64)
            _require_finite(document, start, p_TV, q_TV)
            largest = max(largest, float(np.abs(p_TV - q_TV).max()))
            log_p_TV, log_q_TV = log_softmax(p_TV), log_softmax(q_TV)
            kl_sum += float(kl_divergence(log_p_TV, log_q_TV).sum())
            same_T = p_TV.argmax(-1) == q_TV.argmax(-1)
            agreed += int(same_T.sum())
            near_ties += int((~same_T & (margins(p_TV) < NEAR_TIE)).sum())
            losses.append(_losses(log_p_TV, log_q_TV, next_T[rows]))
        positions += len(expected_TV)
    if not positions:
        raise ValueError("no positions to compare: give at least one document of one token")
    perplexity, ratio = _perplexities(np.concatenate(losses))
    return Parity(largest, kl_sum / positions, agreed / positions, positions, near_ties, perplexity, ratio)


def _with_following(
    pairs: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]], following: Following
) -> Iterator[tuple[tuple[NDArray[np.float32], NDArray[np.float32]], Sequence[int]]]:
    """Every pair with its following tokens; none of them where there are no more."""
    tokens = iter(following)
    for pair in pairs:
        yield pair, next(tokens, ())


def margins(logits_TV: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The best logit minus the second best of each row."""
    best_T2 = np.partition(logits_TV, -2, axis=-1)[:, -2:].astype(np.float64)
    return np.asarray(best_T2[:, 1] - best_T2[:, 0])


def _losses(log_p_TV: NDArray[np.float64], log_q_TV: NDArray[np.float64], next_T: Sequence[int]) -> NDArray[np.float64]:
    """Negative log-likelihoods of the tokens that follow, by reference and candidate; [tokens, 2]."""
    rows = np.arange(len(next_T))
    return np.stack([-side_TV[rows, np.asarray(next_T, int)] for side_TV in (log_p_TV, log_q_TV)], -1)


def _perplexities(losses_T2: NDArray[np.float64]) -> tuple[float, float]:
    if not len(losses_T2):
        return float("nan"), float("nan")
    reference, candidate = losses_T2.mean(0)
    return float(np.exp(reference)), float(np.exp(candidate - reference))


def _require_finite(
    document: int, start: int, reference_TV: NDArray[np.float64], found_TV: NDArray[np.float64]
) -> None:
    for who, logits_TV in (("reference", reference_TV), ("candidate", found_TV)):
        finite_T = np.isfinite(logits_TV).all(-1)
        if not finite_T.all():
            position = start + int(finite_T.argmin())
            raise ExportError(f"document {document}: the {who}'s logits at position {position} are not finite")


def kl_divergence(log_p_TV: NDArray[np.float64], log_q_TV: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) of each row, in nats, of two distributions' logarithms; shape [T], never below 0 but for rounding."""
    return np.asarray(np.einsum("tv,tv->t", np.exp(log_p_TV), log_p_TV - log_q_TV))


def log_softmax(logits_TV: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(softmax) over the last axis, shifted by the row's maximum so that nothing overflows."""
    shifted_TV = logits_TV - logits_TV.max(-1, keepdims=True)
    return np.asarray(shifted_TV - np.log(np.exp(shifted_TV).sum(-1, keepdims=True)))


# --- greedy text ------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """The first place where a candidate's greedy text leaves the reference's."""

    prompt: int
    position: int
    """Index among the new tokens, from 0."""
    expected: int | None
    """The reference's token there; None where its text had ended."""
    found: int | None
    margin: float
    """How much the reference preferred its best token to its second best there, in logits."""


class GreedyParity(NamedTuple):
    """Greedy texts compared prompt by prompt."""

    prompts: int
    identical: int
    near_ties: int
    """Texts that first differ where the reference's two best logits are closer than `NEAR_TIE`: allowed, counted."""
    differences: tuple[Difference, ...]
    """Texts that differ for no such reason."""

    @property
    def passed(self) -> bool:
        """Whether every text is identical or left at a near tie."""
        return not self.differences


def compare_greedy(
    reference_tokens: Sequence[Sequence[int]],
    reference_top2_margin: Sequence[Sequence[float]],
    candidate_tokens: Sequence[Sequence[int]],
) -> GreedyParity:
    """Compare new tokens of greedy decoding, prompt by prompt, end tokens included.

    `reference_top2_margin[i][t]` is the reference's best logit minus its second best where it chose
    `reference_tokens[i][t]`. Only the first difference of a text counts: after it the two read different prefixes. It
    is allowed where both still write and that margin is below `NEAR_TIE`. Raises ValueError if the three do not
    belong together.
    """
    identical, near_ties, differences = 0, 0, []
    rows = zip(reference_tokens, reference_top2_margin, candidate_tokens, strict=True)
    for prompt, (expected, margins, found) in enumerate(rows):
        if len(expected) != len(margins):
            raise ValueError(f"prompt {prompt}: {len(expected)} reference tokens with {len(margins)} margins")
        first = first_difference(expected, found)
        if first is None:
            identical += 1
        elif first < min(len(expected), len(found)) and margins[first] < NEAR_TIE:
            near_ties += 1
        else:
            differences.append(
                Difference(prompt, first, _at(first, expected), _at(first, found), _margin_at(first, margins))
            )
    return GreedyParity(len(reference_tokens), identical, near_ties, tuple(differences))


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Where two sequences first differ (the shorter one's length if it is a prefix); None if they are equal."""
    pairs = enumerate(zip(expected, found, strict=False))
    differing = next((index for index, (one, other) in pairs if one != other), None)
    if differing is None and len(expected) != len(found):
        return min(len(expected), len(found))
    return differing


def _at(index: int, sequence: Sequence[int]) -> int | None:
    return sequence[index] if index < len(sequence) else None


def _margin_at(index: int, margins: Sequence[float]) -> float:
    return float(margins[index]) if index < len(margins) else float("inf")


def greedy_from_logits(logits_TV: NDArray[np.float32], n_prompt: int) -> tuple[list[int], list[float]]:
    """What the reference would have written along a text, from its teacher-forced logits: tokens and top-2 margins.

    `logits_TV` are the reference's logits over prompt and candidate text, [n_prompt + n_text, vocabulary]; the result
    has n_text entries: best token and best minus second-best logit after each prefix. Up to and at the first place
    where the two texts differ this is the reference's own greedy text, so `compare_greedy` needs no more, at the cost
    of one forward pass instead of n_text steps.
    """
    rows_TV = logits_TV[n_prompt - 1 : -1]
    return rows_TV.argmax(-1).tolist(), margins(rows_TV).tolist()
