"""Divergences between a teacher's and a student's distribution, with gradients in closed form.

Every function takes log-probabilities over the same outcomes, `log_p` of the teacher and `log_q` of the student, both
[N, B] in fp32 at least, and gives each row's divergence in nats, [N], with g = q * dD/dq, [N, B], the derivative by the
student's probabilities as if they were free. What an outcome is, a token or a bucket of tokens, is the caller's:
`through_softmax` takes g to the logits. Outcomes that are masked have log-probability FLOOR on both sides.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = -80.0
"""Log-probability that stands for zero: exp(-80) is 2e-35, which fp32 still holds and no sum notices."""


class Divergence(NamedTuple):
    """A divergence of each row, and what its gradient is made of."""

    value_N: Tensor
    by_log_q_NB: Tensor
    """q * dD/dq."""


Measure = Callable[[Tensor, Tensor], Divergence]


def through_softmax(by_log_q_NB: Tensor, q_NB: Tensor) -> Tensor:
    """The gradient by logits of which q is the softmax: g - q * sum(g)."""
    return by_log_q_NB - q_NB * by_log_q_NB.sum(-1, keepdim=True)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Divergence:
    """KL(teacher || student): covers all that the teacher may say (Hinton et al. 2015)."""
    p = log_p.exp()
    return Divergence((p * (log_p - log_q)).sum(-1), -p)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Divergence:
    """KL(student || teacher): keeps to what the teacher would say (Gu et al. 2024, MiniLLM, eq. 1)."""
    q = log_q.exp()
    costs = q * (log_q - log_p)
    return Divergence(costs.sum(-1), costs + q)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Divergence:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (Agarwal et al. 2024, GKD, eq. 1)."""
    p, q = log_p.exp(), log_q.exp()
    log_m = _log_mixture(p, q, beta)
    costs = (1 - beta) * q * (log_q - log_m)
    # by q of the rest: (1 - beta) - (1 - beta) * (beta p + (1 - beta) q) / m = 0
    return Divergence((beta * p * (log_p - log_m)).sum(-1) + costs.sum(-1), costs)


def skewed_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Divergence:
    """KL(p || skew p + (1 - skew) q) (Ko et al. 2024, DistiLLM, section 3.1)."""
    p, q = log_p.exp(), log_q.exp()
    log_m = _log_mixture(p, q, skew)
    return Divergence((p * (log_p - log_m)).sum(-1), -(1 - skew) * q * (log_p - log_m).exp())


def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Divergence:
    """KL(q || skew q + (1 - skew) p) (Ko et al. 2024, DistiLLM, section 3.1)."""
    p, q = log_p.exp(), log_q.exp()
    log_m = _log_mixture(p, q, 1 - skew)
    costs = q * (log_q - log_m)
    return Divergence(costs.sum(-1), costs + q - skew * q * (log_q - log_m).exp())


def taid(log_p: Tensor, log_q: Tensor, share: float) -> Divergence:
    """KL(r || q) with r = softmax((1 - share) log q + share log p), held fixed (Shing et al. 2025, TAID, eq. 3)."""
    log_r = torch.log_softmax(torch.lerp(log_q, log_p, share), dim=-1)
    return forward_kl(log_r, log_q)


def _log_mixture(p: Tensor, q: Tensor, of_p: float) -> Tensor:
    """log(of_p * p + (1 - of_p) * q), from FLOOR on."""
    return (of_p * p + (1 - of_p) * q).log().clamp_min(FLOOR)
