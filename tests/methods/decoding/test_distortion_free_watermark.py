"""The distortion-free watermark: both samplers draw from the law, and alignment finds the key."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tokenloom.methods.decoding.distortion_free_watermark import (
    block_statistic,
    edit_statistic,
    exp_choice,
    exp_costs,
    its_choice,
    its_costs,
    p_value,
)

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_exp_draws_from_the_law_and_moves_its_statistic() -> None:
    n = 200_000
    xi = torch.rand(n, 3, generator=_generator(0), dtype=torch.float64)
    chosen = exp_choice(P.expand(n, 3), xi)
    counts = torch.bincount(chosen, minlength=3)
    chi2 = float(((counts - n * P) ** 2 / (n * P)).sum())
    assert chi2 < 18.4, "p < 1e-4 with 2 degrees of freedom"
    expected = float((P * (torch.special.digamma(1 + 1 / P) + 0.5772156649015329)).sum())
    assert expected == pytest.approx(1.78379, abs=1e-5)
    measured = -exp_costs(xi.gather(1, chosen[:, None]))
    assert float(measured.mean()) == pytest.approx(expected, abs=0.02)
    assert float(-exp_costs(xi[:, 0]).mean()) == pytest.approx(1.0, abs=0.01)


def test_exp_region_has_the_area_of_the_law() -> None:
    """For two tokens, the area where token 1 is chosen: ξ_1 > ξ_0^(p_1/p_0), so its edge is known."""
    p = torch.tensor([0.7, 0.3], dtype=torch.float64)
    for first in (0.05, 0.3, 0.6, 0.95):
        edge = first ** (0.3 / 0.7)
        xi = torch.tensor([[first, edge - 1e-9], [first, edge + 1e-9]], dtype=torch.float64)
        assert exp_choice(p.expand(2, 2), xi).tolist() == [0, 1]
    # ∫ (1 - x^(3/7)) dx = 1 - 1 / (1 + 3/7) = 0.3
    assert pytest.approx(0.3) == 1 - 1 / (1 + 0.3 / 0.7)


def test_exp_gives_tokens_of_little_mass_their_share() -> None:
    # Each of n elements lets token 1 win with probability 1e-9 where its number is 1 - 5e-10 and the other's is 0.5.
    p = torch.tensor([[1 - 1e-9, 1e-9]], dtype=torch.float64)
    assert exp_choice(p, torch.tensor([[0.5, 1 - 5e-10]], dtype=torch.float64)).tolist() == [1]
    assert exp_choice(p, torch.tensor([[0.5, 1 - 8e-10]], dtype=torch.float64)).tolist() == [0]


def test_exp_edges() -> None:
    xi = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]])
    probs = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    assert exp_choice(probs, xi).tolist() == [2, 2]
    tiny = torch.tensor([[1e-300, 1.0 - 1e-300]], dtype=torch.float64)
    assert exp_choice(tiny, torch.tensor([[0.9, 0.1]])).tolist() == [1]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_its_intervals_are_the_law(order: tuple[int, ...]) -> None:
    permutation = torch.tensor(order)
    edges = torch.cat((torch.zeros(1, dtype=torch.float64), P[permutation].cumsum(0)))
    for place, token in enumerate(order):
        inside = torch.tensor([float(edges[place]) + 1e-12, float(edges[place + 1]) - 1e-12], dtype=torch.float64)
        assert its_choice(P.expand(2, 3), inside, permutation).tolist() == [token, token]
    assert its_choice(torch.tensor([[0.0, 1.0, 0.0]] * 2), torch.tensor([0.0, 1.0]), permutation).tolist() == [1, 1]


def _brute(costs: Tensor, k: int, gamma: float | None) -> float:
    _, m, n = costs.shape
    best = math.inf
    for i in range(m - k + 1):
        for j in range(n):
            d = [[float(costs[0, i + a, (j + b) % n]) for b in range(k)] for a in range(k)]
            if gamma is None:
                best = min(best, sum(d[a][a] for a in range(k)))
                continue
            table = [[0.0] * (k + 1) for _ in range(k + 1)]
            for a, b in itertools.product(range(k + 1), repeat=2):
                if a == 0 or b == 0:
                    table[a][b] = (a + b) * gamma
                else:
                    table[a][b] = min(
                        table[a - 1][b] + gamma, table[a][b - 1] + gamma, table[a - 1][b - 1] + d[a - 1][b - 1]
                    )
            best = min(best, table[k][k])
    return best


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, None), (5, 3, None), (4, 7, None), (6, 4, 3), (6, 4, 1), (3, 9, 2)])
def test_statistics_equal_the_plain_loops(m: int, n: int, k: int | None) -> None:
    costs = torch.randn(3, m, n, generator=_generator(m * n), dtype=torch.float64)
    for t in range(3):
        one = costs[t : t + 1]
        assert float(block_statistic(costs, block=k)[t]) == pytest.approx(_brute(one, k or m, None), abs=1e-9)
        for gamma in (0.0, 0.4):
            ours = float(edit_statistic(costs, gamma=gamma, block=k)[t])
            assert ours == pytest.approx(_brute(one, k or m, gamma), abs=1e-9)


def test_costs() -> None:
    costs = its_costs(torch.tensor([[0.1, 0.9]]), torch.tensor([[0.0, 0.5, 1.0]]))
    torch.testing.assert_close(costs, torch.tensor([[[0.1, 0.9], [0.4, 0.4], [0.9, 0.1]]]))
    assert math.isfinite(float(exp_costs(torch.tensor(1.0))))


def test_a_deleted_token_breaks_the_block_but_not_the_edit_cost() -> None:
    """Token i meets element i at cost -9, everything else at 0; then one token is deleted in the middle."""
    n = 20
    costs = torch.zeros(1, n, n, dtype=torch.float64)
    costs[0].fill_diagonal_(-9.0)
    cut = torch.cat((costs[:, :10], costs[:, 11:]), 1)
    assert float(block_statistic(costs)) == -9.0 * 20
    assert float(block_statistic(cut)) == -9.0 * 10
    assert float(edit_statistic(cut)) == -9.0 * 18, (
        "nineteen tokens against nineteen elements, of which one is no token's"
    )
    assert float(edit_statistic(cut, gamma=0.4)) == pytest.approx(-9.0 * 18 + 0.8)
    moved = costs.roll(7, 2)
    assert float(block_statistic(moved)) == -9.0 * 20, "the key is cyclic"
    assert float(edit_statistic(moved)) == -9.0 * 20


def test_p_values_and_errors() -> None:
    assert p_value(-5.0, torch.tensor([-4.0, -3.0, -5.0, 0.0])) == pytest.approx(2 / 5)
    assert p_value(-9.0, torch.zeros(99)) == pytest.approx(0.01)
    for statistic in (block_statistic, edit_statistic):
        with pytest.raises(ValueError, match="block of 4"):
            statistic(torch.zeros(1, 3, 3), block=4)
