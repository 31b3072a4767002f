"""Steps and packs: which documents train when, and that each of them does so whole, once, and the same every time."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import TrainingError
from distill.students.packing import lay_out, pack_step, plan_steps

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)
BUDGETS = st.integers(1, 150)
SEEDS = st.integers(0, 2**40)


def flat(parts: list[list[int]]) -> list[int]:
    return [index for part in parts for index in part]


# --- steps ----------------------------------------------------------------------------------------------------------


@given(LENGTHS, BUDGETS, st.integers(1, 4), SEEDS)
def test_whole_epochs_train_every_document_once_an_epoch(
    lengths: list[int], budget: int, epochs: int, seed: int
) -> None:
    order = flat(plan_steps(lengths, budget, epochs, seed))
    for epoch in range(epochs):
        part = order[epoch * len(lengths) : (epoch + 1) * len(lengths)]
        assert sorted(part) == list(range(len(lengths)))
    assert len(order) == epochs * len(lengths)


@given(LENGTHS, BUDGETS, st.integers(0, 3), st.floats(0.01, 0.99), SEEDS)
def test_a_fractional_epoch_trains_that_share_of_one_more_pass(
    lengths: list[int], budget: int, whole: int, part: float, seed: int
) -> None:
    more = flat(plan_steps(lengths, budget, whole + part, seed))
    full = flat(plan_steps(lengths, budget, whole + 1, seed))
    extra = len(more) - whole * len(lengths)
    assert abs(extra - part * len(lengths)) <= 0.5 or extra == 1, "the nearest number of documents, and at least one"
    assert more == full[: len(more)], "the share is the beginning of the pass it is a share of"


@given(LENGTHS, BUDGETS, st.floats(0.1, 3), SEEDS)
def test_a_step_keeps_its_budget_and_takes_the_next_document_whenever_it_fits(
    lengths: list[int], budget: int, epochs: float, seed: int
) -> None:
    steps = plan_steps(lengths, budget, epochs, seed)
    assert all(steps)
    sizes = [sum(lengths[index] for index in step) for step in steps]
    for step, size in zip(steps, sizes):
        assert size <= budget or len(step) == 1, "only a document longer than the budget stands alone above it"
    for size, following in zip(sizes, steps[1:]):
        assert size + lengths[following[0]] > budget


@given(LENGTHS, BUDGETS, st.floats(0.1, 3), SEEDS, st.integers(1, 10))
def test_max_steps_cuts_the_same_plan_short(
    lengths: list[int], budget: int, epochs: float, seed: int, most: int
) -> None:
    assert plan_steps(lengths, budget, epochs, seed, most) == plan_steps(lengths, budget, epochs, seed)[:most]


def test_epochs_and_seeds_give_different_orders_and_the_same_seed_the_same() -> None:
    lengths = [10] * 50
    order = flat(plan_steps(lengths, 40, 2, seed=0))
    assert order[:50] != order[50:] and order[:50] != list(range(50))
    assert order == flat(plan_steps(lengths, 40, 2, seed=0))
    assert order != flat(plan_steps(lengths, 40, 2, seed=1))
    # neighbouring seeds must not share passes, as `seed + epoch` would
    assert order[50:] != flat(plan_steps(lengths, 40, 1, seed=1))


# --- packs ----------------------------------------------------------------------------------------------------------


@given(LENGTHS, BUDGETS)
def test_every_document_of_a_step_is_in_exactly_one_pack_within_the_budget(lengths: list[int], budget: int) -> None:
    packs = pack_step(range(len(lengths)), lengths, budget)
    assert sorted(flat(packs)) == list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[index] for index in pack) <= budget or len(pack) == 1


@given(LENGTHS, BUDGETS, st.randoms(use_true_random=False))
def test_packs_depend_on_the_set_of_documents_and_not_on_their_order(lengths: list[int], budget: int, rng: Any) -> None:
    documents = list(range(len(lengths)))
    packs = pack_step(documents, lengths, budget)
    rng.shuffle(documents)
    assert pack_step(documents, lengths, budget) == packs


@given(LENGTHS, BUDGETS)
def test_no_two_packs_could_have_been_one(lengths: list[int], budget: int) -> None:
    sizes = sorted(sum(lengths[i] for i in pack) for pack in pack_step(range(len(lengths)), lengths, budget))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > budget


def test_a_document_that_a_step_holds_twice_is_packed_twice() -> None:
    assert sorted(flat(pack_step([3, 3, 1], [0, 5, 0, 5], 10))) == [1, 3, 3]


def test_best_fit_decreasing_by_hand() -> None:
    # 7 opens a pack, 6 another; 4 fits only beside 6 (room 4), 3 fits only beside 7 (room 3): two full packs of 10
    assert pack_step([0, 1, 2, 3], [3, 6, 7, 4], 10) == [[2, 0], [1, 3]]


# --- layout ---------------------------------------------------------------------------------------------------------


def documents(shapes: list[tuple[int, int]]) -> tuple[list[Any], list[int]]:
    """Documents of (prompt, completion) tokens whose ids say document and position: 1000 * document + position."""
    ids = [np.arange(p + c, dtype=np.int32) + 1000 * number for number, (p, c) in enumerate(shapes)]
    return ids, [prompt for prompt, _ in shapes]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8), st.randoms())
def test_a_row_predicts_the_next_token_of_its_own_document_and_only_completions_are_predicted(
    shapes: list[tuple[int, int]], rng: Any
) -> None:
    ids, prompts = documents(shapes)
    order = list(range(len(shapes)))
    rng.shuffle(order)
    pack = lay_out(ids, prompts, order)
    assert pack.ids_T.tolist() == [token for index in order for token in ids[index].tolist()]
    assert pack.positions_T.tolist() == [place for index in order for place in range(len(ids[index]))]
    assert pack.bounds == [0, *np.cumsum([len(ids[index]) for index in order]).tolist()]
    # what is predicted, from the definition: every token of every completion, each from the token before it
    expected = [(t - 1, t) for i in order for t in (1000 * i + place for place in range(prompts[i], len(ids[i])))]
    assert list(zip(pack.ids_T[pack.rows_N].tolist(), pack.targets_N.tolist(), strict=True)) == expected
    assert pack.ids_T.dtype == pack.positions_T.dtype == pack.rows_N.dtype == pack.targets_N.dtype == np.int64


def test_the_last_prompt_token_predicts_the_first_completion_token_and_the_end_is_predicted() -> None:
    ids, prompts = documents([(2, 3), (1, 1)])
    pack = lay_out(ids, prompts, [0, 1])
    assert pack.rows_N.tolist() == [1, 2, 3, 5]
    assert pack.targets_N.tolist() == [2, 3, 4, 1001]


def test_a_pack_without_supervised_tokens_is_refused() -> None:
    with pytest.raises(TrainingError, match="no supervised tokens"):
        lay_out([np.arange(3)], [3], [0])
