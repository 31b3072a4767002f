"""The gates of an export: what was measured against which limit, and how it ended.

A gate ends as passed, failed or not run; not run is never passed and always says why. Functions take measurements and
limits and return entries of the manifest; nothing here loads a model.
"""

import math
from collections.abc import Sequence

from distill.config import Gates
from distill.errors import GateError
from distill.statistics import Interval

from .manifest import GateEntry, GateStatus
from .parity import GreedyParity, Parity


def structure_gate(variant: str, matrices: int, layers: int, providers: Sequence[str]) -> GateEntry:
    """The graph is the one asked for and loads: `check_graph` and `check_weights` refuse any other before this."""
    detail = f"{matrices} matrices as asked, attention fused in {layers} of {layers} layers, no zero or unused weights"
    return GateEntry(
        name="structure", variant=variant, status="passed", detail=f"{detail}; loads on {', '.join(providers)}"
    )


def provider_gate(variant: str, provider: str) -> GateEntry:
    """A provider that this machine does not have: what was measured on the CPU says nothing of it."""
    return GateEntry(
        name=f"loads_on_{provider}",
        variant=variant,
        status="not_run",
        detail=f"no {provider} device here; everything of this variant was measured on the CPU",
    )


def parity_gates(variant: str, parity: Parity, limits: Gates) -> list[GateEntry]:
    """Mean KL, top-1 agreement and perplexity against the torch student on held-out tokens."""
    detail = f"max |logit difference| {parity.max_logit_difference:.4g} over {parity.positions} positions"
    return [
        _at_most("mean_kl", variant, parity.mean_kl, limits.of("max_kl", variant), "nats/token", detail),
        _top1("top1_agreement", variant, parity, limits),
        _perplexity(variant, parity, limits),
    ]


def decode_gates(variant: str, parity: Parity, limits: Gates) -> list[GateEntry]:
    """The same of tokens that are fed one by one through the cache, as they are when a text is written."""
    detail = f"over {parity.positions} cached steps"
    return [
        _at_most("decode_mean_kl", variant, parity.mean_kl, limits.of("max_kl", variant), "nats/token", detail),
        _top1("decode_top1_agreement", variant, parity, limits),
    ]


def _at_most(name: str, variant: str, value: float, limit: float, unit: str, detail: str) -> GateEntry:
    return GateEntry(
        name=name, variant=variant, status=_status(value <= limit), value=value, limit=limit, unit=unit, detail=detail
    )


def _top1(name: str, variant: str, parity: Parity, limits: Gates) -> GateEntry:
    """Near-ties are counted, not failed: either token is as good there."""
    value, limit = parity.top1_agreement + parity.near_ties / parity.positions, limits.of("min_top1", variant)
    detail = f"{parity.positions} positions, {parity.near_ties} of them near-ties that differ"
    return GateEntry(
        name=name,
        variant=variant,
        status=_status(value >= limit),
        value=value,
        limit=limit,
        unit="share",
        detail=detail,
    )


def _perplexity(variant: str, parity: Parity, limits: Gates) -> GateEntry:
    limit = limits.of("max_perplexity", variant)
    if math.isnan(parity.perplexity_ratio):
        why = "the held-out texts have no tokens that follow what is compared"
        return GateEntry(name="perplexity_ratio", variant=variant, status="not_run", limit=limit, detail=why)
    detail = f"the torch student's perplexity is {parity.perplexity:.4g}"
    return _at_most("perplexity_ratio", variant, parity.perplexity_ratio, limit, "of the student's", detail)


def greedy_gate(variant: str, found: GreedyParity) -> GateEntry:
    """fp32 greedy tokens equal torch's; first differences at near-ties are allowed and counted."""
    detail = f"{found.identical} of {found.prompts} identical, {found.near_ties} differ first at a near-tie"
    if not found.passed:
        detail += f"; first other difference: {found.differences[0]}"
    return GateEntry(
        name="greedy_tokens",
        variant=variant,
        status=_status(found.passed),
        value=float(found.prompts - found.identical - found.near_ties),
        limit=0.0,
        unit="prompts that differ",
        detail=detail,
    )


def accuracy_gate(variant: str, drop: Interval | None, limit: float, why_not: str = "") -> GateEntry:
    """Task accuracy lost against the student, paired by problem: fails when the drop surely exceeds the limit."""
    if drop is None:
        return GateEntry(name="accuracy_drop", variant=variant, status="not_run", limit=limit, detail=why_not)
    detail = f"student minus {variant}: {drop.value:+.1%} [{drop.low:+.1%}, {drop.high:+.1%}]"
    if drop.low <= limit < drop.high:
        detail += "; too few problems to prove that the drop is within the limit"
    return GateEntry(
        name="accuracy_drop",
        variant=variant,
        status=_status(drop.low <= limit),
        value=drop.value,
        limit=limit,
        unit="share of problems",
        detail=detail,
    )


def gguf_gate(kind: str, parity: Parity | None, limits: Gates, why_not: str = "") -> GateEntry:
    """The GGUF, read back with transformers, is the student: no more is lost than by graphs of as many bits."""
    limit = limits.of("max_kl", "int8" if kind == "q8_0" else "fp16")
    if parity is None:
        return GateEntry(name=f"gguf_{kind}_mean_kl", status="not_run", limit=limit, detail=why_not)
    return GateEntry(
        name=f"gguf_{kind}_mean_kl",
        status=_status(parity.mean_kl <= limit),
        value=parity.mean_kl,
        limit=limit,
        unit="nats/token",
        detail=f"read back with transformers; top-1 {parity.top1_agreement:.2%} of {parity.positions}",
    )


def gain_gate(variant: str, gain: Interval | None, kept: Interval | None, limit: float, why_not: str = "") -> GateEntry:
    """How much of what distillation gave survived; not gated where the gain itself is not sure to be one."""
    entry = GateEntry(name="gain_retained", variant=variant, status="not_run", limit=limit, detail=why_not)
    if gain is None or kept is None:
        return entry
    detail = f"base to student {gain.value:+.1%} [{gain.low:+.1%}, {gain.high:+.1%}]"
    if gain.low <= 0:
        return entry.model_copy(update={"detail": f"{detail}: no gain that is sure, so none to keep"})
    detail += f"; of it {variant} keeps {kept.value:.1%} [{kept.low:.1%}, {kept.high:.1%}]"
    if kept.low < limit <= kept.high:
        detail += "; too few problems to prove that enough is kept"
    update = {"status": _status(kept.high >= limit), "value": kept.value, "unit": "share of the gain", "detail": detail}
    return entry.model_copy(update=update)


def loader_gate(variant: str, same: int, prompts: int) -> GateEntry:
    """onnxruntime-genai, loading the folder unmodified, writes the tokens that evaluation measured."""
    return GateEntry(
        name="genai_tokens",
        variant=variant,
        status=_status(same == prompts) if prompts else "not_run",
        value=float(prompts - same),
        limit=0.0,
        unit="prompts that differ",
        detail=f"{same} of {prompts} golden prompts equal" if prompts else "no golden prompts in the recipe",
    )


def not_passed(gates: Sequence[GateEntry], require: bool) -> list[GateEntry]:
    """The gates that stop an export: every failed one, and with `require` those that were not run."""
    return [gate for gate in gates if gate.status == "failed" or (require and gate.status == "not_run")]


def refuse_failures(gates: Sequence[GateEntry], require: bool) -> None:
    """Raise GateError naming every failed gate, and with `require` those that were not run."""
    if bad := not_passed(gates, require):
        shown = "; ".join(
            f"{gate.variant} {gate.name} {'was not run' if gate.value is None else f'is {gate.value:.4g}'}"
            f"{'' if gate.limit is None else f' (limit {gate.limit:.4g})'}: {gate.detail}"
            for gate in bad
        )
        raise GateError(f"{len(bad)} gate(s) failed: {shown}; see gates.json, or change export.gates on purpose")


def _status(passed: bool) -> GateStatus:
    return "passed" if passed else "failed"
