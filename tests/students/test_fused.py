"""Lean norms and feed-forwards against autograd of transformers' own modules, and of the formulas written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from distill.config import Lora
from distill.students.adapters import with_adapters
from distill.students.fused import lean, rms_norm, swiglu_down

Live = Callable[..., Any]
FAMILIES = ("llama", "qwen2", "qwen3")
NORMS = (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
FEED_FORWARDS = (LlamaMLP, Qwen2MLP, Qwen3MLP)


def drawn(*shape: int, seed: int = 0, dtype: Any = torch.float64) -> Any:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).requires_grad_()


def value_and_gradients(function: Callable[..., Any], *leaves: Any) -> list[Any]:
    """The result and its gradients by the leaves, of a readout that weighs every element differently."""
    out = function(*leaves)
    readout = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view_as(out)
    return [out.detach(), *torch.autograd.grad((out.double() * readout).sum(), leaves)]


def largest(ours: list[Any], theirs: list[Any]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs, strict=True))


def errors(found: list[Any], exact: list[Any]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def exact_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """The formula written out; transformers' modules compute it in fp32 whatever they are given."""
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon)


# --- norm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (1, 4, 3, 8)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_norm_has_the_value_and_gradients_of_its_formula(shape: tuple[int, ...], scale: float) -> None:
    x, weight = (scale * drawn(*shape).detach()).requires_grad_(), drawn(8, seed=1)
    ours = value_and_gradients(lambda a, w: rms_norm(a, w, 1e-5), x, weight)
    theirs = value_and_gradients(lambda a, w: exact_norm(a, w, 1e-5), x, weight)
    assert all(error < 1e-13 for error in errors(ours, theirs))
    assert torch.autograd.gradcheck(lambda a, w: rms_norm(a, w, 1e-5), (drawn(*shape), weight))


def test_the_norm_by_hand() -> None:
    # mean of squares (9 + 16) / 2 = 12.5; with epsilon 3.5 the root is 4
    out = rms_norm(torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([8.0, -2.0]), 3.5)
    assert out.tolist() == [[6.0, -2.0]]


@pytest.mark.parametrize("kind", NORMS)
def test_in_fp32_the_norm_is_that_of_transformers(kind: Any) -> None:
    module = kind(64, eps=1e-6)
    x, weight = drawn(2, 7, 64, dtype=torch.float32), drawn(64, seed=1, dtype=torch.float32)
    module.weight = nn.Parameter(weight.detach().clone())
    theirs = value_and_gradients(lambda a, _: module(a), x, module.weight)
    ours = value_and_gradients(lambda a, w: rms_norm(a, w, 1e-6), x, weight)
    assert all(error < 1e-6 for error in errors(ours, [t.double() for t in theirs]))


def test_in_bf16_the_norm_is_as_close_to_its_formula_as_that_of_transformers() -> None:
    module = LlamaRMSNorm(64).bfloat16()
    x, weight = drawn(16, 33, 64, dtype=torch.bfloat16), drawn(64, seed=1, dtype=torch.bfloat16)
    module.weight = nn.Parameter(weight.detach().clone())
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = value_and_gradients(lambda a, w: exact_norm(a, w, 1e-6), *wide)
    ours = value_and_gradients(lambda a, w: rms_norm(a, w, 1e-6), x, weight)
    theirs = value_and_gradients(lambda a, _: module(a), x, module.weight)
    assert torch.equal(ours[0], theirs[0]), "rounded where Llama rounds"
    assert all(t.dtype == torch.bfloat16 for t in ours)
    for mine, reference in zip(errors(ours, exact), errors(theirs, exact), strict=True):
        assert mine < 0.01 and mine < 1.05 * reference


# --- feed-forward ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
def test_the_feed_forward_has_the_value_and_gradients_of_its_formula(biased: bool) -> None:
    leaves = [drawn(2, 5, 6, seed=1), drawn(2, 5, 6, seed=2), drawn(4, 6, seed=3)] + [drawn(4, seed=4)] * biased

    def ours(gate: Any, up: Any, weight: Any, bias: Any = None) -> Any:
        return swiglu_down(gate, up, weight, bias)

    def formula(gate: Any, up: Any, weight: Any, bias: Any = 0) -> Any:
        return (gate / (1 + torch.exp(-gate)) * up) @ weight.T + bias

    assert largest(value_and_gradients(ours, *leaves), value_and_gradients(formula, *leaves)) < 1e-13
    assert torch.autograd.gradcheck(ours, leaves)


def test_a_frozen_projection_still_passes_gradients_on() -> None:
    gate, up, weight = drawn(3, 6, seed=1), drawn(3, 6, seed=2), drawn(4, 6, seed=3).detach()
    ours = value_and_gradients(lambda g, u: swiglu_down(g, u, weight, None), gate, up)
    theirs = value_and_gradients(lambda g, u: F.linear(F.silu(g) * u, weight), gate, up)
    assert largest(ours, theirs) < 1e-13


def feed_forward(kind: Any, dtype: Any, bias: bool = False) -> Any:
    family = kind.__name__.removesuffix("MLP").lower()
    config = AutoConfig.for_model(family, hidden_size=32, intermediate_size=48, **({"mlp_bias": bias} if bias else {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "bias"), [*((kind, False) for kind in FEED_FORWARDS), (LlamaMLP, True)])
def test_a_lean_feed_forward_is_that_of_transformers(kind: Any, bias: bool, dtype: Any) -> None:
    module, x = feed_forward(kind, dtype, bias), drawn(2, 7, 32, dtype=dtype)
    theirs = value_and_gradients(lambda a, *_: module(a), x, *module.parameters())
    with lean(module) as changed:
        ours = value_and_gradients(lambda a, *_: module(a), x, *module.parameters())
    assert changed == 1 and len(ours) == (8 if bias else 5)
    assert largest(ours, theirs) < (1e-13 if dtype == torch.float64 else 1e-5)


def test_in_bf16_the_feed_forward_is_as_close_to_exact_as_that_of_transformers() -> None:
    module, x = feed_forward(LlamaMLP, torch.bfloat16), drawn(8, 33, 32, dtype=torch.bfloat16)
    exact_module, wide = feed_forward(LlamaMLP, torch.float64), x.detach().double().requires_grad_()
    exact_module.load_state_dict(module.state_dict())
    exact = value_and_gradients(lambda a, *_: exact_module(a), wide, *exact_module.parameters())
    theirs = value_and_gradients(lambda a, *_: module(a), x, *module.parameters())
    with lean(module):
        ours = value_and_gradients(lambda a, *_: module(a), x, *module.parameters())
    assert torch.equal(ours[0], theirs[0])
    for mine, reference in zip(errors(ours, exact), errors(theirs, exact), strict=True):
        assert mine < 0.02 and mine < 1.05 * reference


# --- whole models ---------------------------------------------------------------------------------------------------


def logits_and_gradients(model: Any) -> list[Any]:
    ids = torch.randint(3, 512, (2, 19), generator=torch.Generator().manual_seed(0))
    return value_and_gradients(lambda *_: model(ids, use_cache=False).logits, *model.parameters())


def with_exact_norms(model: Any) -> Any:
    """The model with its norms in the precision of their input."""

    class Exact(nn.Module):
        def __init__(self, norm: Any) -> None:
            super().__init__()
            self.weight, self.epsilon = norm.weight, norm.variance_epsilon

        def forward(self, x: Any) -> Any:
            return exact_norm(x, self.weight, self.epsilon)

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NORMS):
                setattr(parent, name, Exact(child))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lean_model_has_the_logits_and_gradients_of_the_same_model_in_float64(live: Live, family: str) -> None:
    model = live(family, "float64", attention="sdpa")
    stock = logits_and_gradients(model)
    with lean(model) as changed:
        ours = logits_and_gradients(model)
    # two layers of two norms and a feed-forward, and the last norm; Qwen3 also norms queries and keys
    assert changed == (11 if family == "qwen3" else 7)
    exact = logits_and_gradients(with_exact_norms(live(family, "float64", attention="sdpa")))
    assert all(error < 1e-12 for error in errors(ours, exact))
    assert 1e-9 < max(errors(stock, exact)) < 1e-5, "fp32 norms are what sets transformers' own apart"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lean_model_in_bf16_is_as_close_to_float64_as_transformers_is(live: Live, family: str) -> None:
    model = live(family, "bfloat16", attention="sdpa")
    wide = live(family, "float64", attention="sdpa")
    wide.load_state_dict(model.state_dict())
    exact = logits_and_gradients(with_exact_norms(wide))
    theirs = logits_and_gradients(model)
    with lean(model):
        ours = logits_and_gradients(model)
    for mine, reference in zip(errors(ours, exact), errors(theirs, exact), strict=True):
        assert mine < 1.2 * reference + 1e-3


def test_less_is_kept_for_the_backward_pass(live: Live) -> None:
    model = live("llama", attention="sdpa")
    ids = torch.arange(3, 203)[None]

    def kept() -> int:
        own = {p.data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}

        def note(tensor: Any) -> Any:
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = model.model(ids, use_cache=False).last_hidden_state
        assert out.requires_grad
        return sum(sizes.values())

    stock = kept()
    with lean(model):
        ours = kept()
    assert ours < 0.75 * stock


# --- what keeps its own code ----------------------------------------------------------------------------------------


def own_forwards(model: Any) -> list[str]:
    """Modules with a forward of their own, but linear layers, which get one only on some processors."""
    found = [name for name, module in model.named_modules() if "forward" in vars(module)]
    return [name for name in found if type(model.get_submodule(name)) is not nn.Linear]


def test_modules_come_back_after_the_block_and_after_an_error(live: Live) -> None:
    model = live("qwen3", attention="sdpa")
    before = logits_and_gradients(model)
    with lean(model):
        assert len(own_forwards(model)) == 11
    assert own_forwards(model) == []
    with pytest.raises(RuntimeError, match="stop"), lean(model):
        raise RuntimeError("stop")
    assert own_forwards(model) == []
    assert all(torch.equal(a, b) for a, b in zip(before, logits_and_gradients(model), strict=True))
    with lean(model, wanted=False) as changed:
        assert changed == 0 and own_forwards(model) == []


def test_a_forward_that_somebody_else_has_put_on_a_module_stays(live: Live) -> None:
    """As accelerate's hooks do; and a second `lean` inside the first takes nothing away from it."""
    model = live("llama", attention="sdpa")
    norm = model.model.norm
    theirs = norm.forward = lambda hidden_states: LlamaRMSNorm.forward(norm, hidden_states) * 2
    with lean(model) as changed:
        assert changed == 6 and norm.forward is theirs
        with lean(model) as again:
            assert again == 0
        assert len(own_forwards(model)) == 7
    assert norm.forward is theirs and own_forwards(model) == ["model.norm"]


@pytest.mark.parametrize(("family", "changes"), [("gemma", {}), ("llama", {"hidden_act": "gelu"}), ("phi", {})])
def test_architectures_that_do_not_match_keep_their_code(family: str, changes: dict[str, Any]) -> None:
    config = AutoConfig.for_model(
        family, vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, **changes,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().double()  # where no library is chosen
    before = logits_and_gradients(model)
    with lean(model) as changed:
        names = own_forwards(model)
        inside = logits_and_gradients(model)
    if family == "llama":
        assert changed == 5 and not any("mlp" in name for name in names), "its norms match, its feed-forward does not"
        assert all(error < 1e-5 for error in errors(inside, [t.double() for t in before]))
    else:
        assert changed == 0 and all(torch.equal(a, b) for a, b in zip(inside, before, strict=True))


@pytest.mark.parametrize(("targets", "mlps"), [("all-linear", 0), (["q_proj", "up_proj"], 2), (["down_proj"], 0)])
def test_a_feed_forward_with_an_adapter_on_its_last_projection_keeps_its_code(
    live: Live, targets: Any, mlps: int
) -> None:
    model = with_adapters(live("llama", attention="sdpa"), Lora(rank=4, targets=targets), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(3, 20)[None]
    leaves = [p for p in model.parameters() if p.requires_grad]
    before = value_and_gradients(lambda *_: model(ids, use_cache=False).logits, *leaves)
    with lean(model):
        assert sum(name.endswith("mlp") for name in own_forwards(model)) == mlps
        inside = value_and_gradients(lambda *_: model(ids, use_cache=False).logits, *leaves)
    assert errors(inside, [t.double() for t in before]) == pytest.approx([0] * len(before), abs=1e-5)
