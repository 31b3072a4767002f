"""The gates of an export: what was measured against which limit, and how it ended.

A gate ends as passed, failed or not run; not run is never passed and always says why. Functions take measurements and
limits and return entries of the manifest; nothing here loads a model.
"""

from collections.abc import Sequence

from distill.config import Gates
from distill.errors import GateError
from distill.statistics import Interval

from .manifest import GateEntry, GateStatus
from .parity import GreedyParity, Parity


def parity_gates(variant: str, parity: Parity, limits: Gates) -> list[GateEntry]:
    """Mean KL and top-1 agreement with the torch student on held-out tokens."""
    max_kl = limits.max_kl[variant]  # type: ignore[index]
    min_top1 = limits.min_top1[variant]  # type: ignore[index]
    detail = f"max |logit difference| {parity.max_logit_difference:.4g} over {parity.positions} positions"
    return [
        GateEntry(
            name="mean_kl",
            variant=variant,
            status=_status(parity.mean_kl <= max_kl),
            value=parity.mean_kl,
            limit=max_kl,
            unit="nats/token",
            detail=detail,
        ),
        GateEntry(
            name="top1_agreement",
            variant=variant,
            status=_status(parity.top1_agreement >= min_top1),
            value=parity.top1_agreement,
            limit=min_top1,
            unit="share",
            detail=detail,
        ),
    ]


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
            f" (limit {gate.limit:.4g}): {gate.detail}"
            for gate in bad
        )
        raise GateError(f"{len(bad)} gate(s) failed: {shown}; see gates.json, or change export.gates on purpose")


def _status(passed: bool) -> GateStatus:
    return "passed" if passed else "failed"
