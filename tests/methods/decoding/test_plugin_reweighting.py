"""Plugin: the product and the loss of its training."""

from __future__ import annotations

import pytest
import torch

from tests.methods.decoding.truncation import random_scores
from tokenloom.methods.decoding.plugin_reweighting import from_top_logprobs, plugin_loss, plugin_reweighting


def test_worked_numbers() -> None:
    b = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    r = torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64)
    # Products .10, .06, .12 sum to .28.
    law = plugin_reweighting(b.log(), r.log()).softmax(-1)
    torch.testing.assert_close(law, torch.tensor([[0.10, 0.06, 0.12]], dtype=torch.float64) / 0.28)
    loss = plugin_loss(b.log() + 1, r.log() - 3, torch.tensor([2]))
    torch.testing.assert_close(loss, -torch.tensor([0.12 / 0.28], dtype=torch.float64).log())


def test_a_uniform_plugin_leaves_the_law_and_factors_commute() -> None:
    base, plugin = random_scores(seed=1), random_scores(seed=2)
    uniform = torch.full_like(base, 3.0)
    torch.testing.assert_close(plugin_reweighting(base, uniform).softmax(-1), base.softmax(-1))
    one, other = (plugin_reweighting(x, y).softmax(-1) for x, y in ((base, plugin), (plugin, base)))
    torch.testing.assert_close(one, other)


def test_the_base_gets_no_gradient() -> None:
    base = random_scores().masked_fill(random_scores().isinf(), -20.0).requires_grad_()
    plugin = torch.zeros_like(base).requires_grad_()
    plugin_loss(base, plugin, torch.zeros(64, dtype=torch.int64)).sum().backward()
    assert base.grad is None
    assert plugin.grad is not None
    # d(-log softmax) = product - one-hot of the label.
    expected = base.detach().softmax(-1) - torch.eye(200, dtype=torch.float64)[0]
    torch.testing.assert_close(plugin.grad, expected)


def test_the_optimum_is_the_empirical_law() -> None:
    base = torch.tensor([0.7, 0.2, 0.06, 0.04], dtype=torch.float64).log()
    counts = torch.tensor([1.0, 5.0, 2.0, 2.0], dtype=torch.float64)
    plugin = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([plugin], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (counts * plugin_loss(base.expand(4, 4), plugin.expand(4, 4), torch.arange(4))).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    law = plugin_reweighting(base[None], plugin.detach()[None]).softmax(-1)[0]
    torch.testing.assert_close(law, counts / 10, rtol=0, atol=1e-6)


def test_missing_logprobs_are_filled_or_ruled_out() -> None:
    ids, logprobs = torch.tensor([[3, 1]]), torch.tensor([[0.6, 0.3]]).log()
    filled = from_top_logprobs(ids, logprobs, 5).softmax(-1)
    torch.testing.assert_close(filled, torch.tensor([[0.3, 0.3, 0.3, 0.6, 0.3]]) / 1.8)
    only = from_top_logprobs(ids, logprobs, 5, missing="impossible").softmax(-1)
    torch.testing.assert_close(only, torch.tensor([[0.0, 1 / 3, 0.0, 2 / 3, 0.0]]))


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="share the base's vocabulary"):
        plugin_loss(torch.zeros(2, 4), torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))
