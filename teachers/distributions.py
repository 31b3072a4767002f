"""What is kept of a teacher's distribution: its likeliest tokens, tokens drawn from it, or both.

Draws are made by inverting the cumulative distribution in float64, with uniform numbers that follow from a seed and the
document alone; so neither batching nor shards nor a resume changes them, and every token has exactly its probability.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from distill.documents import Array
from distill.logprobs import Facts, Rows, empty_rows

SAMPLER = "inverse CDF in float64; Philox keyed by the first 16 bytes of sha256(seed as text, a colon, the key)"


def uniforms(seed: int, key: bytes, rows: int, draws: int) -> Array:
    """The random numbers of a document, in [0, 1): float64 [rows, draws]."""
    digest = hashlib.sha256(f"{seed}:".encode() + key).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.random((rows, draws))


def kept(log_p_NV: Tensor, uniforms_ND: Array | None, facts: Facts, names_V: Tensor | None = None) -> Rows:
    """What a form keeps of log-probabilities [N, V] in fp32; `uniforms_ND` for forms that draw.

    `names_V` says which of the student's tokens each column is, -1 for none: such columns count in the tail only.
    """
    rows = empty_rows(len(log_p_NV), facts.k)
    of_tail = log_p_NV
    if facts.k:
        head, tail, of_tail = likeliest(log_p_NV, facts.k, names_V)
        named = head.indices if names_V is None else names_V[head.indices]
        rows = rows._replace(
            head_ids=named.cpu().numpy(), head_log_p=head.values.cpu().numpy(), tail_log_p=tail.cpu().numpy()
        )
    if facts.draws:
        assert uniforms_ND is not None
        sizes, ids, counts = drawn(of_tail, uniforms_ND)
        rows = rows._replace(sizes=sizes, ids=ids, counts=counts)
    return rows


def likeliest(
    log_p_NV: Tensor, k: int, names_V: Tensor | None = None
) -> tuple[torch.return_types.topk, Tensor, Tensor]:
    """The k likeliest tokens, the log of the mass of all others, and the log-probabilities without the head.

    The tail is added up itself, in fp32: 1 - head would be rounding where it is small.
    """
    named = log_p_NV if names_V is None else log_p_NV.masked_fill(names_V < 0, -torch.inf)
    head = named.topk(k, dim=-1)
    rest = log_p_NV.scatter(-1, head.indices, -torch.inf)
    return head, torch.logsumexp(rest, -1), rest


def drawn(log_p_NV: Tensor, uniforms_ND: Array) -> tuple[Array, Array, Array]:
    """Tokens drawn with probabilities proportional to exp(log_p): how many each row has, their ids, their counts.

    A row without any mass has no draws.
    """
    steps = log_p_NV.exp().cumsum(-1, dtype=torch.float64)
    points = torch.from_numpy(uniforms_ND).to(steps.device) * steps[:, -1:]
    found = torch.searchsorted(steps, points, right=True).clamp_max_(log_p_NV.shape[1] - 1).sort(-1).values
    width = log_p_NV.shape[1]
    flat = (found + torch.arange(len(found), device=found.device)[:, None] * width)[steps[:, -1] > 0].flatten()
    tokens, counts = torch.unique_consecutive(flat, return_counts=True)
    sizes = torch.bincount(tokens // width, minlength=len(found))
    return sizes.cpu().numpy(), (tokens % width).cpu().numpy(), counts.cpu().numpy()
