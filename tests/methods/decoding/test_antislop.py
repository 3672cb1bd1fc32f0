"""Antislop's formulas: exclusion, the soft form, the FTPO loss with its tethers, the profile."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from methods.policy_optimization.batch import close
from tokenloom.methods.decoding.antislop import (
    Overused,
    down_weighted,
    ftpo_loss,
    slop_profile,
    term_counts,
    without_tried,
)

SCORES = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64).log()
NO_TETHER = {"rest": 0.0, "spread": 0.0, "target": 0.0}


def test_exclusion_renormalizes_the_law() -> None:
    tried = torch.tensor([[False, True, False, False], [True, False, False, True]])
    close(without_tried(SCORES, tried).softmax(-1), [[1 / 8, 0, 3 / 8, 4 / 8], [0, 0.5, 0.5, 0]])
    assert torch.equal(without_tried(SCORES, torch.zeros_like(tried)), SCORES)


def test_the_soft_form_scales_the_law() -> None:
    factors = torch.tensor([[1.0, 1.0, 1.0, 0.25], [0.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    close(down_weighted(SCORES, factors).softmax(-1), [[1 / 7, 2 / 7, 3 / 7, 1 / 7], [0, 1 / 3, 1 / 3, 1 / 3]])
    close(down_weighted(SCORES, torch.ones_like(SCORES)), SCORES)


def one(b: float, *c: float, others: tuple[float, ...] = (0.0, 0.0)) -> tuple[torch.Tensor, ...]:
    """A row whose token 0 is rejected and whose next ones are chosen."""
    logits = torch.tensor([[b, *c, *others]], dtype=torch.float64)
    ids = torch.arange(1, 1 + len(c))[None]
    return logits, torch.tensor([0]), ids, torch.ones_like(ids, dtype=torch.bool)


def test_the_preference_worked_by_hand() -> None:
    logits, rejected, chosen, mask = one(2.0, 1.0, 5.0)
    close(ftpo_loss(logits, logits, rejected, chosen, mask), 3.048587, 1e-6)  # D = (-1, 3), w = (1, 0)
    logits, rejected, chosen, mask = one(2.0, 3.0, 5.0)
    close(ftpo_loss(logits, logits, rejected, chosen, mask), math.log1p(math.e))  # w = (1/2, 0)
    # All beyond the margin: w = 1 for each.
    logits, rejected, chosen, mask = one(0.0, 3.0, 5.0)
    close(ftpo_loss(logits, logits, rejected, chosen, mask), (math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 2)


def test_sums_are_over_the_batch_and_padding_is_nothing() -> None:
    logits = torch.tensor([[2.0, 1.0, 5.0, 0.0], [1.0, 0.0, 2.0, 2.0]], dtype=torch.float64)
    chosen = torch.tensor([[1, 2], [2, 99]])
    mask = torch.tensor([[True, True], [True, False]])
    found = ftpo_loss(logits, logits, torch.tensor([0, 0]), chosen, mask)
    soft = [math.log1p(math.exp(3)), math.log1p(math.e)]
    close(found, (soft[0] + 0.5 * soft[1]) / 1.5)


def test_tethers_worked_by_hand() -> None:
    reference, rejected, chosen, mask = one(0.0, 0.0, 0.0)
    moved = reference + torch.tensor([[3.0, 4.0, 5.0, 0.5, -1.0]], dtype=torch.float64)
    settings = [{"rest": 1.0}, {"spread": 1.0}, {"target": 1.0}]
    base = ftpo_loss(moved, reference, rejected, chosen, mask, **NO_TETHER)
    found = [ftpo_loss(moved, reference, rejected, chosen, mask, **NO_TETHER | s) - base for s in settings]
    close(torch.stack(found), [(0.25 + 1.0) / 2, (4.0 - 2.0) ** 2, (4 + 9 + 16) / 3])
    total = ftpo_loss(moved, reference, rejected, chosen, mask)
    close(total, base + 0.4 * found[0] + 0.1 * found[1] + 0.05 * found[2])
    near = reference + 0.9
    close(ftpo_loss(near, reference, rejected, chosen, mask, rest=0.0), ftpo_loss(near, near, rejected, chosen, mask))


def test_weights_carry_a_gradient_only_as_in_the_release() -> None:
    logits, rejected, chosen, mask = one(2.0, 2.5, 3.0)
    for detach in (True, False):
        leaf = logits.clone().requires_grad_()
        ftpo_loss(leaf, logits, rejected, chosen, mask, detach_weights=detach).backward()
        d = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
        w = (2 - d) / 2
        w = w.detach() if detach else w
        ((w * torch.nn.functional.softplus(2 - d)).sum() / w.sum()).backward()
        close(leaf.grad[0], [-float(d.grad.sum()), *d.grad.tolist(), 0.0, 0.0])
    assert float(leaf.grad[0, 0]) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_is_that_of_the_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Moves beyond the free zones, so that every tether pulls.
    reference = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    moved = (reference + 5 * torch.randn(3, 9, generator=generator, dtype=torch.float64)).to(dtype).double()
    rejected, chosen = torch.tensor([0, 4, 8]), torch.tensor([[1, 2], [5, 0], [7, 7]])
    mask = torch.tensor([[True, True], [True, False], [True, False]])

    def loss(logits: torch.Tensor, **settings: object) -> torch.Tensor:
        return ftpo_loss(logits, reference, rejected, chosen, mask, **settings)  # type: ignore[arg-type]

    leaf = moved.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, detach_weights=False), leaf)
    low = moved.to(dtype).requires_grad_()
    ftpo_loss(low, reference.to(dtype), rejected, chosen, mask).backward()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    close(low.grad.double(), expected, 1e-12 if dtype == torch.float64 else 0.05)
    # What is not a target is only pulled back to where it was, and nothing pulls it there without the tether.
    targets = torch.zeros(3, 9, dtype=torch.bool)
    targets[[0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 4, 5, 8, 7]] = True
    count = float((~targets).sum())
    close(expected[~targets], 0.4 * 2 * (moved - reference)[~targets] / count)
    (free,) = torch.autograd.grad(loss(leaf, rest=0.0), leaf)
    assert bool((free[~targets] == 0).all())
    close(ftpo_loss(moved[:, :], reference, rejected, chosen.flip(-1), mask.flip(-1)), loss(moved))


def test_impossible_rows_are_refused() -> None:
    logits, rejected, chosen, mask = one(2.0, 1.0)
    for row in ((chosen, ~mask), (chosen * 0, mask)):
        with pytest.raises(ValueError, match="chosen"):
            ftpo_loss(logits, logits, rejected, *row)


def test_counts_leave_stop_words_out_before_ngrams_are_made() -> None:
    texts = ["A testament to the WILL, don't you see?", "Testament of will"]
    assert term_counts(texts) == Counter({"testament": 2, "don't": 1, "see": 1, "will": 0})
    assert term_counts(texts, stop_words=())["the"] == 1
    assert term_counts(["the voice of a whisper, barely above a whisper"], 2) == Counter(
        {"voice whisper": 1, "whisper barely": 1, "barely above": 1, "above whisper": 1}
    )


def test_the_profile_worked_by_hand() -> None:
    model = {"tapestry": 6, "house": 3, "whisper": 9, "rare": 2}
    people = {"house": 30, "whisper": 10, "road": 60}
    found = slop_profile(model, people)
    assert found == [
        Overused("tapestry", 6, pytest.approx((6 / 20) / (0.5 / 100))),
        Overused("whisper", 9, pytest.approx((9 / 20) / (10 / 100))),
        Overused("house", 3, pytest.approx((3 / 20) / (30 / 100))),
    ]
    assert [o.term for o in slop_profile(model, people, least=7)] == ["whisper"]
    with pytest.raises(ValueError, match="people"):
        slop_profile(model, {})
