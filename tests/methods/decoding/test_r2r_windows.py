"""R2R's rolling windows: uncertainty by hand and by integration, the automaton against one written out, its limits."""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch

from methods.policy_optimization.batch import close
from tokenloom.methods.decoding.r2r_windows import no_window, route_by_window, uncertainty


def test_uncertainty_worked_by_hand() -> None:
    # Evidence (2, 1), S = 3: psi(3) - psi(4) = -1/3, psi(2) - psi(4) = -1/2 - 1/3.
    aleatoric, epistemic = uncertainty(torch.tensor([[1.0, -3.0, 2.0, -0.5]], dtype=torch.float64), top=2)
    close(aleatoric, [2 / 3 * 1 / 3 + 1 / 3 * 5 / 6])
    close(epistemic, [2 / 5])


def test_the_aleatoric_part_is_the_mean_entropy_under_a_dirichlet_law() -> None:
    evidence = torch.tensor([3.0, 1.5, 0.7], dtype=torch.float64)
    # E[-p log p] of a beta marginal, by the midpoint rule.
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    total = evidence.sum()
    expected = 0.0
    for a in evidence:
        b = total - a
        log_density = (a - 1) * grid.log() + (b - 1) * torch.log1p(-grid)
        log_density = log_density - (torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(total))
        expected += float((log_density.exp() * torch.special.entr(grid)).mean())
    close(uncertainty(evidence[None], top=3)[0], [expected], 1e-4)


def test_bounds_and_what_is_no_evidence() -> None:
    equal = torch.full((1, 50), 1e4, dtype=torch.float64)
    close(uncertainty(equal)[0], [math.log(10)], 1e-3)
    assert float(uncertainty(torch.full((1, 50), 20.0))[0]) < math.log(10)
    one = torch.full((2, 50), -5.0)
    one[0, 3] = 30.0
    aleatoric, epistemic = uncertainty(one)
    close(aleatoric, [0.0, 0.0], 1e-6)  # one token alone; none at all
    close(epistemic, [10 / 40, 1.0], 1e-6)
    for dtype in (torch.bfloat16, torch.float32):
        scores = torch.randn(4, 60, generator=torch.Generator().manual_seed(0)).mul(3).add(15).to(dtype)
        assert uncertainty(scores)[0].dtype == torch.float32
        close(uncertainty(scores)[0].double(), uncertainty(scores.double())[0], 1e-5)
    with pytest.raises(ValueError, match="top=0"):
        uncertainty(one, top=0)
    assert uncertainty(torch.ones(1, 3), top=10)[1].item() == 0.5


def written_out(
    values: list[float], entropies: list[float], size: int, threshold: float, entropy: float, carry: bool
) -> list[bool]:
    """One row, with a queue."""
    large, window, answers = True, deque[float](maxlen=size), []
    for a, h in zip(values, entropies, strict=True):
        if large:
            window.append(a)
            large = sum(window) / len(window) >= threshold
            if not large:
                window.clear()
        elif a >= threshold and h >= entropy:
            large = True
            window.clear()
            if carry:
                window.append(a)
        answers.append(large)
    return answers


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_rows_follow_the_automaton(size: int, carry: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    values = torch.rand(8, 60, generator=generator, dtype=torch.float64) * 4
    entropies = torch.rand(8, 60, generator=generator, dtype=torch.float64)
    window, asking = no_window(8, size=size)
    window = window.double()
    found = []
    for t in range(60):
        asking, window = route_by_window(
            values[:, t], entropies[:, t], window, asking, threshold=2.0, entropy=0.3, carry=carry
        )
        found.append(asking)
        assert bool(window[~asking].isnan().all())
    answers = torch.stack(found, 1)
    assert 0.2 < float(answers.double().mean()) < 0.8
    for row in range(8):
        assert answers[row].tolist() == written_out(
            values[row].tolist(), entropies[row].tolist(), size, 2.0, 0.3, carry
        )


def test_a_window_of_one_asks_where_the_uncertainty_is_high() -> None:
    values = torch.tensor([2.3, 2.2, 2.275, 2.274, 2.3, 2.3, 0.0])
    window, asking = no_window(1, size=1)
    answers = []
    for a in values:
        asking, window = route_by_window(a[None], torch.zeros(1), window, asking, entropy=0.0)
        answers.append(bool(asking))
    assert answers == (values >= 2.275).tolist()


def test_the_worked_example() -> None:
    # Begins with the large model: mean(1) < 2 goes back at once. 3 asks. (3, 1.5) and (3, 1.5, 1.6) are above 2,
    # (1.5, 1.6, 1.7) is not. Then a certain token (H = 0.01) does not ask.
    values, answers = [1.0, 3.0, 1.5, 1.6, 1.7, 3.0], []
    entropies = [1.0, 1.0, 1.0, 1.0, 1.0, 0.01]
    window, asking = no_window(1)
    for a, h in zip(values, entropies, strict=True):
        asking, window = route_by_window(torch.tensor([a]), torch.tensor([h]), window, asking, threshold=2.0)
        answers.append(bool(asking))
    assert answers == [False, True, True, True, False, False]
