"""Steps and packs: which documents train when, and that each of them does so whole, once, and the same every time."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import LossWeights
from distill.documents import Documents
from distill.errors import TrainingError
from distill.format import ANSWER, EOS, PROMPT, THINK, Document
from distill.students.packing import (
    BUCKET_SPREAD,
    Pack,
    Source,
    bucket_step,
    epochs_of,
    lay_out,
    lay_side_by_side,
    pack_step,
    plan_steps,
)

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)
BUDGETS = st.integers(1, 150)
SEEDS = st.integers(0, 2**40)


def flat(parts: list[list[int]]) -> list[int]:
    return [index for part in parts for index in part]


def plan(lengths: list[int], budget: int, epochs: float, seed: int, most: int | None = None) -> list[list[int]]:
    """The steps of a phase whose only source is the traces."""
    return plan_steps(epochs_of([Source(range(len(lengths)))], lengths, epochs, seed), lengths, budget, most)


# --- steps ----------------------------------------------------------------------------------------------------------


@given(LENGTHS, BUDGETS, st.integers(1, 4), SEEDS)
def test_whole_epochs_train_every_document_once_an_epoch(
    lengths: list[int], budget: int, epochs: int, seed: int
) -> None:
    order = flat(plan(lengths, budget, epochs, seed))
    for epoch in range(epochs):
        part = order[epoch * len(lengths) : (epoch + 1) * len(lengths)]
        assert sorted(part) == list(range(len(lengths)))
    assert len(order) == epochs * len(lengths)


@given(LENGTHS, BUDGETS, st.integers(0, 3), st.floats(0.01, 0.99), SEEDS)
def test_a_fractional_epoch_trains_that_share_of_one_more_pass(
    lengths: list[int], budget: int, whole: int, part: float, seed: int
) -> None:
    more = flat(plan(lengths, budget, whole + part, seed))
    full = flat(plan(lengths, budget, whole + 1, seed))
    extra = len(more) - whole * len(lengths)
    assert abs(extra - part * len(lengths)) <= 0.5 or extra == 1, "the nearest number of documents, and at least one"
    assert more == full[: len(more)], "the share is the beginning of the pass it is a share of"


@given(LENGTHS, BUDGETS, st.floats(0.1, 3), SEEDS)
def test_a_step_keeps_its_budget_and_takes_the_next_document_whenever_it_fits(
    lengths: list[int], budget: int, epochs: float, seed: int
) -> None:
    steps = plan(lengths, budget, epochs, seed)
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
    assert plan(lengths, budget, epochs, seed, most) == plan(lengths, budget, epochs, seed)[:most]


def test_max_steps_needs_no_more_of_the_order_than_it_takes() -> None:
    order = iter(range(1000))
    assert plan_steps(order, [4] * 1000, 8, max_steps=3) == [[0, 1], [2, 3], [4, 5]]
    assert next(order) == 7, "one more was looked at, to know that the step was full"


def test_epochs_and_seeds_give_different_orders_and_the_same_seed_the_same() -> None:
    lengths = [10] * 50
    order = flat(plan(lengths, 40, 2, seed=0))
    assert order[:50] != order[50:] and order[:50] != list(range(50))
    assert order == flat(plan(lengths, 40, 2, seed=0))
    assert order != flat(plan(lengths, 40, 2, seed=1))
    # neighbouring seeds must not share passes, as `seed + epoch` would
    assert order[50:] != flat(plan(lengths, 40, 1, seed=1))


@given(st.integers(1, 30), st.integers(1, 3), SEEDS)
def test_without_replay_the_order_is_that_of_seeded_shuffles_as_recipes_have_known_it(
    count: int, epochs: int, seed: int
) -> None:
    expected: list[int] = []
    for epoch in range(epochs):
        shuffled = list(range(count))
        random.Random(f"{seed}:{epoch}").shuffle(shuffled)
        expected += shuffled
    assert list(epochs_of([Source(range(count))], [7] * count, epochs, seed)) == expected
    # which documents they are changes nothing about it
    set_aside = [3 * index + 1 for index in range(count)]
    chosen = list(epochs_of([Source(set_aside)], [7] * (3 * count), epochs, seed))
    assert chosen == [set_aside[index] for index in expected]


# --- replay ---------------------------------------------------------------------------------------------------------

TRACES = st.lists(st.integers(1, 60), min_size=1, max_size=12)
REPLAYS = st.lists(st.tuples(TRACES, st.floats(0.01, 3)), min_size=1, max_size=3)


def mixed(traces: list[int], replays: list[tuple[list[int], float]]) -> tuple[list[Source], list[int]]:
    """Sources over documents of the given lengths, laid one set after the other as training has them."""
    sources, lengths = [Source(range(len(traces)))], list(traces)
    for sizes, weight in replays:
        sources.append(Source(range(len(lengths), len(lengths) + len(sizes)), weight))
        lengths += sizes
    return sources, lengths


def by_epoch(sources: list[Source], lengths: list[int], epochs: int, seed: int) -> list[list[int]]:
    """Each epoch's part of the order: what one more epoch appends."""
    orders = [list(epochs_of(sources, lengths, count, seed)) for count in range(epochs + 1)]
    assert all(later[: len(before)] == before for before, later in zip(orders, orders[1:]))
    return [later[len(before) :] for before, later in zip(orders, orders[1:])]


@given(TRACES, REPLAYS, st.integers(1, 4), SEEDS)
def test_an_epoch_takes_all_traces_once_and_of_each_replay_set_its_weight_in_tokens_within_one_document(
    traces: list[int], replays: list[tuple[list[int], float]], epochs: int, seed: int
) -> None:
    sources, lengths = mixed(traces, replays)
    for order in by_epoch(sources, lengths, epochs, seed):
        assert sorted(index for index in order if index < len(traces)) == list(range(len(traces)))
        for source in sources[1:]:
            assert source.weight is not None
            drawn = [lengths[index] for index in order if index in source.indices]
            wanted = source.weight * sum(traces)
            assert wanted <= sum(drawn) + 1e-6
            assert sum(drawn) < wanted + max(lengths[index] for index in source.indices)


@given(TRACES, REPLAYS, st.integers(1, 5), SEEDS)
def test_every_document_of_a_replay_set_trains_once_before_any_trains_twice_across_epochs(
    traces: list[int], replays: list[tuple[list[int], float]], epochs: int, seed: int
) -> None:
    sources, lengths = mixed(traces, replays)
    seen: Counter[int] = Counter()
    for order in by_epoch(sources, lengths, epochs, seed):
        seen.update(order)
        for source in sources[1:]:
            times = [seen[index] for index in source.indices]
            assert max(times) - min(times) <= 1


def test_a_replay_set_larger_than_an_epoch_goes_on_instead_of_starting_again() -> None:
    sources, lengths = mixed([10] * 10, [([10] * 20, 0.5)])
    epochs = [{index for index in order if index >= 10} for order in by_epoch(sources, lengths, 4, seed=0)]
    assert [len(drawn) for drawn in epochs] == [5, 5, 5, 5]
    assert set.union(*epochs) == set(range(10, 30)), "four epochs of a quarter each see all of it"


def test_passes_over_a_replay_set_differ_in_order_and_so_do_seeds() -> None:
    sources, lengths = mixed([10] * 10, [([10] * 20, 0.1)])

    def drawn(seed: int) -> list[int]:
        """One document an epoch, so that the order shows."""
        return [index for index in epochs_of(sources, lengths, 40, seed) if index >= 10]

    first, second = drawn(0)[:20], drawn(0)[20:]
    assert sorted(first) == sorted(second) == list(range(10, 30))
    assert len({tuple(order) for order in (range(10, 30), first, second, drawn(1)[:20])}) == 4
    assert drawn(0) == first + second


@given(TRACES, REPLAYS, st.integers(1, 3), SEEDS)
def test_another_replay_set_changes_nothing_about_what_is_drawn_of_the_others(
    traces: list[int], replays: list[tuple[list[int], float]], epochs: int, seed: int
) -> None:
    sources, lengths = mixed(traces, replays)
    with_all = by_epoch(sources, lengths, epochs, seed)
    without = by_epoch(sources[:-1], lengths, epochs, seed)
    for more, less in zip(with_all, without, strict=True):
        assert sorted(index for index in more if index not in sources[-1].indices) == sorted(less)


def test_traces_and_replay_are_shuffled_together() -> None:
    sources, lengths = mixed([10] * 40, [([10] * 40, 1.0)])
    order = list(epochs_of(sources, lengths, 1, seed=0))
    assert 10 < sum(index >= 40 for index in order[:40]) < 30


def test_a_fractional_epoch_takes_its_share_of_traces_and_replay_together() -> None:
    sources, lengths = mixed([10] * 40, [([10] * 40, 0.5)])
    whole = list(epochs_of(sources, lengths, 2, seed=3))
    assert list(epochs_of(sources, lengths, 1.5, seed=3)) == whole[:90]


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
    packs, batches = pack_step(documents, lengths, budget), bucket_step(documents, lengths, budget)
    rng.shuffle(documents)
    assert pack_step(documents, lengths, budget) == packs
    assert bucket_step(documents, lengths, budget) == batches
    # lengths come as an array from the store
    assert pack_step(documents, np.asarray(lengths), budget) == packs
    assert bucket_step(documents, np.asarray(lengths), budget) == batches


@given(LENGTHS, BUDGETS)
def test_no_two_packs_could_have_been_one(lengths: list[int], budget: int) -> None:
    sizes = sorted(sum(lengths[i] for i in pack) for pack in pack_step(range(len(lengths)), lengths, budget))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > budget


@pytest.mark.parametrize("cut", [pack_step, bucket_step])
def test_a_document_that_a_step_holds_twice_is_packed_twice(cut: Callable[..., list[list[int]]]) -> None:
    assert sorted(flat(cut([3, 3, 1], [0, 5, 0, 5], 10))) == [1, 3, 3]


def test_best_fit_decreasing_by_hand() -> None:
    # 7 opens a pack, 6 another; 4 fits only beside 6 (room 4), 3 fits only beside 7 (room 3): two full packs of 10
    assert pack_step([0, 1, 2, 3], [3, 6, 7, 4], 10) == [[2, 0], [1, 3]]


# --- buckets --------------------------------------------------------------------------------------------------------


@given(LENGTHS, BUDGETS)
def test_every_document_of_a_step_is_in_exactly_one_batch_within_the_budget_and_the_spread(
    lengths: list[int], budget: int
) -> None:
    batches = bucket_step(range(len(lengths)), lengths, budget)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[index] for index in batch]
        assert len(batch) * max(sizes) <= budget or len(batch) == 1, "padding counts; one document may exceed it alone"
        assert max(sizes) <= BUCKET_SPREAD * min(sizes)


@given(LENGTHS, BUDGETS)
def test_a_batch_ends_only_where_the_next_document_would_break_the_budget_or_the_spread(
    lengths: list[int], budget: int
) -> None:
    batches = bucket_step(range(len(lengths)), lengths, budget)
    for batch, following in zip(batches, batches[1:]):
        longest, shorter = max(lengths[i] for i in batch), max(lengths[i] for i in following)
        assert (len(batch) + 1) * longest > budget or longest > BUCKET_SPREAD * shorter


def test_batches_by_hand() -> None:
    # 10 takes 8 (10 <= 1.25 x 8) but not 7; 7 takes 6 (7 <= 7.5), and 6 again would be 3 x 7 > 20; 6 takes 5
    assert bucket_step(range(6), [6, 10, 5, 7, 8, 6], 20) == [[1, 4], [3, 0], [5, 2]]


# --- layout ---------------------------------------------------------------------------------------------------------

Shape = tuple[int, int, int]
SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8)
LAYOUTS = [lay_out, lay_side_by_side]
WEIGHTS = st.builds(
    LossWeights,
    think=st.sampled_from([0.0, 0.25, 1.0, 3.0]),
    answer=st.sampled_from([0.0, 0.5, 1.0]),
    eos=st.sampled_from([0.5, 1.0, 2.0]),
)


def numbered(shapes: Sequence[Shape]) -> Documents:
    """Documents of (prompt, think, answer) tokens and an end whose ids say document and position: 1000 d + position."""
    return Documents.of(
        Document(
            [1000 * number + place for place in range(sum(shape) + 1)],
            bytes([PROMPT] * shape[0] + [THINK] * shape[1] + [ANSWER] * shape[2] + [EOS]),
            False,
        )
        for number, shape in enumerate(shapes)
    )


def predictions(pack: Pack) -> list[tuple[int, int]]:
    """(the token that predicts, the token that is predicted) of each supervised cell."""
    return list(zip(pack.ids_BT.reshape(-1)[pack.rows_N].tolist(), pack.targets_N.tolist(), strict=True))


def supervision(pack: Pack) -> Counter[Any]:
    """Every supervised token with what predicts it, its weight and its segment."""
    pairs = predictions(pack)
    return Counter(zip(pairs, pack.weights_N.tolist(), pack.segments_N.tolist(), strict=True))


@given(SHAPES, st.randoms())
def test_a_row_predicts_the_next_token_of_its_own_document_and_only_completions_are_predicted(
    shapes: list[Shape], rng: Any
) -> None:
    documents = numbered(shapes)
    order = list(range(len(shapes)))
    rng.shuffle(order)
    pack = lay_out(documents, order)
    assert pack.ids_BT.tolist() == [[token for index in order for token in documents.ids(index).tolist()]]
    assert pack.positions_BT.tolist() == [[place for index in order for place in range(documents.lengths[index])]]
    assert pack.bounds == [0, *np.cumsum([documents.lengths[index] for index in order]).tolist()]
    # what is predicted, from the definition: every token of every completion, each from the token before it
    places = {i: range(shapes[i][0], sum(shapes[i]) + 1) for i in order}
    expected = [(t - 1, t) for i in order for t in (1000 * i + place for place in places[i])]
    assert predictions(pack) == expected
    assert pack.weights_N.tolist() == [1.0] * len(expected) and pack.weight == len(expected)
    assert pack.ids_BT.dtype == pack.positions_BT.dtype == pack.rows_N.dtype == pack.targets_N.dtype == np.int64
    assert (pack.weights_N.dtype, pack.segments_N.dtype) == (np.float32, np.uint8)


@given(SHAPES, st.randoms())
def test_side_by_side_a_document_has_a_row_and_padding_is_neither_predicted_nor_predicts(
    shapes: list[Shape], rng: Any
) -> None:
    documents = numbered(shapes)
    order = list(range(len(shapes)))
    rng.shuffle(order)
    pack = lay_side_by_side(documents, order)
    longest = max(documents.lengths)
    assert pack.ids_BT.shape == pack.positions_BT.shape == (len(order), longest)
    assert pack.bounds is None
    used = set()
    for row, index in enumerate(order):
        length = int(documents.lengths[index])
        assert pack.ids_BT[row, :length].tolist() == documents.ids(index).tolist()
        assert not pack.ids_BT[row, length:].any()
        assert pack.positions_BT[row].tolist() == list(range(longest))
        used |= set(range(row * longest, row * longest + length - 1))
    assert set(pack.rows_N.tolist()) <= used, "a cell that predicts has a token of its own document after it"
    expected = supervision(lay_out(documents, order))
    assert supervision(pack) == expected
    assert pack.ids_BT.dtype == pack.positions_BT.dtype == pack.rows_N.dtype == pack.targets_N.dtype == np.int64
    assert (pack.weights_N.dtype, pack.segments_N.dtype) == (np.float32, np.uint8)


@given(SHAPES, WEIGHTS)
def test_each_segment_counts_with_its_weight_and_weight_0_removes_its_rows_in_both_layouts(
    shapes: list[Shape], weights: LossWeights
) -> None:
    documents = numbered(shapes)
    by_segment = {THINK: weights.think, ANSWER: weights.answer, EOS: weights.eos}
    expected: Counter[Any] = Counter()
    for number, (prompt, think, answer) in enumerate(shapes):
        kinds = [THINK] * think + [ANSWER] * answer + [EOS]
        for place, kind in enumerate(kinds, start=1000 * number + prompt):
            if by_segment[kind] > 0:
                expected[((place - 1, place), by_segment[kind], kind)] += 1
    for lay in LAYOUTS:
        pack = lay(documents, range(len(shapes)), weights)
        assert supervision(pack) == expected
        assert pack.weight == pytest.approx(sum(weight * n for (_, weight, _), n in expected.items()))


@given(SHAPES, WEIGHTS, st.integers(1, 60))
def test_a_step_supervises_the_same_tokens_however_it_is_cut(
    shapes: list[Shape], weights: LossWeights, budget: int
) -> None:
    documents = numbered(shapes)
    chosen = range(len(shapes))
    packed = [lay_out(documents, p, weights) for p in pack_step(chosen, documents.lengths, budget)]
    bucketed = [lay_side_by_side(documents, b, weights) for b in bucket_step(chosen, documents.lengths, budget)]
    totals = [sum((supervision(pack) for pack in packs), Counter()) for packs in (packed, bucketed)]
    assert totals[0] == totals[1]
    assert sum(pack.weight for pack in packed) == pytest.approx(sum(pack.weight for pack in bucketed))


def test_weights_by_hand() -> None:
    documents = numbered([(2, 2, 1), (1, 0, 1)])
    pack = lay_out(documents, [0, 1], LossWeights(think=0.5, answer=2, eos=4))
    assert pack.weights_N.tolist() == [0.5, 0.5, 2, 4, 2, 4]
    assert pack.weight == 13
    assert [pack.segments_N.tolist().count(kind) for kind in (PROMPT, THINK, ANSWER, EOS)] == [0, 2, 2, 2]
    answers = lay_out(documents, [0, 1], LossWeights(think=0))
    assert (answers.targets_N.tolist(), answers.rows_N.tolist()) == ([4, 5, 1001, 1002], [3, 4, 6, 7])


def test_several_answers_of_one_document_are_supervised_and_the_questions_between_them_are_not() -> None:
    kinds = bytes([PROMPT, ANSWER, EOS, PROMPT, PROMPT, THINK, ANSWER, EOS])
    documents = Documents.of([Document(list(range(10, 18)), kinds, False)])
    for lay in LAYOUTS:
        assert predictions(lay(documents, [0])) == [(10, 11), (11, 12), (14, 15), (15, 16), (16, 17)]


def test_the_last_prompt_token_predicts_the_first_completion_token_and_the_end_is_predicted() -> None:
    documents = numbered([(2, 1, 1), (1, 0, 0)])
    pack = lay_out(documents, [0, 1])
    assert pack.rows_N.tolist() == [1, 2, 3, 5]
    assert pack.targets_N.tolist() == [2, 3, 4, 1001]
    beside = lay_side_by_side(documents, [0, 1])
    assert beside.ids_BT.tolist() == [[0, 1, 2, 3, 4], [1000, 1001, 0, 0, 0]]
    assert (beside.rows_N.tolist(), beside.targets_N.tolist()) == ([1, 2, 3, 5], [2, 3, 4, 1001])


@pytest.mark.parametrize("lay", LAYOUTS)
def test_a_pack_without_supervised_tokens_is_refused(lay: Callable[..., Pack]) -> None:
    documents = Documents.of([Document([0, 1, 2], bytes([PROMPT] * 3), False)])
    with pytest.raises(TrainingError, match="no supervised tokens"):
        lay(documents, [0])
    thoughts = Documents.of([Document([0, 1, 2], bytes([PROMPT, THINK, THINK]), False)])
    assert len(lay(thoughts, [0]).rows_N) == 2
    with pytest.raises(TrainingError, match="no supervised tokens"):
        lay(thoughts, [0], LossWeights(think=0))


@pytest.mark.parametrize("lay", LAYOUTS)
def test_a_first_token_is_never_predicted_since_nothing_stands_before_it(lay: Callable[..., Pack]) -> None:
    bare = Documents.of([Document([4, 5, 6], bytes([THINK, THINK, EOS]), False)])
    assert predictions(lay(bare, [0])) == [(4, 5), (5, 6)]


def test_a_source_is_read_lazily_so_that_a_capped_training_plans_no_more_than_it_trains() -> None:
    order = epochs_of([Source(range(3))], [5, 5, 5], 1_000_000, seed=0)
    assert sorted(islice(order, 3)) == [0, 1, 2]
