"""NADO: the exact oracle gives the exact conditional law, and is the minimum of the loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tokenloom.decode.table import TableLM
from tokenloom.methods.decoding.nado import nado, nado_loss

A, B = 0, 1
# The first token is a with 0.6; then b follows a with 0.5, a follows b with 0.1: R of the empty text is 0.34.
TWO_STEPS = TableLM(2, lambda prefix: {(): (0.6, 0.4), (A,): (0.5, 0.5), (B,): (0.1, 0.9)}[prefix])


def oracle_odds(model: TableLM, accepts: dict[tuple[int, ...], float], prefix: tuple[int, ...], length: int) -> float:
    """R(prefix): the probability that the finished text is accepted."""
    if len(prefix) == length:
        return accepts[prefix]
    law = model.probs(prefix)
    return sum(
        float(law[v]) * oracle_odds(model, accepts, (*prefix, v), length) for v in range(model.vocab) if law[v] > 0
    )


def head_of(model: TableLM, accepts: dict[tuple[int, ...], float], prefix: tuple[int, ...], length: int) -> Tensor:
    """Exact logits of R for every next token; certainties as +-40, which float64 still tells from 0 and 1."""
    odds = [oracle_odds(model, accepts, (*prefix, v), length) for v in range(model.vocab)]
    return torch.tensor(odds, dtype=torch.float64).logit().clamp(-40, 40)


def test_two_step_toy() -> None:
    accepts = {(A, A): 0.0, (A, B): 1.0, (B, A): 1.0, (B, B): 0.0}
    odds = [oracle_odds(TWO_STEPS, accepts, p, 2) for p in ((), (A,), (B,))]
    assert odds == pytest.approx([0.34, 0.5, 0.1], abs=1e-12)
    first = nado(TWO_STEPS.probs(())[None].log(), head_of(TWO_STEPS, accepts, (), 2)[None]).exp()[0]
    assert first.tolist() == pytest.approx([0.3 / 0.34, 0.04 / 0.34], abs=1e-9)
    after = nado(TWO_STEPS.probs((A,))[None].log(), head_of(TWO_STEPS, accepts, (A,), 2)[None]).exp()[0]
    assert after.tolist() == pytest.approx([0.0, 1.0], abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_exact_odds_give_the_conditional_law_of_texts(seed: int) -> None:
    model, length = TableLM.random(3, seed), 3
    g = torch.Generator().manual_seed(seed)
    texts = list(itertools.product(range(3), repeat=length))
    accepts = {t: float(torch.rand((), generator=g) < 0.3) for t in texts}
    accepts[texts[seed]] = 1.0
    law = model.string_law((), length)
    total = sum(law[t] * accepts[t] for t in texts)
    for text in texts:
        q = 1.0
        for i in range(length):
            head = head_of(model, accepts, text[:i], length)
            if bool((head <= -40).all()):
                q = 0.0  # no text behind this prefix is accepted; it has no mass
                break
            q *= float(nado(model.probs(text[:i])[None].log(), head[None]).exp()[0, text[i]])
        assert q == pytest.approx(law[text] * accepts[text] / total, abs=1e-9)


def test_an_oracle_that_always_or_never_agrees_leaves_the_law() -> None:
    scores = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[0, 2] = -torch.inf
    for sure in (50.0, 900.0, -900.0):
        found = nado(scores, torch.full((2, 5), sure, dtype=torch.float64))
        torch.testing.assert_close(found, scores.log_softmax(-1), rtol=0, atol=1e-9)


def tabular_gradient(table: Tensor, accepts: dict[tuple[int, ...], float], consistency: float, reverse: bool) -> Tensor:
    """Of the expected loss over all texts of two tokens; rows of `table` [3, 2]: after nothing, a, b."""
    table = table.clone().requires_grad_(True)
    row = {(): 0, (A,): 1, (B,): 2}
    total = torch.zeros((), dtype=torch.float64)
    for text, mass in TWO_STEPS.string_law((), 2).items():
        states = [(), text[:1]]
        head = torch.stack([table[row[s]] for s in states])[None]
        base = torch.stack([TWO_STEPS.probs(s).log() for s in states])[None]
        label = torch.tensor([accepts[text]], dtype=torch.float64)
        mask = torch.ones(1, 2, dtype=torch.bool)
        total = total + mass * nado_loss(
            head, base, torch.tensor([text]), label, mask, consistency=consistency, reverse=reverse
        )
    (gradient,) = torch.autograd.grad(total, table)
    return gradient


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("consistency", [0.0, 1.0, 5.0])
def test_the_true_odds_are_the_minimum(consistency: float, reverse: bool) -> None:
    # Soft labels, so that the odds are inside (0, 1): the oracle accepts with these probabilities.
    accepts = {(A, A): 0.2, (A, B): 0.9, (B, A): 0.7, (B, B): 0.4}
    odds = [[oracle_odds(TWO_STEPS, accepts, (*s, v), 2) for v in (A, B)] for s in ((), (A,), (B,))]
    true = torch.tensor(odds, dtype=torch.float64).logit()
    gradient = tabular_gradient(true, accepts, consistency, reverse)
    torch.testing.assert_close(gradient, torch.zeros_like(true), rtol=0, atol=1e-12)
    elsewhere = tabular_gradient(true + 0.5, accepts, consistency, reverse)
    assert float(elsewhere.abs().max()) > 1e-2


@pytest.mark.parametrize("reverse", [False, True])
def test_consistency_vanishes_exactly_at_the_odds(reverse: bool) -> None:
    accepts = {(A, A): 0.2, (A, B): 0.9, (B, A): 0.7, (B, B): 0.4}
    head = torch.stack([head_of(TWO_STEPS, accepts, s, 2) for s in ((), (A,))])[None]
    base = torch.stack([TWO_STEPS.probs(s).log() for s in ((), (A,))])[None]
    given = (base, torch.tensor([[A, B]]), torch.tensor([1.0]), torch.ones(1, 2, dtype=torch.bool))
    apart = nado_loss(head, *given, reverse=reverse) - nado_loss(head, *given, consistency=0.0)
    assert abs(float(apart)) < 1e-12
    head[0, 1] += 1
    assert float(nado_loss(head, *given, reverse=reverse) - nado_loss(head, *given, consistency=0.0)) > 0.01


def test_padding_weights_and_the_base_law_get_no_gradient() -> None:
    head = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    head[1, 2] = torch.tensor([1e3, torch.inf, torch.nan, -torch.inf])
    head.requires_grad_(True)
    base = torch.randn(2, 3, 4, dtype=torch.float64).log_softmax(-1)
    base[1, 2] = torch.nan
    base.requires_grad_(True)
    tokens, labels = torch.tensor([[0, 1, 2], [3, 0, 0]]), torch.tensor([1.0, 0.0])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    loss = nado_loss(head, base, tokens, labels, mask)
    assert bool(loss.isfinite())
    loss.backward()
    assert head.grad is not None
    assert base.grad is None
    assert float(head.grad[1, 2].abs().max()) == 0.0
    assert bool(head.grad.isfinite().all())

    def alone(r: int) -> Tensor:
        part = slice(r, r + 1)
        return nado_loss(head[part], base[part], tokens[part], labels[part], mask[part])

    weighted = nado_loss(head, base, tokens, labels, mask, torch.tensor([3.0, 0.5]))
    torch.testing.assert_close(weighted, (3 * alone(0) + 0.5 * alone(1)) / 2)
