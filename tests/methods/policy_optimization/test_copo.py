"""COPO: the worked groups of the sheet, and what a degenerate group learns."""

from __future__ import annotations

import pytest
import torch

from methods.policy_optimization.batch import (
    NAN,
    close,
    coefficients_of,
    defaults,
    make,
    ones,
    preset_defaults,
    rollouts_of,
    signals_of,
    synthetic_batch,
    vector,
)
from tokenloom.methods.policy_optimization.copo import answer_entropy, global_advantage, global_reward, local_share

ONE = torch.zeros(4, dtype=torch.int64)


def test_defaults() -> None:
    assert defaults("copo/share") == {"k": 1.0, "b": 0.5, "mode": "soft-forced"}
    assert defaults("copo/global") == {"eps": 1e-6}
    assert preset_defaults("copo") == {"k": 1.0, "b": 0.5, "mode": "soft-forced"}
    assert make("copo").bounds.params["cap"] == 3.0


@pytest.mark.parametrize(
    ("rewards", "answers", "bits", "value"),
    [
        ([1, 1, 1, 1], "aaaa", 0.0, 1.0),
        ([1, 0, 0, 0], "abcd", 2.0, 0.0625),
        ([1, 1, 0, 0], "aabb", 1.0, 0.3125),
        ([0, 0, 0, 0], "bbbb", 0.0, 0.0),
    ],
)
def test_worked_groups_of_four(rewards: list[float], answers: str, bits: float, value: float) -> None:
    close(answer_entropy(tuple(answers), ONE), bits)
    close(global_reward(vector(*rewards), tuple(answers), ONE), value)


def test_the_discount_never_exceeds_one_less_the_share_of_a_row() -> None:
    for size in range(1, 9):
        answers = tuple(str(i) for i in range(size))
        value = global_reward(torch.ones(size).double(), answers, torch.zeros(size, dtype=torch.int64))
        # All distinct: lambda H = 1 - 1/G; a single row has nothing to disagree with.
        close(value, 1 / size)


def test_share_by_entropy() -> None:
    advantages = torch.ones(4, 1).double()
    for answers, share in (("aaaa", 0.377541), ("aabb", 0.622459), ("abcd", 0.817574)):
        close(local_share(advantages, vector(1, 0, 0, 0), tuple(answers), ONE), share, 1e-6)


def test_modes() -> None:
    advantages = torch.tensor([[1.0], [0.0], [1.0], [0.0]]).double()
    outcomes = vector(1, 1, 0, NAN)
    wanted = {
        "soft": [0.622459] * 4,
        "soft-forced": [0.622459, 0, 0.622459, 0],
        "forced": [1, 0, 1, 0],
        "global": [0] * 4,
        "nonzero": [1, 1, 0, 0],
        "soft-nonzero": [0.622459, 0.622459, 0, 0],
    }
    for mode, share in wanted.items():
        close(local_share(advantages, outcomes, tuple("aabb"), ONE, mode=mode), vector(*share), 1e-6)  # type: ignore[arg-type]


def test_silence_is_not_agreement_and_spelling_is_no_difference() -> None:
    close(answer_entropy((None, None, "a", "a"), ONE), 1.5)
    close(answer_entropy((" A", "a ", "a", "a"), ONE), 0.0)


def test_global_advantage_compares_prompts() -> None:
    groups = torch.tensor([0, 0, 1, 1])
    found = global_advantage(vector(1, 1, 0, 0), tuple("aabb"), groups, ones(4), eps=0.0)
    # Values 1 and 0: mean 1/2, Bessel std 1/sqrt 2.
    close(found[:, 0], vector(1, 1, -1, -1) / 2**0.5)
    # One prompt, or prompts of equal value, have nothing to compare.
    close(global_advantage(vector(1, 0), tuple("ab"), torch.tensor([3, 3]), ones(2)), 0.0)
    close(global_advantage(vector(1, 1, 1, 1), tuple("aabb"), groups, ones(4)), 0.0)
    unscored = global_advantage(vector(1, NAN, 0, 0), tuple("aabb"), groups, ones(4))
    assert bool(unscored.isfinite().all())
    assert float(unscored[1, 0]) == 0.0


def test_a_share_of_one_is_grpo() -> None:
    rollouts, signals = synthetic_batch()
    copo = make("copo").override(blend={"mode": "soft", "k": 0.0, "b": 0.0})
    local = copo.override(blend=None)
    half = coefficients_of(copo, rollouts, signals)
    other = coefficients_of(copo.override(blend={"mode": "global"}), rollouts, signals)
    # k = 0 gives every row a share of one half.
    close(half, (coefficients_of(local, rollouts, signals) + other) / 2)
    close(coefficients_of(make("copo", k=0.0, b=0.0, mode="forced"), rollouts, signals)[rollouts.group_ids == 9],
          coefficients_of(local, rollouts, signals)[rollouts.group_ids == 9])  # fmt: skip


def test_degenerate_groups_learn_when_they_differ_from_the_batch() -> None:
    rollouts = rollouts_of([1, 1, 0, 0], [0, 0, 1, 1]).replace(answers=tuple("aabb"))
    found = coefficients_of(make("copo"), rollouts, signals_of(rollouts))
    assert bool((found[:2] > 0).all())
    assert bool((found[2:] < 0).all())
    same = rollouts_of([1, 1, 1, 1], [0, 0, 1, 1]).replace(answers=tuple("aabb"))
    close(coefficients_of(make("copo"), same, signals_of(same)), 0.0)
