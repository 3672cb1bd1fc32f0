"""UID: worked regularizers, incremental objectives, metrics."""

from __future__ import annotations

import pytest
import torch

from tokenloom.methods.decoding.uid_decoding import metrics, next_objectives, objective

U = torch.tensor([1.0, 3.0, 2.0, 2.0], dtype=torch.float64)
LEAST = torch.tensor([1.0, 1.0, 0.5, 2.0], dtype=torch.float64)
ALL = ["greedy", "variance", "local-variance", "max", "square"]


@pytest.mark.parametrize(
    ("regularizer", "expected"),
    [("greedy", 4 + 2.25), ("variance", 0.5), ("local-variance", 1.5), ("max", 3.0), ("square", 18.0)],
)
def test_worked_numbers(regularizer: str, expected: float) -> None:
    assert float(objective(U, LEAST, regularizer=regularizer, lam=2.0)) == pytest.approx(-8 - 2 * expected, abs=1e-12)  # type: ignore[arg-type]
    assert float(objective(U, LEAST, regularizer=regularizer, lam=0.0)) == -8.0  # type: ignore[arg-type]


def test_a_single_token() -> None:
    one = torch.tensor([2.0], dtype=torch.float64)
    found = [float(objective(one, one, regularizer=r, lam=1.0)) for r in ALL]  # type: ignore[arg-type]
    assert found == [-2.0, -2.0, -6.0, -4.0, -6.0]


@pytest.mark.parametrize("regularizer", ALL)
@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_a_step_equals_recomputation(regularizer: str, length: int) -> None:
    g = torch.Generator().manual_seed(length)
    following = torch.rand(9, generator=g, dtype=torch.float64) * 4
    following[3] = torch.inf
    past, least = torch.rand(2, length, generator=g, dtype=torch.float64) * 3
    found = next_objectives(past, least, following, regularizer=regularizer, lam=1.7)  # type: ignore[arg-type]
    for v, u in enumerate(following):
        if v == 3:
            assert found[v] == -torch.inf
            continue
        whole = torch.cat((past, u[None]))
        expected = objective(whole, torch.cat((least, following.min()[None])), regularizer=regularizer, lam=1.7)  # type: ignore[arg-type]
        assert float(found[v]) == pytest.approx(float(expected), abs=1e-9)


def test_without_weight_impossible_tokens_stay_impossible() -> None:
    following = torch.tensor([1.0, torch.inf])
    for regularizer in ALL:
        assert next_objectives(U, LEAST, following, regularizer=regularizer, lam=0.0).tolist() == [-9.0, -torch.inf]  # type: ignore[arg-type]


def test_metrics() -> None:
    found = metrics(U)
    assert found == pytest.approx(
        {"mean": 2.0, "variance": 0.5, "local_variance": 1.5, "max": 3.0, "square": 18.0, "cv": 0.5**0.5 / 2}
    )
    assert metrics(torch.zeros(2))["cv"] == 0.0
    with pytest.raises(ValueError, match="no tokens"):
        metrics(torch.zeros(0))
