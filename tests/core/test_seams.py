"""The seams beside the stages: live tokens, passes over part of the tokens, blends, sampling state, extras."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom import Algorithm, Rollouts, Signals, part
from tokenloom.signals import ATTENTION_SIGNALS, attention_signal
from tokenloom.testing import check, random_batch, same

PAPER = "none"


def coefficients(algorithm: Algorithm, rollouts: Rollouts, signals: Signals, **rest: Any) -> Tensor:
    return algorithm.coefficients(rollouts, signals, **rest)["logprobs"]


def gradient_of_updates(algorithm: Algorithm, rollouts: Rollouts, signals: Signals) -> list[Tensor]:
    """-d loss / d logprobs [B, T] of every update of the plan."""
    assert signals.logprobs is not None
    found = []
    for update in algorithm.plan(rollouts, signals).updates:
        leaf = signals.logprobs.clone().requires_grad_()
        loss, _ = algorithm.loss(signals.replace(logprobs=leaf).rows(update.rows), update)
        (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True) if loss.requires_grad else (None,)
        found.append(torch.zeros_like(leaf) if grad is None else -grad)
    return found


# -- live tokens ------------------------------------------------------------------------------------


@part("first-two", stage="weight", scope="row", paper=PAPER)
def first_two(mask: Tensor, advantages: Tensor) -> Tensor:
    """Only the first two sampled tokens of a row count."""
    return (mask & (mask.cumsum(-1) <= 2)).to(advantages.dtype)


@pytest.mark.parametrize(
    ("surrogate", "log_ratio", "whole_rows"),
    [("ppo-clip", "token-ratio", False), ("cispo", "token-ratio", False), ("ppo-clip", "gspo", True)],
)
def test_only_live_tokens_are_read(surrogate: str, log_ratio: str, whole_rows: bool) -> None:
    rollouts, signals = random_batch(3)
    algorithm = Algorithm.compose(
        advantage="grpo", surrogate=surrogate, log_ratio=log_ratio, aggregate="token-mean", weight=["first-two"]
    )
    update = algorithm.plan(rollouts, signals, one_update=True).updates[0]
    assert algorithm.needs_whole_rows is whole_rows
    assert not bool((update.live & ~rollouts.mask).any())
    beyond = rollouts.mask & (rollouts.mask.cumsum(-1) > 2)
    assert bool((update.live & beyond).any()) is whole_rows
    assert signals.logprobs is not None
    leaf = signals.logprobs.clone().requires_grad_()
    loss, _ = algorithm.loss(signals.replace(logprobs=leaf), update)
    (grad,) = torch.autograd.grad(loss, leaf)
    # What the model never computed is arbitrary: it must change neither the loss nor the gradient.
    hole = torch.where(update.live, signals.logprobs, torch.full((), float("nan"), dtype=torch.float64))
    other = hole.clone().requires_grad_()
    again, metrics = algorithm.loss(signals.replace(logprobs=other), update)
    (holed,) = torch.autograd.grad(again, other)
    same(loss.detach(), again.detach(), "loss")
    same(grad, holed, "gradient")
    assert all(v == v for v in metrics.result().values())


def test_a_term_keeps_every_token_alive() -> None:
    rollouts, signals = random_batch(4)
    algorithm = Algorithm.compose(
        advantage="grpo", surrogate="ppo-clip", aggregate="token-mean", weight=["first-two"], terms=["kl"]
    )
    update = algorithm.plan(rollouts, signals, one_update=True).updates[0]
    assert torch.equal(update.live, rollouts.mask)


# -- updates over part of the tokens -----------------------------------------------------------------


@part("odd-then-even", stage="updates", scope="batch", paper=PAPER)
def odd_then_even(keep: Tensor, mask: Tensor) -> dict[str, Any]:
    """Two passes over all rows: tokens at odd positions, then the others."""
    rows = keep.nonzero().reshape(-1)
    odd = (torch.arange(mask.shape[1]) % 2 == 1).expand(len(rows), -1)
    return {"rows": [rows, rows], "tokens": [odd, ~odd]}


@pytest.mark.parametrize("terms", [[], [{"part": "kl", "coef": 0.1}]], ids=["plain", "kl"])
def test_complementary_passes_add_up_to_one_update(terms: list[Any]) -> None:
    rollouts, signals = random_batch(5)
    base = Algorithm.compose(advantage="grpo", surrogate="ppo-clip", aggregate="token-mean", terms=terms)
    whole = coefficients(base, rollouts, signals)
    passes = gradient_of_updates(base.override(updates="odd-then-even"), rollouts, signals)
    # The normalizer counts all tokens, so what two passes do at the same weights is what one does.
    same(sum(passes[1:], passes[0]), whole, "both passes")
    odd = torch.arange(rollouts.mask.shape[1]) % 2 == 1
    assert bool((passes[0][:, ~odd] == 0).all())
    assert bool((passes[1][:, odd] == 0).all())


# -- blends -----------------------------------------------------------------------------------------


@part("three-quarters", stage="blend", scope="row", paper=PAPER)
def three_quarters(outcomes: Tensor, *, share: float = 0.75) -> Tensor:
    """The same share of every row."""
    return torch.full_like(outcomes, share)


@part("constant-advantage", stage="advantage", scope="row", paper=PAPER)
def constant_advantage(mask: Tensor, rewards: Tensor, *, value: float = 0.5) -> Tensor:
    """The same advantage for every scored row."""
    return torch.where(mask & ~rewards.isnan()[:, None], value, torch.zeros((), dtype=rewards.dtype))


def blended(**rest: Any) -> Algorithm:
    blend = {"part": "three-quarters", "advantage": "constant-advantage", **rest}
    return Algorithm.compose(advantage="grpo", surrogate="ppo-clip", aggregate="token-mean", blend=blend)


def test_a_blend_mixes_two_branches() -> None:
    rollouts, signals = random_batch(6)
    first = Algorithm.compose(advantage="grpo", surrogate="ppo-clip", aggregate="token-mean")
    second = Algorithm.compose(advantage="constant-advantage", surrogate="cispo", aggregate="token-mean")
    found = coefficients(blended(surrogate="cispo"), rollouts, signals)
    wanted = 0.75 * coefficients(first, rollouts, signals) + 0.25 * coefficients(second, rollouts, signals)
    same(found, wanted, "blend")
    same(coefficients(blended(share=1.0), rollouts, signals), coefficients(first, rollouts, signals), "share 1")


def test_a_constant_group_lives_by_its_second_branch() -> None:
    rollouts, signals = random_batch(7)
    update = blended().plan(rollouts, signals, one_update=True).updates[0]
    assert torch.equal(update.live, rollouts.mask)
    alone = blended(share=1.0).plan(rollouts, signals, one_update=True).updates[0]
    assert not bool(alone.live[rollouts.group_ids == 3].any())


def test_a_blend_survives_its_recipe_and_obeys_the_laws() -> None:
    algorithm = blended(surrogate="cispo", share=0.4)
    again = Algorithm.from_recipe(algorithm.recipe())
    rollouts, signals = random_batch(8)
    same(coefficients(algorithm, rollouts, signals), coefficients(again, rollouts, signals), "recipe")
    assert any("three-quarters(share=0.4)" in line for line in algorithm.describe())
    assert algorithm.override(blend=None).blend is None
    assert algorithm.override(blend={"share": 0.1}).blend is not None
    assert "shares-lie-between-zero-and-one" in check(three_quarters)
    with pytest.raises(ValueError, match="name the second branch's 'advantage'"):
        Algorithm.compose(advantage="grpo", blend={"part": "three-quarters"}, surrogate="ppo-clip")


# -- sampling reads what its method left ----------------------------------------------------------------


@part("warm/count", stage="weight", scope="token", paper=PAPER)
def warm_count(mask: Tensor, advantages: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Counts the steps."""
    return mask.to(advantages.dtype), {"steps": torch.tensor(1.0 if state is None else float(state["steps"]) + 1)}


@part("warm/temperature", stage="sampling", scope="token", paper=PAPER)
def warm_temperature(logits: Tensor, state: Any) -> Tensor:
    """Divides by what the weight part counted."""
    return logits if state is None else logits / state["steps"]


def test_sampling_reads_the_state_of_its_method() -> None:
    rollouts, signals = random_batch(9)
    algorithm = Algorithm.compose(
        advantage="grpo", surrogate="ppo-clip", weight=["warm/count"], sampling=["warm/temperature"]
    )
    logits = torch.ones(2, 5)
    first = algorithm.shape_logits()
    assert first is not None
    same(first(logits), logits, "at first")
    state = algorithm.plan(rollouts, signals).state
    state = algorithm.plan(rollouts, signals, state).state
    later = algorithm.shape_logits(state=state)
    assert later is not None
    same(later(logits), logits / 2, "after two steps")


# -- extras ---------------------------------------------------------------------------------------------


@part("against-reference", stage="advantage", scope="row", paper=PAPER)
def against_reference(mask: Tensor, rewards: Tensor, reference_rewards: Tensor) -> Tensor:
    """Reward minus the reference's."""
    return torch.where(mask, (rewards - reference_rewards).nan_to_num()[:, None], torch.zeros((), dtype=rewards.dtype))


def test_what_parts_and_their_signals_want_collected_is_known(tmp_path: Any) -> None:
    before = dict(ATTENTION_SIGNALS)
    try:

        @attention_signal("near_answer", "attention", "answer_mask")
        def near_answer(attention: Tensor, answer_mask: Tensor) -> Tensor:
            return answer_mask.float()

        @part("near", stage="weight", scope="row", paper=PAPER)
        def near(near_answer: Tensor) -> Tensor:
            return near_answer

        reader = Algorithm.compose(advantage="grpo", surrogate="ppo-clip", weight=["near"])
        assert reader.rollout_needs == {"answer_mask"}
        assert reader.needs == {"near_answer"}
    finally:
        ATTENTION_SIGNALS.clear()
        ATTENTION_SIGNALS.update(before)
    algorithm = Algorithm.compose(advantage="against-reference", surrogate="ppo-clip")
    assert algorithm.rollout_needs == {"reference_rewards"}
    rollouts, signals = random_batch(10)
    update = algorithm.plan(rollouts, signals, one_update=True).updates[0]
    assert rollouts.rewards is not None
    same(
        update.tensors["advantages"][:, 0],
        torch.where(rollouts.mask[:, 0], rollouts.rewards - rollouts.extras["reference_rewards"], 0.0),
        "advantages",
    )
    rollouts.save(tmp_path)
    loaded = Rollouts.load(tmp_path)
    assert loaded.extras.keys() == rollouts.extras.keys()
    assert torch.equal(loaded.extras["answer_mask"], rollouts.extras["answer_mask"])
    both = Rollouts.concat([rollouts, loaded.rows([0, 3])])
    assert both.extras["answer_mask"].shape == both.mask.shape
    with pytest.raises(ValueError, match="extra 'odd' has shape"):
        rollouts.replace(extras={"odd": torch.zeros(3)})
