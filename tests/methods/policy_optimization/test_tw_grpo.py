"""TW-GRPO: the divergence against whole distributions, the weights' range and limits, soft rewards, inversion."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    NAN,
    close,
    coefficients_of,
    defaults,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    row,
    signals_of,
    synthetic_batch,
    vector,
)
from tokenloom.methods.policy_optimization import tw_grpo
from tokenloom.methods.policy_optimization.tw_grpo import (
    inverted,
    negated,
    position_divergence,
    position_weights,
    soft_reward,
)

ROWS, WIDTH, SIZE, VOCABULARY = 4, 6, 3, 9
HEAD = 4 * torch.randn(VOCABULARY, SIZE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def states(seed: int = 0) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(ROWS, WIDTH, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = torch.arange(WIDTH) < torch.tensor([5, 2, 4, 0])[:, None]
    mask[0, 1] = False
    return hidden, mask


def logits(hidden: Tensor) -> Tensor:
    return hidden @ HEAD.T


def whole(hidden: Tensor, mask: Tensor) -> Tensor:
    """[T] from [R, T, V] at once, as the sheet writes it."""
    law = torch.where(mask[..., None], logits(hidden).log_softmax(-1), vector(-math.log(VOCABULARY)))
    x = (law.mean(0, keepdim=True) - law).clamp(-11, 11)
    return (x.exp() - x - 1).sum(-1).mean(0)


def test_defaults() -> None:
    assert defaults("tw-grpo") == {"alpha": 1.7, "min_active": 1, "padded": False}
    assert defaults("tw-grpo/soft-reward") == {"key": "right_options"}
    assert preset_defaults("tw-grpo") == {"alpha": 1.7, "min_active": 1, "padded": False}
    algorithm = make("tw-grpo")
    assert algorithm.advantage.params == {"eps": 1e-4}
    assert not algorithm.terms


def test_what_it_needs() -> None:
    algorithm = make("tw-grpo")
    assert algorithm.loss_needs == {"logprobs"}
    assert algorithm.needs == {"position_divergence"}


# -- the divergence


@pytest.mark.parametrize("chunk", [1, 9, 128])
def test_divergence_in_chunks_is_that_of_the_whole_distributions(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tw_grpo, "CHUNK", chunk)
    hidden, mask = states()
    seen: list[int] = []

    def counted(h: Tensor) -> Tensor:
        seen.append(len(h))
        return logits(h)

    found = position_divergence(hidden, counted, mask)
    close(found[:, :5], whole(hidden, mask)[:5].expand(ROWS, 5))
    assert bool((found[:, 5] == 0).all())
    # Never more states than a chunk (or one column) holds, and only those of sampled tokens.
    assert max(seen) <= max(chunk, ROWS)
    assert sum(seen) == int(mask.sum())


def test_divergence_worked_by_hand() -> None:
    # Two rows over two tokens: l = (ln .8, ln .2) and (ln .2, ln .8); their mean is ln .4 for both, x = -+ ln 2.
    laws = torch.tensor([[[0.8, 0.2]], [[0.2, 0.8]]], dtype=torch.float64).log()
    found = position_divergence(laws, lambda h: h, ones(2))
    close(found, 0.5 - 1 + 2 - 1)
    # One row alone is averaged with the uniform filler of the other.
    mask = torch.tensor([[True], [False]])
    x = (math.log(0.5) - vector(0.8, 0.2).log()) / 2
    close(position_divergence(laws, lambda h: h, mask)[0, 0], ((x.exp() - x - 1) + ((-x).exp() + x - 1)).sum() / 2)


def test_the_limit_keeps_extreme_log_ratios_finite() -> None:
    laws = torch.tensor([[[0.0, -900.0]], [[-900.0, 0.0]]], dtype=torch.float64)
    close(position_divergence(laws, lambda h: h, ones(2)), (math.exp(11) - 12) + (math.exp(-11) + 10))
    excluded = torch.tensor([[[0.0, 1.0, -math.inf]], [[1.0, 0.0, -math.inf]]], dtype=torch.float64)
    close(
        position_divergence(excluded, lambda h: h, ones(2)),
        position_divergence(excluded[..., :2], lambda h: h, ones(2)),
    )


def test_order_padding_and_hostile_states_change_nothing() -> None:
    hidden, mask = states()
    found = position_divergence(hidden, logits, mask)
    order = torch.tensor([2, 0, 3, 1])
    close(position_divergence(hidden[order], logits, mask[order]), found)
    wide = torch.cat([torch.where(mask[..., None], hidden, NAN), torch.full((ROWS, 2, SIZE), NAN).double()], 1)
    close(position_divergence(wide, logits, torch.nn.functional.pad(mask, (0, 2)))[:, :WIDTH], found)


def test_a_group_without_tokens_reads_no_logits() -> None:
    hidden, mask = states()
    close(position_divergence(hidden, None, mask & False), 0.0)  # type: ignore[arg-type]


def test_identical_rows_never_disagree() -> None:
    hidden = states()[0][:1].expand(ROWS, WIDTH, SIZE)
    found = position_divergence(hidden, logits, ones(ROWS, WIDTH))
    close(found, 0.0)
    weights = position_weights(found, torch.zeros(ROWS, dtype=torch.int64), ones(ROWS, WIDTH))
    close(weights, 1.0, 1e-6)


# -- the weights


def weigh(divergence: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    return position_weights(divergence, torch.zeros(len(mask), dtype=torch.int64), mask, **settings)


def test_weights_worked_by_hand() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0]]).bool()
    divergence = row(2.0, 4.0, 3.0, 0.0).expand(2, 4)
    close(weigh(divergence, mask), torch.tensor([[1.0, 1.7, 1.35, 0.0], [1.0, 0.0, 1.35, 0.0]]), 1e-7)
    # A column of padding has divergence 0: 2 / 4, 1 and 3 / 4 of 0.7.
    padded = torch.tensor([[1.35, 1.7, 1.525, 0.0], [1.35, 0.0, 1.525, 0.0]])
    close(weigh(divergence, mask, padded=True), padded, 1e-7)
    # Where only one row is left the weight is 1, and the column sets no limit.
    close(weigh(divergence, mask, min_active=2), torch.tensor([[1.0, 1.0, 1.7, 0.0], [1.0, 0.0, 1.7, 0.0]]), 1e-7)
    close(weigh(divergence, mask, min_active=3), mask.double())
    close(weigh(divergence, mask, alpha=1.0), mask.double())


def test_weights_lie_between_one_and_alpha_and_attain_both() -> None:
    hidden, mask = states()
    for padded in (False, True):
        found = weigh(position_divergence(hidden, logits, mask), mask, alpha=2.5, padded=padded)
        assert float(found[mask].min()) >= 1.0
        # 1e-8 in the divisor against divergences of at least 0.1.
        assert float(found.max()) == pytest.approx(2.5, abs=1e-6)
        assert bool((found[~mask] == 0).all())
    assert float(weigh(position_divergence(hidden, logits, mask), mask)[mask].min()) == 1.0


def test_groups_are_normalized_apart() -> None:
    rollouts, signals = synthetic_batch()
    divergence = signals.extras["position_divergence"]
    found = position_weights(divergence, rollouts.group_ids, rollouts.mask)
    scale = 1 + 4 * (rollouts.group_ids == 9)[:, None].double()
    close(position_weights(scale * divergence, rollouts.group_ids, rollouts.mask), found, 1e-6)


def test_a_single_column_and_none_at_all() -> None:
    close(weigh(torch.full((3, 1), 2.0).double(), ones(3)), 1.0)
    close(weigh(torch.full((3, 1), 2.0).double(), ones(3), padded=True), 1.7, 1e-7)
    assert weigh(torch.zeros(3, 0), ones(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("settings", [{"alpha": 0.9}, {"min_active": 0}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="alpha"):
        weigh(row(1.0), ones(1), **settings)


def test_without_weights_it_is_grpo_with_the_token_mean() -> None:
    rollouts, signals = synthetic_batch()
    grpo = make("grpo", kl_coef=0.0).override(aggregate="token-mean", advantage={"eps": 1e-4})
    close(coefficients_of(make("tw-grpo", alpha=1.0), rollouts, signals), coefficients_of(grpo, rollouts, signals))


def test_the_weights_do_not_enter_the_normalizer() -> None:
    rollouts, signals = synthetic_batch()
    plan = make("tw-grpo").plan(rollouts, signals)
    close(plan.values["scale"], rollouts.mask / rollouts.mask.sum())
    plain = coefficients_of(make("tw-grpo", alpha=1.0), rollouts, signals)
    close(coefficients_of(make("tw-grpo"), rollouts, signals), plan.values["weights"] * plain)
    assert float(plan.values["weights"].max()) > 1.5


# -- rewards


@pytest.mark.parametrize(
    ("answer", "right", "reward"),
    [
        ("A", ["A", "C"], 0.5),
        ("A,B", ["A", "C"], 0.0),
        ("C, A", "A,C", 1.0),
        ("a", ["A"], 1.0),
        (["A", "B"], ("A", "B", "C", "D"), 0.5),
        ("", ["A", "C"], 0.0),
        (" , ", ["A", "C"], 0.0),
        (None, ["A", "C"], 0.0),
        (3, [3, 5], 0.5),
    ],
)
def test_soft_rewards(answer: Any, right: Any, reward: float) -> None:
    close(soft_reward(vector(0), (answer,), ({"right_options": right},)), reward)


def test_other_rewards_are_kept() -> None:
    item = {"right_options": ["A", "C"]}
    rewards = vector(1, 0.25, NAN, 0.3, -1)
    found = soft_reward(rewards, ("nonsense", "x", "A", "A", "A"), (item, {}, item, {"difficulty": 3}, item))
    # Right by the verifier, no options, unscorable, no options, wrong by the verifier but half right.
    close(found[[0, 1, 3, 4]], vector(1, 0.25, 0.3, 0.5))
    assert bool(found[2].isnan())
    close(rewards[4], -1.0)


def test_an_item_without_a_right_option_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1"):
        soft_reward(vector(0, 0), ("A", "A"), ({"right_options": "A"}, {"right_options": []}))


def test_partial_credit_reaches_the_advantages() -> None:
    item = {"right_options": ["A", "C"]}
    rollouts = rollouts_of([0, 0, 0]).replace(answers=("A", "B", "A,C"), prompts=(item,) * 3)
    signals = signals_of(rollouts).replace(position_divergence=torch.zeros(3, 1).double())
    plan = make("tw-grpo").plan(rollouts, signals)
    close(plan.values["rewards"], vector(0.5, 0, 1))
    close(plan.values["advantages"][:, 0], vector(0, -1, 1), 1e-3)


# -- inversion


@pytest.mark.parametrize(
    ("question", "opposite"),
    [
        ("Which of the following is correct?", "Which of the following is incorrect?"),
        ("Which tools aren't the right ones?", "Which tools aren't the wrong ones?"),
        ("Is it a metal?", "Isn't it a metal?"),
        ("What can't happen next?", "What can happen next?"),
        ("What won't the cube hit?", "What will the cube hit?"),
        ("What did the person do?", "What didn't the person do?"),
    ],
)
def test_negation_and_back(question: str, opposite: str) -> None:
    assert negated(question) == opposite
    assert negated(opposite) == question


def test_inversion_complements_the_answer() -> None:
    options = ["red", "green", "blue", "gray"]
    question, right = inverted("Which color is warm?", options, ["red"])
    assert question == "Which color isn't warm?"
    assert right == ("green", "blue", "gray")
    assert inverted(question, options, right) == ("Which color is warm?", ("red",))
    assert inverted("Warm?", options, ["red"], negate=lambda q: f"not {q}")[0] == "not Warm?"


def test_what_cannot_be_inverted_is_refused() -> None:
    with pytest.raises(ValueError, match="'pink'"):
        inverted("Which is it?", ["red"], ["pink"])
    with pytest.raises(ValueError, match="every option"):
        inverted("Which is it?", ["red"], ["red"])
    with pytest.raises(ValueError, match="negate"):
        negated("Name a color.")
