"""A gate ends as passed, failed or not run, and what cannot be known is never passed."""

import math

import pytest

from distill.config import Gates
from distill.errors import GateError
from distill.export.gates import (
    accuracy_gate,
    decode_gates,
    gain_gate,
    parity_gates,
    provider_gate,
    refuse_failures,
)
from distill.export.parity import Parity
from distill.statistics import Interval

GOOD = Parity(0.1, 0.01, 0.95, 200, 0, 8.0, 1.01)


def statuses(parity: Parity) -> dict[str, str]:
    gates = [*parity_gates("int4", parity, Gates()), *decode_gates("int4", parity, Gates())]
    return {gate.name: gate.status for gate in gates}


def test_each_limit_fails_its_own_gate() -> None:
    assert set(statuses(GOOD).values()) == {"passed"}
    failed = {
        key: [name for name, status in statuses(GOOD._replace(**change)).items() if status == "failed"]
        for key, change in {
            "kl": {"mean_kl": 0.06},
            "top1": {"top1_agreement": 0.8},
            "ppl": {"perplexity_ratio": 1.2},
        }.items()
    }
    assert failed == {
        "kl": ["mean_kl", "decode_mean_kl"],
        "top1": ["top1_agreement", "decode_top1_agreement"],
        "ppl": ["perplexity_ratio"],
    }


def test_near_ties_are_counted_and_not_failed() -> None:
    assert statuses(GOOD._replace(top1_agreement=0.88))["top1_agreement"] == "failed"
    assert statuses(GOOD._replace(top1_agreement=0.88, near_ties=10))["top1_agreement"] == "passed"


def test_a_perplexity_that_cannot_be_known_is_not_run() -> None:
    assert statuses(GOOD._replace(perplexity_ratio=math.nan))["perplexity_ratio"] == "not_run"


def test_a_recipe_that_sets_one_limit_keeps_the_others() -> None:
    gates = Gates(max_kl={"int4": 0.001})
    assert gates.of("max_kl", "int4") == 0.001 and gates.of("max_kl", "int8") == Gates().of("max_kl", "int8")


def test_what_no_device_here_can_run_is_not_run_and_can_be_required() -> None:
    gate = provider_gate("q4f16", "webgpu")
    assert (gate.name, gate.status) == ("loads_on_webgpu", "not_run") and "no webgpu device here" in gate.detail
    refuse_failures([gate], require=False)
    with pytest.raises(GateError, match="q4f16 loads_on_webgpu was not run"):
        refuse_failures([gate], require=True)


def test_an_accuracy_drop_fails_only_where_it_is_sure() -> None:
    assert accuracy_gate("int4", Interval(0.08, 0.06, 0.10), 0.05).status == "failed"
    unsure = accuracy_gate("int4", Interval(0.08, 0.01, 0.15), 0.05)
    assert unsure.status == "passed" and "too few problems to prove" in unsure.detail


def test_a_gain_is_kept_lost_or_not_there() -> None:
    sure = Interval(0.5, 0.4, 0.6)
    assert gain_gate("int4", sure, Interval(0.97, 0.93, 1.0), 0.9).status == "passed"
    unsure = gain_gate("int4", sure, Interval(0.85, 0.75, 0.95), 0.9)
    assert unsure.status == "passed" and "too few problems to prove" in unsure.detail
    assert gain_gate("int4", sure, Interval(0.7, 0.6, 0.8), 0.9).status == "failed"
    none = gain_gate("int4", Interval(0.01, -0.02, 0.04), Interval(0.2, -3.0, 5.0), 0.9)
    assert none.status == "not_run" and "no gain that is sure" in none.detail
    assert gain_gate("int4", None, None, 0.9, "no base").detail == "no base"
