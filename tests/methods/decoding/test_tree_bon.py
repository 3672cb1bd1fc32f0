"""TreeBoN's rules: the weighted implicit reward and the choice of parents."""

from __future__ import annotations

import pytest
import torch

from tokenloom.methods.decoding.tree_bon import implicit_reward, parents


def test_worked_reward() -> None:
    ref = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64)
    ratio = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    assert float(implicit_reward(ref + ratio, ref)[0]) == pytest.approx(1.0, abs=1e-12)  # 1 - 2/2 + 3/3
    assert implicit_reward(ref, ref).tolist() == [0.0]
    assert float(implicit_reward(torch.tensor([-1.0]), torch.tensor([-3.0]))) == 2.0


def test_parents_are_the_best_in_their_order() -> None:
    assert parents([0.0, 3.0, 1.0, 3.0], n=4, children=2) == [1, 3]
    assert parents([2.0, 2.0, 2.0, 2.0], n=4, children=4) == [0]
    assert parents([5.0, 1.0], n=4, children=1) == [0, 1]
    for settings in ({"n": 5, "children": 2}, {"n": 0, "children": 1}, {"n": 2, "children": 0}):
        with pytest.raises(ValueError, match="multiple of"):
            parents([0.0], **settings)
