"""What is kept of a distribution: exact heads and tails, and draws with exactly the right chances."""

import numpy as np
import pytest
import torch

from distill.logprobs import Facts
from distill.teachers.distributions import drawn, kept, likeliest, uniforms

FACTS = Facts("hybrid", 2, 40, 1.0, 0, 6, "t" * 64)


def log_p_of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).log()


def test_head_and_tail_by_hand() -> None:
    head, tail, rest = likeliest(log_p_of([0.5, 0.0, 0.3, 0.15, 0.05, 0.0]), 2)
    assert head.indices.tolist() == [[0, 2]] and torch.allclose(tail.exp(), torch.tensor([0.2]))
    assert torch.allclose(rest.exp(), torch.tensor([[0.0, 0.0, 0.0, 0.15, 0.05, 0.0]]))


def test_a_tail_far_below_the_rounding_of_one_is_still_exact() -> None:
    tiny = 1e-12
    _, tail, _ = likeliest(torch.log(torch.tensor([[1.0, tiny, tiny]])), 1)
    assert tail.exp().item() == pytest.approx(2 * tiny, rel=1e-5), "1 - head would be 0"


def test_columns_without_a_name_count_in_the_tail_only() -> None:
    names = torch.tensor([4, -1, 9])
    facts = FACTS._replace(form="topk", k=2, draws=0)
    rows = kept(log_p_of([0.2, 0.7, 0.1]), None, facts, names)
    assert rows.head_ids.tolist() == [[4, 9]] and np.allclose(np.exp(rows.tail_log_p), [0.7])


def test_every_token_is_drawn_with_exactly_its_chance() -> None:
    """Midpoints of a fine grid instead of random numbers: counts are then the probabilities themselves."""
    p = [0.05, 0.0, 0.25, 0.3, 0.4, 0.0]
    grid = ((np.arange(100) + 0.5) / 100)[None]
    sizes, ids, counts = drawn(log_p_of(p), grid)
    assert sizes.tolist() == [4] and ids.tolist() == [0, 2, 3, 4] and counts.tolist() == [5, 25, 30, 40]


def test_draws_come_from_what_is_left_of_a_head() -> None:
    p = [0.5, 0.0, 0.3, 0.15, 0.05, 0.0]
    rows = kept(log_p_of(p), ((np.arange(40) + 0.5) / 40)[None], FACTS)
    assert rows.head_ids.tolist() == [[0, 2]] and rows.ids.tolist() == [3, 4] and rows.counts.tolist() == [30, 10]


def test_a_row_without_a_tail_draws_nothing() -> None:
    rows = kept(log_p_of([0.5, 0.5, 0, 0, 0, 0], [0.25, 0.25, 0.5, 0, 0, 0]), np.full((2, 40), 0.3), FACTS)
    assert rows.sizes.tolist() == [0, 1] and rows.counts.tolist() == [40]


def test_the_edges_of_the_unit_interval_name_real_tokens() -> None:
    edge = np.nextafter(1.0, 0.0)
    sizes, ids, _ = drawn(log_p_of([0.0, 0.5, 0.5, 0.0]), np.array([[0.0, edge]]))
    assert sizes.tolist() == [2] and ids.tolist() == [1, 2]


def test_many_rows_keep_their_own_tokens() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(6), size=9)
    numbers = rng.random((9, 40))
    whole = drawn(log_p_of(*p.tolist()), numbers)
    parts = [drawn(log_p_of(p[row].tolist()), numbers[row : row + 1]) for row in range(9)]
    for at in range(3):
        assert np.array_equal(whole[at], np.concatenate([part[at] for part in parts]))


def test_numbers_follow_from_seed_and_document_alone() -> None:
    one = uniforms(3, b"k" * 16, 4, 5)
    assert one.shape == (4, 5) and ((one >= 0) & (one < 1)).all()
    assert np.array_equal(one, uniforms(3, b"k" * 16, 4, 5))
    assert not np.array_equal(one, uniforms(4, b"k" * 16, 4, 5))
    assert not np.array_equal(one, uniforms(3, b"l" * 16, 4, 5))
    assert np.array_equal(one[:2], uniforms(3, b"k" * 16, 2, 5)), "a longer document begins alike"


def test_frequencies_approach_the_distribution() -> None:
    p = [0.02, 0.08, 0.2, 0.3, 0.4, 0.0]
    _, ids, counts = drawn(log_p_of(p), uniforms(0, b"d" * 16, 1, 200_000))
    found = np.zeros(6)
    found[ids] = counts / 200_000
    spread = np.sqrt(np.array(p) * (1 - np.array(p)) / 200_000)
    assert (np.abs(found - p) <= 5 * spread + 1e-12).all()
