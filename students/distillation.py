"""The distillation loss on supervised rows: a divergence to the teacher's distribution, mixed with cross-entropy.

Computed in chunks of rows, as `losses` does and on its path: no more than a chunk of the student's logits (and of a
teacher's in memory) ever exists, and both are replaced by gradients where they stand. What is known of the teacher is a
`Targets`: all of its distribution, its likeliest tokens with the mass of the others, or tokens drawn from it.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from distill.products import product
from distill.vocabularies import exchange_

from .divergences import FLOOR, Measure, through_softmax
from .losses import CHUNK_ROWS, Losses, bands, chunked, less_onehot_, nll_to_gradient

WIDE_ROWS = 256
"""Rows that are reduced together on a GPU: a divergence needs several fp32 tensors of rows x vocabulary."""


class Mix(NamedTuple):
    """How the parts of the loss are weighed: kd * T**2 * divergence + ce * cross-entropy."""

    measure: Measure
    temperature: float = 1.0
    kd: float = 1.0
    ce: float = 0.0


class Known(Protocol):
    """What is known of a teacher's distribution at some rows."""

    def pull_(self, log_q_NV: Tensor, measure: Measure) -> Tensor:
        """The rows' divergence, [N]; turns the student's log-probabilities into gradients by their logits in place."""


class Targets(Protocol):
    """A teacher's distribution at all rows of a pass, at the loss's temperature."""

    @property
    def vocabulary(self) -> int:
        """Tokens that both models have; rows of the head beyond them are padding and take no part."""

    def chunk(self, start: int, end: int) -> "Targets":
        """The targets of the rows from `start` to `end`, counted from 0, with what they share computed at once."""

    def at(self, start: int, end: int) -> Known:
        """What is known of the rows from `start` to `end`; a few of those of a chunk."""


# --- what may be known ----------------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """All of it: log-probabilities [N, V]."""

    log_p_NV: Tensor

    def pull_(self, log_q_NV: Tensor, measure: Measure) -> Tensor:
        """See `Known`."""
        found = measure(self.log_p_NV.clamp_min(FLOOR), log_q_NV.clamp_min(FLOOR))
        log_q_NV.copy_(through_softmax(found.by_log_q_NB, log_q_NV.exp()))
        return found.value_N


class Head(NamedTuple):
    """The likeliest tokens [N, K] with their log-probabilities, and the log of the mass of all others, [N].

    The divergence is that of the partition into these tokens and one bucket of all others: never above the one over the
    whole vocabulary, for every divergence here (data processing inequality), and equal to it at K = V.
    """

    ids_NK: Tensor
    log_p_NK: Tensor
    log_tail_N: Tensor

    def pull_(self, log_q_NV: Tensor, measure: Measure) -> Tensor:
        """See `Known`."""
        log_p = torch.cat([self.log_p_NK, self.log_tail_N[:, None]], -1).clamp_min(FLOOR)
        head = log_q_NV.gather(-1, self.ids_NK)
        q_NV = log_q_NV.exp_()
        q_NV.scatter_(-1, self.ids_NK, 0.0)
        tail = q_NV.sum(-1, keepdim=True)  # summed itself: 1 - head would be noise where it is small
        log_q = torch.cat([head, tail.log()], -1).clamp_min(FLOOR)
        found = measure(log_p, log_q)
        whole = found.by_log_q_NB.sum(-1, keepdim=True)
        of_tail = found.by_log_q_NB[:, -1:] / tail.clamp_min(torch.finfo(tail.dtype).tiny)
        q_NV.mul_(of_tail - whole)
        q_NV.scatter_(-1, self.ids_NK, found.by_log_q_NB[:, :-1] - head.exp() * whole)
        return found.value_N


class CutHead(NamedTuple):
    """The likeliest tokens alone. Biased: what the student gives to all others is not seen.

    `renormalised` scales both heads to 1; otherwise the others are left out of the sum, whatever their mass.
    """

    ids_NK: Tensor
    log_p_NK: Tensor
    renormalised: bool

    def pull_(self, log_q_NV: Tensor, measure: Measure) -> Tensor:
        """See `Known`."""
        log_p, log_q = self.log_p_NK, log_q_NV.gather(-1, self.ids_NK)
        if self.renormalised:
            log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
        found = measure(log_p.clamp_min(FLOOR), log_q.clamp_min(FLOOR))
        if self.renormalised:
            log_q_NV.zero_().scatter_(-1, self.ids_NK, through_softmax(found.by_log_q_NB, log_q.exp()))
        else:
            whole = found.by_log_q_NB.sum(-1, keepdim=True)
            log_q_NV.exp_().mul_(-whole).scatter_add_(-1, self.ids_NK, found.by_log_q_NB)
        return found.value_N


class Drawn(NamedTuple):
    """Unbiased shares of single tokens: token `id_E` of row `row_E` has share `share_E`; a row's shares add up to 1.

    The rows' value is the cross-entropy -sum(share * log q), of which forward KL differs by the teacher's entropy; its
    gradient q - share is forward KL's in expectation (Anshumann et al. 2025, section 4).
    """

    row_E: Tensor
    id_E: Tensor
    share_E: Tensor

    def pull_(self, log_q_NV: Tensor, measure: Measure) -> Tensor:
        """See `Known`; `measure` is forward KL, the only one that drawn tokens give without bias."""
        value = log_q_NV.new_zeros(len(log_q_NV))
        value.index_add_(0, self.row_E, -self.share_E * log_q_NV[self.row_E, self.id_E])
        log_q_NV.exp_()
        log_q_NV.index_put_((self.row_E, self.id_E), -self.share_E, accumulate=True)
        return value


class Sampled(NamedTuple):
    """The drawn tokens themselves, one a row: the score-function estimate of reverse KL's gradient.

    A row costs log q(y) - log p(y), and its gradient is that cost times the gradient of log q(y).
    """

    token_N: Tensor
    log_p_N: Tensor

    def pull_(self, log_q_NV: Tensor, measure: Measure) -> Tensor:
        """See `Known`."""
        log_q = log_q_NV.gather(-1, self.token_N[:, None])[:, 0]
        cost = log_q - self.log_p_N
        log_q_NV.exp_().mul_(-cost[:, None])
        log_q_NV.scatter_add_(-1, self.token_N[:, None], cost[:, None])
        return cost


class Mixture(NamedTuple):
    """Several teachers: the weighted sum of their divergences, which for forward KL is that to their mixture."""

    parts: Sequence[Known]
    weights: Sequence[float]

    def pull_(self, log_q_NV: Tensor, measure: Measure) -> Tensor:
        """See `Known`."""
        value = log_q_NV.new_zeros(len(log_q_NV))
        gradient = torch.zeros_like(log_q_NV)
        for part, weight in zip(self.parts, self.weights, strict=True):
            own = log_q_NV.clone()
            value += weight * part.pull_(own, measure)
            gradient.add_(own, alpha=weight)
        log_q_NV.copy_(gradient)
        return value


class Masked(NamedTuple):
    """Rows of which some (`seen_N` false) have no target: they add nothing, neither loss nor gradient."""

    known: Known
    seen_N: Tensor

    def pull_(self, log_q_NV: Tensor, measure: Measure) -> Tensor:
        """See `Known`."""
        value = self.known.pull_(log_q_NV, measure)
        log_q_NV.mul_(self.seen_N[:, None])
        return torch.where(self.seen_N, value, value.new_zeros(()))


# --- the loss -------------------------------------------------------------------------------------------------------


def distillation_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    teacher: Targets,
    mix: Mix,
    chunk: int = CHUNK_ROWS,
) -> Losses:
    """The sum over rows of weight * (kd * T**2 * D(teacher, student) + ce * -log q[target]), and each row's -log q.

    hidden [N, H] are the student's final hidden states of supervised rows, weight [V, H] its head, targets int64 [N],
    weights [N]. D is over softmax(logits / T) of the tokens that both models have; the cross-entropy is at T = 1 over
    all rows of the head. The factor T**2 keeps gradients of one size whatever T is (Hinton et al. 2015, section 2).
    Reductions are in fp32 at least; neither result nor gradients depend on `chunk` beyond rounding.
    """
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    nll_N = torch.empty(len(targets_N), dtype=wide, device=hidden_NH.device)

    def to_gradient(logits_NV: Tensor, start: int) -> Tensor:
        total = torch.zeros((), dtype=wide, device=logits_NV.device)
        known = teacher.chunk(start, start + len(logits_NV))
        for band in bands(logits_NV, WIDE_ROWS):
            first, last = start + band.start, start + band.stop
            total += _band_to_gradient(
                logits_NV[band],
                targets_N[first:last],
                weights_N[first:last].to(wide),
                known.at(band.start, band.stop),
                teacher.vocabulary,
                mix,
                nll_N[first:last],
            )
        return total

    return Losses(chunked(hidden_NH, weight_VH, to_gradient, chunk), nll_N)


def _band_to_gradient(
    narrow_NV: Tensor, targets_N: Tensor, weights_N: Tensor, known: Known, vocabulary: int, mix: Mix, nll_N: Tensor
) -> Tensor:
    """Turn a few rows of logits into their gradients in place and fill `nll_N`; returns their summed loss."""
    logits = narrow_NV.to(weights_N.dtype, copy=True)
    if mix.temperature == 1 and vocabulary == logits.shape[1]:  # one softmax serves both losses
        log_q = logits.log_softmax(-1)
        nll_N.copy_(-log_q.gather(-1, targets_N[:, None])[:, 0])
        by_text = less_onehot_(logits.copy_(log_q).exp_(), targets_N) if mix.ce else None
    else:
        log_q = (logits[:, :vocabulary] / mix.temperature).log_softmax(-1)
        nll_N.copy_(nll_to_gradient(logits, targets_N))
        by_text = logits
    value = known.pull_(log_q, mix.measure)
    # d/d logits of T**2 * D(logits / T) is T * the gradient by logits / T
    pull = log_q.mul_((weights_N * (mix.kd * mix.temperature))[:, None])
    if by_text is None:
        narrow_NV.copy_(pull)
    else:
        gradient = by_text.mul_((weights_N * mix.ce)[:, None])
        gradient[:, :vocabulary].add_(pull)
        narrow_NV.copy_(gradient)
    return (weights_N * (mix.kd * mix.temperature**2 * value + mix.ce * nll_N)).sum()


class Logits(NamedTuple):
    """A teacher's logits of some rows, over the tokens that both models have."""

    logits_NV: Tensor
    temperature: float

    @property
    def vocabulary(self) -> int:
        """See `Targets`."""
        return self.logits_NV.shape[1]

    def chunk(self, start: int, end: int) -> "Logits":
        """See `Targets`."""
        return Logits(self.logits_NV[start:end], self.temperature)

    def at(self, start: int, end: int) -> Dense:
        """See `Targets`."""
        logits = self.logits_NV[start:end]
        return Dense((logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature).log_softmax(-1))


class InMemory(NamedTuple):
    """The targets of a teacher beside the student: its final hidden states at the rows, and its head.

    Its logits are made chunk by chunk.
    """

    hidden_NH: Tensor
    weight_VH: Tensor
    vocabulary: int
    temperature: float
    ends: tuple[int, int] | None = None
    """End tokens of student and teacher where they differ; see `distill.vocabularies.exchange_`."""

    def chunk(self, start: int, end: int) -> Logits:
        """See `Targets`."""
        logits = product(self.hidden_NH[start:end], self.weight_VH[: self.vocabulary].T)
        return Logits(exchange_(logits, self.ends), self.temperature)

    def at(self, start: int, end: int) -> Known:
        """See `Targets`."""
        return self.chunk(start, end).at(0, end - start)


class DrawnBy(NamedTuple):
    """The tokens that the student has drawn, and a teacher that says what each costs: for `sampled_reverse_kl`."""

    teacher: Targets
    tokens_N: Tensor

    @property
    def vocabulary(self) -> int:
        """See `Targets`."""
        return self.teacher.vocabulary

    def chunk(self, start: int, end: int) -> "DrawnBy":
        """See `Targets`."""
        return DrawnBy(self.teacher.chunk(start, end), self.tokens_N[start:end])

    def at(self, start: int, end: int) -> Sampled:
        """See `Targets`."""
        known = self.teacher.at(start, end)
        assert isinstance(known, Dense)  # of a teacher in memory
        tokens = self.tokens_N[start:end]
        return Sampled(tokens, known.log_p_NV.gather(-1, tokens[:, None])[:, 0])


class Together(NamedTuple):
    """Several teachers' targets, each with its weight."""

    teachers: Sequence[Targets]
    weights: Sequence[float]

    @property
    def vocabulary(self) -> int:
        """See `Targets`."""
        return min(one.vocabulary for one in self.teachers)

    def chunk(self, start: int, end: int) -> "Together":
        """See `Targets`."""
        return Together([one.chunk(start, end) for one in self.teachers], self.weights)

    def at(self, start: int, end: int) -> Known:
        """See `Targets`."""
        return Mixture([one.at(start, end) for one in self.teachers], self.weights)
