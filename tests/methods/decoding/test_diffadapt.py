"""DiffAdapt: labels, routes, and entropies by accuracy."""

from __future__ import annotations

import math

import pytest
import torch

from tokenloom.methods.decoding.diffadapt import EASY, HARD, NORMAL, difficulty_labels, entropy_by_accuracy, route


def test_labels_by_hand() -> None:
    accuracy = torch.tensor([0.0, 0.39, 0.4, 0.7, 0.8, 1.0, 1.0])
    entropy = torch.tensor([0.9, 0.1, 0.9, 0.9, 0.2, 0.3, 0.6])
    found = difficulty_labels(accuracy, entropy).tolist()
    assert found == [HARD, HARD, NORMAL, NORMAL, NORMAL, EASY, EASY]
    assert difficulty_labels(accuracy, entropy, quantile=1.0).tolist()[4:] == [NORMAL, NORMAL, EASY]
    assert difficulty_labels(accuracy[:4], entropy[:4]).tolist() == [HARD, HARD, NORMAL, NORMAL]


def test_routes_take_the_likeliest_and_normal_among_equals() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2], [0.4, 0.2, 0.4], [1 / 3, 1 / 3, 1 / 3]])
    assert route(p).tolist() == [EASY, HARD, NORMAL, HARD, NORMAL]


def test_entropy_curve_and_its_drop() -> None:
    accuracy = torch.tensor([0.0, 0.1, 0.6, 0.8, 1.0])
    means, drop = entropy_by_accuracy(accuracy, torch.tensor([1.0, 2.0, 0.6, 0.9, 0.7]))
    assert means[[0, 3, 4]].tolist() == pytest.approx([1.5, 0.6, 0.8])
    assert all(math.isnan(m) for m in means[[1, 2]].tolist())
    assert drop == pytest.approx(0.25)
    assert math.isnan(entropy_by_accuracy(accuracy, torch.zeros(5))[1])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="low <= high"):
        difficulty_labels(torch.ones(1), torch.ones(1), low=0.9, high=0.1)
    with pytest.raises(ValueError, match="bins"):
        entropy_by_accuracy(torch.ones(0), torch.ones(0))
