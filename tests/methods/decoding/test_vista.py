"""VISTA's formulas: norms stay, the limits, worked numbers, directions of one pair and of several."""

from __future__ import annotations

import pytest
import torch

from methods.policy_optimization.batch import close
from tokenloom.methods.decoding.vista import self_logits_augmentation, steer, steering_directions


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_worked_numbers() -> None:
    x = torch.tensor([[3.0, 4.0], [-5.0, 0.0]], dtype=torch.float64)
    d = torch.tensor([2.0, 0.0], dtype=torch.float64)
    # Row 0 points along d already: s = 1. Row 1 points away: s = 2 and (-1, 0) + 0.2 (1, 0) keeps its direction.
    first = torch.tensor([0.6 + 0.1, 0.8], dtype=torch.float64)
    close(steer(x, d)[0], 5 * first / first.norm())
    close(steer(x, d)[1], [-5.0, 0.0])
    close(steer(x, d, strength=0.6)[1], [5.0, 0.0])


def test_norms_stay_and_no_strength_is_no_change() -> None:
    x, d = 7 * random(3, 4, 8), random(8, seed=1)
    close(steer(x, d, strength=0.3).norm(dim=-1), x.norm(dim=-1))
    close(steer(x, d, strength=0.0), x)
    close(steer(x, torch.zeros(8)), x)
    assert not torch.allclose(steer(x, d), x)
    assert torch.equal(steer(torch.zeros(1, 8), d.float()), torch.zeros(1, 8))
    assert steer(x.bfloat16(), d).dtype == torch.bfloat16


def test_what_points_away_is_turned_more() -> None:
    d = torch.tensor([1.0, 0.0], dtype=torch.float64)
    x = torch.tensor([[0.6, 0.8], [-0.6, 0.8]], dtype=torch.float64)
    near, far = steer(x, d, strength=0.1)
    for turned, own, s in ((near, x[0], 1.0), (far, x[1], 1.6)):
        wanted = own + 0.1 * s * d
        close(turned, wanted / wanted.norm())


def test_augmented_logits() -> None:
    z, late = random(2, 5), random(3, 2, 5, seed=1)
    close(self_logits_augmentation(z, late, gamma=0.0), z)
    close(self_logits_augmentation(z, z[None]), z)
    close(self_logits_augmentation(z, late), 0.7 * z + 0.1 * (late[0] + late[1] + late[2]))


def test_directions() -> None:
    plus, minus = random(1, 3, 6), random(1, 3, 6, seed=1)
    close(steering_directions(plus, minus), (plus - minus)[0])
    # Differences m + t u with t = -1, 0, 1: mean m, and the principal direction is u, on the side of m.
    m, u = random(2, 6, seed=2), torch.nn.functional.normalize(random(2, 6, seed=3), dim=-1)
    steps = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[:, None, None]
    sign = (m * u).sum(-1, keepdim=True).sign()
    close(steering_directions(m + steps * u, torch.zeros(3, 2, 6).double()), m + sign * u)
    with pytest.raises(ValueError, match="N, Lyr, D"):
        steering_directions(plus, minus[0])
