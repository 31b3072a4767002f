"""Cross-entropy in chunks: the same numbers and the same gradients as dense PyTorch, in less memory."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distill.students import losses
from distill.students.losses import cross_entropy, row_losses

ROWS, HIDDEN, VOCABULARY = 150, 6, 17
CHUNKS = [1, 7, ROWS]
TERMS = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.02), (0.3, 0.05)]
"""Label smoothing and z-loss."""


class Inputs(NamedTuple):
    hidden: Any
    weight: Any
    targets: Any
    weights: Any

    @property
    def leaves(self) -> tuple[Any, Any]:
        return self.hidden, self.weight


def inputs(dtype: Any = torch.float64, scale: float = 3.0, rows: int = ROWS) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    weights = torch.tensor([0.25, 0.5, 3.0, 1.0])[torch.randint(4, (rows,), generator=generator)]
    return Inputs(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, weights)


def dense_loss(given: Inputs, smoothing: float = 0.0, z_loss: float = 0.0, weighted: bool = True) -> Any:
    """The same with torch's own functions on all logits at once."""
    logits = given.hidden @ given.weight.T
    rows = F.cross_entropy(logits, given.targets, reduction="none", label_smoothing=smoothing)
    rows = rows + z_loss * logits.logsumexp(-1).square()
    return (rows * given.weights if weighted else rows).sum()


def gradients(loss: Any, *leaves: Any) -> list[Any]:
    return list(torch.autograd.grad(loss, leaves))


def largest(ours: list[Any], theirs: list[Any]) -> float:
    return max(float((a.double() - b.double()).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


# --- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
def test_value_and_both_gradients_are_those_of_dense_cross_entropy(chunk: int) -> None:
    given = inputs()
    ours = cross_entropy(given.hidden, given.weight, given.targets, chunk=chunk).total
    dense = F.cross_entropy(given.hidden @ given.weight.T, given.targets, reduction="sum")
    assert ours.dtype == torch.float64
    assert abs(float((ours - dense).detach())) < 1e-10
    # the same through a scale, as a mean or a second loss beside it would apply one
    expected = gradients(dense * -0.37, *given.leaves)
    assert largest(gradients(ours * -0.37, *given.leaves), expected) < 1e-12


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("smoothing", "z_loss"), TERMS)
def test_weights_smoothing_and_z_loss_are_those_of_dense_pytorch(smoothing: float, z_loss: float, chunk: int) -> None:
    given = inputs()
    ours = cross_entropy(*given, smoothing, z_loss, chunk).total
    dense = dense_loss(given, smoothing, z_loss)
    assert abs(float((ours - dense).detach())) < 1e-9
    expected = gradients(dense, *given.leaves)
    assert largest(gradients(ours, *given.leaves), expected) < 1e-11
    # each of the three terms moves the gradient by far more than that
    without = [dense_loss(given, smoothing, z_loss, weighted=False)]
    without += [dense_loss(given, 0, z_loss)] * bool(smoothing) + [dense_loss(given, smoothing, 0)] * bool(z_loss)
    assert all(largest(gradients(other, *given.leaves), expected) > 1e-2 for other in without)


@pytest.mark.parametrize("chunk", [1, 7, 11])
@pytest.mark.parametrize(("smoothing", "z_loss"), TERMS)
def test_gradients_are_those_of_finite_differences(smoothing: float, z_loss: float, chunk: int) -> None:
    given = inputs(rows=11)

    def total(hidden: Any, weight: Any) -> Any:
        return cross_entropy(hidden, weight, given.targets, given.weights, smoothing, z_loss, chunk).total

    assert torch.autograd.gradcheck(total, given.leaves)


@pytest.mark.parametrize("band", [1, 4, 10_000])
def test_how_many_rows_are_reduced_together_changes_nothing(band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs()
    monkeypatch.setattr(losses, "BAND_ROWS", band)
    found = cross_entropy(*given, 0.1, 0.02, 13)
    dense = dense_loss(given, 0.1, 0.02)
    assert abs(float((found.total - dense).detach())) < 1e-9
    assert largest(gradients(found.total, *given.leaves), gradients(dense, *given.leaves)) < 1e-11
    assert largest([found.nll_N], [dense_rows(given)]) < 1e-12


def test_two_tokens_by_hand() -> None:
    # logits (ln 3, 0): p = 3/4, 1/4. Targets 0 and 1: loss = ln(4/3) + ln 4; d loss / d logits = p - onehot
    hidden = torch.tensor([[math.log(3.0)], [math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64, requires_grad=True)
    found = cross_entropy(hidden, weight, torch.tensor([0, 1]))
    assert found.total.item() == pytest.approx(math.log(4 / 3) + math.log(4), abs=1e-15)
    assert found.nll_N.tolist() == pytest.approx([math.log(4 / 3), math.log(4)], abs=1e-15)
    by_hidden, by_weight = gradients(found.total, hidden, weight)
    assert by_hidden.flatten().tolist() == pytest.approx([-0.25, 0.75])
    # rows of the weight: ln 3 * (sum over tokens of p - onehot) = ln 3 * (+0.5, -0.5)
    assert by_weight.flatten().tolist() == pytest.approx([0.5 * math.log(3), -0.5 * math.log(3)])


def test_one_weighted_smoothed_token_with_z_loss_by_hand() -> None:
    hidden = torch.tensor([[math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    found = cross_entropy(hidden, weight, torch.tensor([0]), torch.tensor([3.0]), 0.2, 0.01)
    # 0.8 of the target and half of the other 0.2 fall on token 0; the normaliser is 4
    expected = 3 * (0.9 * math.log(4 / 3) + 0.1 * math.log(4) + 0.01 * math.log(4) ** 2)
    assert found.total.item() == pytest.approx(expected, abs=1e-14)
    assert found.nll_N.item() == pytest.approx(math.log(4 / 3), abs=1e-15), "what is reported is the plain one"
    # by the logit of token 0, which is the hidden state itself: 3 * (3/4 * (1 + 0.02 ln 4) - 0.9)
    assert gradients(found.total, hidden)[0].item() == pytest.approx(3 * (0.75 * (1 + 0.02 * math.log(4)) - 0.9))


def test_rows_without_weight_are_reported_and_teach_nothing() -> None:
    given = inputs()
    weights = given.weights.clone()
    weights[::3] = 0
    found = cross_entropy(given.hidden, given.weight, given.targets, weights, 0.1, 0.02, 7)
    kept = weights > 0
    others = given._replace(hidden=given.hidden[kept], targets=given.targets[kept], weights=given.weights[kept])
    assert abs(float((found.total - dense_loss(others, 0.1, 0.02)).detach())) < 1e-10
    assert not gradients(found.total, given.hidden)[0][::3].any()
    assert (found.nll_N > 0).all()


def test_no_rows_is_no_loss() -> None:
    given = inputs()
    found = cross_entropy(given.hidden[:0], given.weight, given.targets[:0])
    assert found.total.item() == 0 and not gradients(found.total, given.weight)[0].any() and found.nll_N.shape == (0,)


# --- rows -----------------------------------------------------------------------------------------------------------


def dense_rows(given: Inputs) -> Any:
    chosen = torch.log_softmax(given.hidden @ given.weight.T, -1).gather(-1, given.targets[:, None])
    return -chosen.detach().squeeze(-1)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("smoothing", "z_loss"), TERMS)
def test_rows_are_dense_log_softmax_whatever_the_loss_adds(smoothing: float, z_loss: float, chunk: int) -> None:
    given = inputs()
    found = cross_entropy(*given, smoothing, z_loss, chunk)
    assert largest([found.nll_N], [dense_rows(given)]) < 1e-12
    assert found.total.requires_grad and not found.nll_N.requires_grad


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_measured_without_gradients_are_those_of_training(dtype: Any, chunk: int) -> None:
    given = inputs(dtype)
    measured = row_losses(given.hidden, given.weight, given.targets, chunk)
    trained = cross_entropy(*given, chunk=chunk).nll_N
    assert measured.dtype == trained.dtype == torch.promote_types(dtype, torch.float32)
    assert not measured.requires_grad
    assert largest([measured], [trained]) < (1e-12 if dtype == torch.float64 else 1e-4)


# --- precision ------------------------------------------------------------------------------------------------------


def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    given = inputs(torch.float32, scale=1e4)
    ours = cross_entropy(given.hidden, given.weight, given.targets, chunk=7).total
    dense = F.cross_entropy(given.hidden.double() @ given.weight.double().T, given.targets, reduction="sum")
    assert torch.isfinite(ours) and ours.item() == pytest.approx(dense.item(), rel=1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(ours, *given.leaves))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_bf16_inputs_are_reduced_in_fp32(chunk: int) -> None:
    given = inputs(torch.bfloat16)
    ours = cross_entropy(given.hidden, given.weight, given.targets, chunk=chunk).total
    # the logits of a bf16 product, taken as exact from there on
    logits = (given.hidden @ given.weight.T).double()
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(F.cross_entropy(logits, given.targets, reduction="sum").item(), rel=1e-6)
    by_hidden, by_weight = gradients(ours, *given.leaves)
    assert by_hidden.dtype == by_weight.dtype == torch.bfloat16
    exact = given._replace(
        **{name: getattr(given, name).detach().double().requires_grad_() for name in Inputs._fields[:2]}
    )
    expected = gradients(dense_loss(exact, weighted=False), *exact.leaves)
    assert largest([by_hidden], expected[:1]) < 0.1, "bf16 keeps three digits"
    assert float((by_weight - expected[1]).norm() / expected[1].norm()) < 0.01


def test_gradients_of_many_chunks_are_added_up_in_fp32() -> None:
    """Each row adds a gradient of 2**-9 to a head whose first row brought 1: in bf16 all of them would be lost."""
    rows = 1 + 512
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)  # p = 1/2: the gradient is hidden / 2
    hidden = torch.full((rows, 1), 2.0**-8, dtype=torch.bfloat16)
    hidden[0] = 2.0
    found = cross_entropy(hidden, weight, torch.zeros(rows, dtype=torch.long), chunk=1)
    assert gradients(found.total, weight)[0].flatten().tolist() == [-2.0, 2.0]


# --- memory ---------------------------------------------------------------------------------------------------------


class Saved:
    """The largest number of elements that autograd keeps between forward and backward."""

    def __init__(self) -> None:
        self.largest = 0

    def __call__(self, tensor: Any) -> Any:
        self.largest = max(self.largest, tensor.numel())
        return tensor


class Made(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_nothing_as_large_as_rows_times_vocabulary_is_kept_for_the_backward_pass() -> None:
    given = inputs()
    ours, theirs = Saved(), Saved()
    with torch.autograd.graph.saved_tensors_hooks(ours, lambda tensor: tensor):
        cross_entropy(*given, 0.1, 0.02, 7)
    with torch.autograd.graph.saved_tensors_hooks(theirs, lambda tensor: tensor):
        dense_loss(given, 0.1, 0.02)
    assert ours.largest == max(ROWS, VOCABULARY) * HIDDEN < ROWS * VOCABULARY
    assert theirs.largest >= ROWS * VOCABULARY, "the check sees what dense cross-entropy keeps"


def test_the_logits_of_all_rows_never_exist_at_once() -> None:
    given = inputs()
    with Made() as ours:
        cross_entropy(*given, 0.1, 0.02, 7).total.backward()
    with Made() as measuring:
        row_losses(given.hidden, given.weight, given.targets, 7)
    with Made() as theirs:
        dense_loss(given, 0.1, 0.02).backward()
    assert ours.largest == ROWS * HIDDEN, "the gradient of the hidden states"
    assert measuring.largest == ROWS, "the result"
    assert theirs.largest == ROWS * VOCABULARY, "the check sees dense logits"
