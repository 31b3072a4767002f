"""Ladders climb from small to large, and a size budget decides which rungs there are before anything is built."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import ExportError
from distill.export.schemes import VARIANTS, ladder, most_sensitive, predicted_bytes
from distill.models import find_model, load_config


@pytest.fixture
def config(student: Callable[..., Path]) -> Any:
    found = load_config(find_model(str(student())))
    found.num_hidden_layers = 12
    return found


def test_the_rungs_of_four_bits_grow_until_all_has_eight(config: Any) -> None:
    rungs = ladder("int4", config)
    assert list(map(str, rungs)) == [
        "int4 k-quant",
        "int4 k-quant, int8 head",
        "int4 gptq, int8 head",
        "int4 gptq, int8 head, 6 layers in int8",
        "int8 rtn",
        "int8 rtn, fp32 activations",
    ]
    sizes = [predicted_bytes(config, rung).total for rung in rungs]
    assert sizes == sorted(sizes)
    assert [rung.half for rung in ladder("q4f16", config)] == [True] * 6
    assert list(map(str, ladder("int8", config))) == ["int8 rtn", "int8 rtn, fp32 activations"]
    assert ladder("fp32", config) == [VARIANTS["fp32"]]


def test_rows_with_an_odd_number_of_blocks_are_rounded_to_symmetric_grids(config: Any) -> None:
    config.hidden_size = 96
    assert list(map(str, ladder("int4", config)))[:4] == [
        "int4 rtn", "int4 rtn, int8 head", "int4 rtn, int8 head, 6 layers in int8", "int8 rtn"
    ]  # fmt: skip
    assert all(rung.symmetric for rung in ladder("int4", config))


def test_a_recipe_can_keep_one_method_or_one_head(config: Any) -> None:
    assert [str(rung) for rung in ladder("int4", config, method="gptq", head_bits=8)][:2] == [
        "int4 gptq, int8 head",
        "int4 gptq, int8 head, 6 layers in int8",
    ]
    assert [rung.head_bits for rung in ladder("int4", config, head_bits=4)] == [4, 8, 8]


def test_what_a_recipe_asks_for_is_tried_even_where_no_rung_has_it(config: Any) -> None:
    assert str(ladder("int4", config, method="rtn")[0]) == "int4 rtn"
    assert str(ladder("int4", config, method="gptq", head_bits=4)[0]) == "int4 gptq"
    config.hidden_size = 96
    with pytest.raises(ExportError, match=r"four_bits.method gptq: .* odd number of blocks of 32.*; use rtn"):
        ladder("int4", config, method="gptq")


def test_a_budget_is_filled_with_as_many_wide_layers_as_fit(config: Any) -> None:
    half = next(rung for rung in ladder("int4", config) if rung.wide_layers)
    budget = predicted_bytes(config, half).total - 1
    last = ladder("int4", config, budget)[-1]
    assert len(last.wide_layers) == 5 and predicted_bytes(config, last).total <= budget
    # one more layer would not fit: the budget is solved, not guessed
    assert all(predicted_bytes(config, rung).total <= budget for rung in ladder("int4", config, budget))
    # a budget that excludes nothing changes nothing
    assert ladder("int4", config, 10**9) == ladder("int4", config)


def test_a_budget_that_nothing_fits_says_what_would(config: Any) -> None:
    with pytest.raises(ExportError, match=r"max_mb.int4: 0.0 MB are less than .* \(int4 k-quant: 0.\d MB\); raise it"):
        ladder("int4", config, 1000)


def test_sensitive_layers_are_the_ends_first() -> None:
    assert most_sensitive(24, 6) == (0, 1, 2, 21, 22, 23)
    assert set(most_sensitive(24, 6)) < set(most_sensitive(24, 10)) and len(most_sensitive(24, 10)) == 10
    assert most_sensitive(4, 4) == (0, 1, 2, 3)
