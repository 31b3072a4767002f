"""The distillation loss against dense formulas written out with autograd, and against exact expectations."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from distill.students import divergences
from distill.students.distillation import (
    CutHead,
    Dense,
    Drawn,
    DrawnBy,
    Head,
    InMemory,
    Known,
    Logits,
    Masked,
    Mix,
    Sampled,
    Together,
    distillation_loss,
)

ROWS, WIDTH, VOCABULARY = 11, 6, 9


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Any:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(log_p: Any, log_q: Any) -> Any:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def mixed(of_p: float, log_p: Any, log_q: Any) -> Any:
    return torch.logaddexp(log_p + math.log(of_p), log_q + math.log(1 - of_p))


def dense_jsd(log_p: Any, log_q: Any, beta: float) -> Any:
    log_m = mixed(beta, log_p, log_q)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def dense_taid(log_p: Any, log_q: Any, share: float) -> Any:
    return kl(((1 - share) * log_q.detach() + share * log_p).log_softmax(-1), log_q)


CASES: dict[str, tuple[divergences.Measure, Callable[[Any, Any], Any]]] = {
    "forward_kl": (divergences.forward_kl, kl),
    "reverse_kl": (divergences.reverse_kl, lambda p, q: kl(q, p)),
    "jsd": (partial(divergences.jsd, beta=0.3), partial(dense_jsd, beta=0.3)),
    "skewed_kl": (partial(divergences.skewed_kl, skew=0.1), lambda p, q: kl(p, mixed(0.1, p, q))),
    "skewed_reverse_kl": (partial(divergences.skewed_reverse_kl, skew=0.1), lambda p, q: kl(q, mixed(0.9, p, q))),
    "taid": (partial(divergences.taid, share=0.4), partial(dense_taid, share=0.4)),
}
"""Each divergence as the trainer computes it, and by torch's own operators with autograd."""


class Setup(NamedTuple):
    hidden: Any
    weight: Any
    targets: Any
    weights: Any
    teacher_logits: Any


def setup(vocabulary: int = VOCABULARY) -> Setup:
    weights = torch.linspace(0.5, 2.0, ROWS, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(5))
    return Setup(
        drawn(ROWS, WIDTH).requires_grad_(),
        drawn(vocabulary, WIDTH, seed=1).requires_grad_(),
        targets,
        weights,
        drawn(ROWS, VOCABULARY, seed=2, scale=2.0),
    )


def dense_loss(given: Setup, measure: Callable[[Any, Any], Any], mix: Mix) -> Any:
    """kd * T**2 * D + ce * cross-entropy, on all logits at once."""
    logits = given.hidden @ given.weight.T
    log_q = (logits[:, :VOCABULARY] / mix.temperature).log_softmax(-1)
    log_p = (given.teacher_logits / mix.temperature).log_softmax(-1)
    rows = mix.kd * mix.temperature**2 * measure(log_p, log_q)
    rows = rows + mix.ce * F.cross_entropy(logits, given.targets, reduction="none")
    return (given.weights * rows).sum()


def both(total: Any, given: Setup) -> list[Any]:
    return [total.detach(), *torch.autograd.grad(total, (given.hidden, given.weight))]


def close(ours: Sequence[Any], theirs: Sequence[Any], tolerance: float = 1e-11) -> bool:
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(ours, theirs, strict=True))


# --- every divergence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ce", [0.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_loss_and_gradients_are_those_of_the_dense_formula(
    name: str, temperature: float, ce: float, chunk: int
) -> None:
    given, (ours, theirs) = setup(), CASES[name]
    mix = Mix(ours, temperature, kd=0.6, ce=ce)
    found = distillation_loss(*given[:4], Logits(given.teacher_logits, temperature), mix, chunk)
    assert close(both(found.total, given), both(dense_loss(given, theirs, mix), given))
    nll = F.cross_entropy(given.hidden @ given.weight.T, given.targets, reduction="none")
    assert torch.allclose(found.nll_N, nll, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name != "taid"])  # its target is held fixed
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_pass_gradcheck(name: str, temperature: float) -> None:
    given, mix = setup(), Mix(CASES[name][0], temperature, ce=0.3)

    def loss(hidden: Any, weight: Any) -> Any:
        teacher = Logits(given.teacher_logits, temperature)
        return distillation_loss(hidden, weight, given.targets, given.weights, teacher, mix).total

    assert torch.autograd.gradcheck(loss, (given.hidden, given.weight))


def test_a_wrong_sign_would_be_found() -> None:
    given = setup()
    wrong = lambda p, q: divergences.Divergence(*(-part for part in divergences.forward_kl(p, q)))  # noqa: E731
    found = distillation_loss(*given[:4], Logits(given.teacher_logits, 1.0), Mix(wrong))
    assert not close(both(found.total, given), both(dense_loss(given, kl, Mix(divergences.forward_kl)), given))


@pytest.mark.parametrize("name", CASES)
def test_a_student_that_is_the_teacher_loses_nothing(name: str) -> None:
    given = setup()
    same = Logits((given.hidden @ given.weight.T).detach(), 1.0)
    total, *gradients = both(distillation_loss(*given[:4], same, Mix(CASES[name][0])).total, given)
    assert abs(float(total)) < 1e-12 and all(float(gradient.abs().max()) < 1e-12 for gradient in gradients)


@pytest.mark.parametrize("name", CASES)
def test_divergences_are_never_negative_and_finite_where_one_side_has_nothing(name: str) -> None:
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    q = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    found = CASES[name][0](p.log().clamp_min(divergences.FLOOR), q.log().clamp_min(divergences.FLOOR))
    assert torch.isfinite(found.value_N).all() and torch.isfinite(found.by_log_q_NB).all()
    assert (found.value_N > -1e-12).all() and abs(float(found.value_N[1])) < 1e-12


def test_forward_kl_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]], dtype=torch.float64), torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    found = divergences.forward_kl(p.log(), q.log())
    assert math.isclose(float(found.value_N[0]), 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert torch.allclose(divergences.through_softmax(found.by_log_q_NB, q), q - p)


# --- padded vocabularies --------------------------------------------------------------------------------------------


def test_rows_beyond_the_shared_vocabulary_take_no_part() -> None:
    """Heads of 151,936 and of 152,064 rows may belong to one tokenizer."""
    padded, mix = setup(VOCABULARY + 3), Mix(divergences.forward_kl)
    teacher = InMemory(drawn(ROWS, 4, seed=3), drawn(VOCABULARY + 5, 4, seed=4), VOCABULARY, 1.0)
    found = distillation_loss(*padded[:4], teacher, mix)
    by_weight = both(found.total, padded)[2]
    logits = teacher.hidden_NH @ teacher.weight_VH[:VOCABULARY].T
    cut = padded._replace(weight=padded.weight.detach()[:VOCABULARY].requires_grad_(), teacher_logits=logits)
    expected = both(dense_loss(cut, kl, mix), cut)
    assert close(both(distillation_loss(*padded[:4], teacher, mix).total, padded)[:2], expected[:2])
    assert float(by_weight[VOCABULARY:].abs().max()) == 0


# --- the head and its bucket ----------------------------------------------------------------------------------------


class Of(NamedTuple):
    """Targets that know the same of every row, for tests: a function from rows to what is known."""

    vocabulary: int
    known: Callable[[int, int], Known]
    first: int = 0

    def chunk(self, start: int, end: int) -> "Of":
        return self._replace(first=self.first + start)

    def at(self, start: int, end: int) -> Known:
        return self.known(self.first + start, self.first + end)


def head_of(log_p: Any, k: int, kind: Callable[..., Known] = Head) -> Of:
    top = log_p.topk(k, -1)
    rest = log_p.scatter(-1, top.indices, -torch.inf).logsumexp(-1)

    def known(start: int, end: int) -> Known:
        rows = slice(start, end)
        return kind(top.indices[rows], top.values[rows], rest[rows])

    return Of(log_p.shape[1], known)


@pytest.mark.parametrize("name", [name for name in CASES if name != "taid"])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_with_all_tokens_in_the_head_the_bucket_is_the_dense_loss(name: str, chunk: int) -> None:
    given, mix = setup(), Mix(CASES[name][0], 1.0, ce=0.2)
    head = head_of(given.teacher_logits.log_softmax(-1), VOCABULARY)
    found = distillation_loss(*given[:4], head, mix, chunk)
    assert close(both(found.total, given), both(dense_loss(given, CASES[name][1], mix), given), 1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if name != "taid"])
@pytest.mark.parametrize("k", [1, 3, VOCABULARY - 1])
def test_the_bucket_is_the_divergence_of_the_partition_and_never_above_the_dense_one(name: str, k: int) -> None:
    given, mix = setup(), Mix(CASES[name][0])
    log_p = given.teacher_logits.log_softmax(-1)
    chosen = log_p.topk(k, -1).indices

    def partition(log_p: Any, log_q: Any) -> Any:
        def cut(log: Any) -> Any:
            rest = log.exp().scatter(-1, chosen, 0.0).sum(-1, keepdim=True).log()
            return torch.cat([log.gather(-1, chosen), rest], -1)

        return CASES[name][1](cut(log_p), cut(log_q))

    found = both(distillation_loss(*given[:4], head_of(log_p, k), mix).total, given)
    assert close(found, both(dense_loss(given, partition, mix), given))
    assert float(found[0]) <= float(dense_loss(given, CASES[name][1], mix).detach()) + 1e-12


@given(st.integers(1, VOCABULARY), st.integers(0, 10_000))
def test_a_larger_head_never_lowers_forward_kl(k: int, seed: int) -> None:
    log_p, log_q = (drawn(1, VOCABULARY, seed=seed + i, scale=3.0).log_softmax(-1) for i in (0, 1))
    values = []
    for size in range(k, VOCABULARY + 1):
        known = head_of(log_p, size).at(0, 1)
        values.append(float(known.pull_(log_q.clone(), divergences.forward_kl)[0]))
    assert all(a <= b + 1e-12 for a, b in zip(values, values[1:]))
    assert math.isclose(values[-1], float(kl(log_p, log_q)[0]), abs_tol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name != "taid"])
@pytest.mark.parametrize("renormalised", [True, False])
def test_cut_heads_are_what_their_names_say(renormalised: bool, name: str) -> None:
    given, mix = setup(), Mix(CASES[name][0])
    log_p = given.teacher_logits.log_softmax(-1)
    chosen = log_p.topk(3, -1).indices

    def cut(log_p: Any, log_q: Any) -> Any:
        own, theirs = log_p.gather(-1, chosen), log_q.gather(-1, chosen)
        if renormalised:
            own, theirs = own.log_softmax(-1), theirs.log_softmax(-1)
        return plain(own, theirs)

    def plain(log_p: Any, log_q: Any) -> Any:
        """The divergence's sum over the tokens it is given, whether they are all or not."""
        return CASES[name][1](log_p, log_q)

    kind = lambda ids, values, _: CutHead(ids, values, renormalised)  # noqa: E731
    found = both(distillation_loss(*given[:4], head_of(log_p, 3, kind), mix).total, given)
    assert close(found, both(dense_loss(given, cut, mix), given))
    exact = both(dense_loss(given, CASES[name][1], mix), given)
    assert not close(found[1:], exact[1:], 1e-3), "they are biased, which is why their names say so"


# --- drawn tokens ---------------------------------------------------------------------------------------------------


def pull(known: Known, log_q: Any) -> tuple[Any, Any]:
    gradient = log_q.clone()
    return known.pull_(gradient, divergences.forward_kl), gradient


def counts_of(tokens: Sequence[int], draws: int) -> Drawn:
    ids = sorted(set(tokens))
    shares = torch.tensor([tokens.count(token) / draws for token in ids], dtype=torch.float64)
    return Drawn(torch.zeros(len(ids), dtype=torch.int64), torch.tensor(ids), shares)


def test_drawn_tokens_are_exactly_unbiased_over_all_that_may_be_drawn() -> None:
    log_p, log_q = drawn(1, 4, seed=1).log_softmax(-1), drawn(1, 4, seed=2).log_softmax(-1)
    p, mean_value, mean_gradient = log_p.exp()[0], 0.0, torch.zeros(1, 4, dtype=torch.float64)
    for tokens in itertools.product(range(4), repeat=3):
        chance = float(torch.stack([p[token] for token in tokens]).prod())
        value, gradient = pull(counts_of(tokens, 3), log_q)
        mean_value += chance * float(value[0])
        mean_gradient += chance * gradient
    assert torch.allclose(mean_gradient, log_q.exp() - log_p.exp(), atol=1e-14)
    entropy = -float((p * log_p[0]).sum())
    assert math.isclose(mean_value - entropy, float(kl(log_p, log_q)[0]), abs_tol=1e-14)


def test_an_exact_head_with_a_drawn_tail_is_exactly_unbiased() -> None:
    log_p, log_q = drawn(1, 5, seed=1).log_softmax(-1), drawn(1, 5, seed=2).log_softmax(-1)
    p = log_p.exp()[0]
    head = p.topk(2).indices.tolist()
    tail = [token for token in range(5) if token not in head]
    mass = float(p[tail].sum())
    mean = torch.zeros(1, 5, dtype=torch.float64)
    for tokens in itertools.product(tail, repeat=2):
        chance = float(torch.stack([p[token] / mass for token in tokens]).prod())
        ids = [*head, *sorted(set(tokens))]
        shares = [float(p[token]) for token in head] + [mass * tokens.count(t) / 2 for t in sorted(set(tokens))]
        known = Drawn(torch.zeros(len(ids), dtype=torch.int64), torch.tensor(ids), torch.tensor(shares).double())
        mean += chance * pull(known, log_q)[1]
    assert torch.allclose(mean, log_q.exp() - log_p.exp(), atol=1e-7)  # shares are fp32 here, as in a cache


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_drawn_tokens_of_many_rows_meet_their_own_rows(chunk: int) -> None:
    given, mix = setup(), Mix(divergences.forward_kl, ce=0.3)
    generator = torch.Generator().manual_seed(9)
    tokens = given.teacher_logits.softmax(-1).multinomial(20, replacement=True, generator=generator)
    shares = F.one_hot(tokens, VOCABULARY).double().mean(1)
    row, token = shares.nonzero(as_tuple=True)

    def known(start: int, end: int) -> Known:
        own = (row >= start) & (row < end)
        return Drawn(row[own] - start, token[own], shares[row[own], token[own]])

    def against_shares(_: Any, log_q: Any) -> Any:
        return -(shares * log_q).sum(-1)

    found = distillation_loss(*given[:4], Of(VOCABULARY, known), mix, chunk)
    assert close(both(found.total, given), both(dense_loss(given, against_shares, mix), given))


def test_the_cost_of_drawn_tokens_is_reverse_kl_in_expectation() -> None:
    log_p, log_q = drawn(1, 5, seed=1).log_softmax(-1), drawn(1, 5, seed=2).log_softmax(-1)
    mean_value, mean_gradient = 0.0, torch.zeros(1, 5, dtype=torch.float64)
    for token in range(5):
        value, gradient = pull(Sampled(torch.tensor([token]), log_p[:, token]), log_q)
        mean_value += float(log_q[0, token].exp() * value[0])
        mean_gradient += log_q[0, token].exp() * gradient
    exact = divergences.reverse_kl(log_p, log_q)
    assert math.isclose(mean_value, float(exact.value_N[0]), abs_tol=1e-14)
    assert torch.allclose(mean_gradient, divergences.through_softmax(exact.by_log_q_NB, log_q.exp()), atol=1e-14)


def test_targets_of_drawn_tokens_look_at_the_texts_own() -> None:
    given = setup()
    dense = Logits(given.teacher_logits, 1.0)
    found = distillation_loss(*given[:4], DrawnBy(dense, given.targets), Mix(divergences.reverse_kl), 4)
    log_q = (given.hidden @ given.weight.T).log_softmax(-1).gather(-1, given.targets[:, None])[:, 0]
    log_p = given.teacher_logits.log_softmax(-1).gather(-1, given.targets[:, None])[:, 0]
    cost = (log_q - log_p).detach()
    expected = both((given.weights * cost * log_q).sum(), given)
    total, *gradients = both(found.total, given)
    assert close(gradients, expected[1:]) and math.isclose(float(total), float((given.weights * cost).sum()))


# --- several teachers, rows without one -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [3, 1024])
def test_several_teachers_are_the_weighted_sum_and_for_forward_kl_their_mixture(chunk: int) -> None:
    given, mix = setup(), Mix(divergences.forward_kl)
    other = drawn(ROWS, VOCABULARY, seed=8)
    together = Together([Logits(given.teacher_logits, 1.0), Logits(other, 1.0)], [0.75, 0.25])
    found = both(distillation_loss(*given[:4], together, mix, chunk).total, given)
    log_mixture = mixed(0.75, given.teacher_logits.log_softmax(-1), other.log_softmax(-1))
    to_mixture = both(dense_loss(given._replace(teacher_logits=log_mixture), kl, mix), given)
    assert close(found[1:], to_mixture[1:])
    one = both(dense_loss(given, kl, mix), given)
    two = both(dense_loss(given._replace(teacher_logits=other), kl, mix), given)
    assert close(found, [0.75 * a + 0.25 * b for a, b in zip(one, two)])


@pytest.mark.parametrize("name", CASES)
def test_rows_without_a_target_add_nothing_and_stay_finite(name: str) -> None:
    given, mix = setup(), Mix(CASES[name][0], ce=0.5)
    seen = torch.arange(ROWS) % 3 != 0
    log_p = given.teacher_logits.log_softmax(-1)

    def known(start: int, end: int) -> Known:
        return Masked(Dense(log_p[start:end]), seen[start:end])

    found = both(distillation_loss(*given[:4], Of(VOCABULARY, known), mix).total, given)
    expected = dense_loss(given, lambda p, q: torch.where(seen, CASES[name][1](p, q), 0.0), mix)
    assert close(found, both(expected, given))


@pytest.mark.parametrize("kind", ["head", "drawn", "dense"])
def test_a_pass_without_any_target_is_finite(kind: str) -> None:
    given = setup()
    floor = torch.full((ROWS, VOCABULARY), -torch.inf, dtype=torch.float64)

    def known(start: int, end: int) -> Known:
        rows = slice(start, end)
        none = torch.zeros(end - start, dtype=torch.bool)
        if kind == "dense":
            return Masked(Dense(floor[rows]), none)
        if kind == "head":
            return Masked(Head(torch.zeros(end - start, 1, dtype=torch.int64), floor[rows, :1], floor[rows, 0]), none)
        empty = torch.zeros(0, dtype=torch.int64)
        return Masked(Drawn(empty, empty, torch.zeros(0, dtype=torch.float64)), none)

    found = both(distillation_loss(*given[:4], Of(VOCABULARY, known), Mix(divergences.forward_kl)).total, given)
    assert all(float(part.abs().max()) == 0 for part in found)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_no_tensor_of_all_rows_by_the_vocabulary_is_kept() -> None:
    given = setup()
    sizes: list[int] = []

    def pack(tensor: Any) -> Any:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        distillation_loss(*given[:4], Logits(given.teacher_logits, 1.0), Mix(CASES["jsd"][0]), 2)
    assert sizes and max(sizes) <= max(given.hidden.numel(), given.weight.numel()) < ROWS * VOCABULARY
