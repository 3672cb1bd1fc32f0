"""Whole TRL trainers on a tiny model: advantages, engine ratios and one real training step."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts, Sampling
from tokenloom.methods.policy_optimization.kl import kl_in_reward
from tokenloom.methods.policy_optimization.rloo import rloo
from tokenloom.signals import Signals

pytest.importorskip("trl")
harness: Any = importlib.import_module("parity.trl_harness")

COMPLETIONS = [[3, 4, 5, 1], [6, 7, 1], [8, 9, 10, 11, 12], [13, 1], [3, 1], [4, 5, 6, 7, 1], [9, 1], [10, 11, 12, 13]]
REWARDS: dict[str, list[float | None]] = {
    "mixed": [1.0, 0.0, 0.0, 0.0, 0.5, 2.0, 0.25, 1.0],
    "unscorable": [1.0, None, 0.0, 0.5, None, 2.0, 0.25, 1.0],
    "lone": [1.0, None, None, None, None, None, None, None],
    "constant": [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0],
}


def scoring(rewards: Sequence[float | None]) -> Any:
    def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [rewards[COMPLETIONS.index(list(ids))] for ids in completion_ids]

    return reward


def rollouts_of(rewards: Sequence[float | None], groups: int = 2, **rest: Any) -> Rollouts:
    size = len(COMPLETIONS) // groups
    made = Rollouts.build([[3, 4]] * 8, COMPLETIONS, [i // size for i in range(8)], **rest)
    return made.replace(rewards=torch.tensor([float("nan") if r is None else r for r in rewards]))


def scored(trainer: Any) -> dict[str, Tensor]:
    """TRL's own generation-and-scoring step on eight rows in two groups."""
    trainer.model.train()
    found: dict[str, Tensor] = trainer._generate_and_score_completions(
        [{"prompt": "w3 w4"}] * 4 + [{"prompt": "w5 w6"}] * 4
    )
    return found


SIZES = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("case", list(REWARDS))
def test_advantages(tmp_path: Path, case: str, scale: str) -> None:
    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        return {"prompt_ids": [[3, 4]] * 8, "completion_ids": COMPLETIONS, "logprobs": None}

    trainer = harness.grpo_trainer(tmp_path, scoring(REWARDS[case]), rollout, scale_rewards=scale, **SIZES)
    theirs = scored(trainer)["advantages"]
    algorithm = Algorithm.from_recipe({"preset": "grpo", "dialect": "trl", "advantage": {"std": scale}})
    rollouts = rollouts_of(REWARDS[case])
    ours = algorithm.plan(rollouts, Signals()).values["advantages"][:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", list(REWARDS))
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_advantages(tmp_path: Path, case: str, beta: float) -> None:
    trainer = harness.rloo_trainer(tmp_path, scoring(REWARDS[case]), beta=beta, **SIZES)
    trainer._generate = lambda prompts: ([[3, 4]] * 8, COMPLETIONS, [""] * 8)
    said: list[Tensor] = []
    inner = trainer._get_per_token_logps_and_entropies

    def noisy(*arguments: Any, **named: Any) -> Any:
        # The reference is the model itself at first; shift its answer so that the KL is not zero.
        logprobs, entropies, aux = inner(*arguments, **named)
        said.append(logprobs + 0.1 * len(said) * logprobs.sin())
        return said[-1], entropies, aux

    trainer._get_per_token_logps_and_entropies = noisy
    theirs = scored(trainer)
    rollouts = rollouts_of(REWARDS[case])
    assert rollouts.rewards is not None
    rewards = rollouts.rewards
    if beta:
        rewards = kl_in_reward(rewards, torch.zeros(8, 5), said[0], said[1], rollouts.mask, coef=beta, per="row")
        assert not torch.allclose(rewards, rollouts.rewards, equal_nan=True)
    ours = rloo(rewards, rollouts.group_ids, rollouts.mask)[:, 0]
    torch.testing.assert_close(ours, theirs["advantages"], rtol=1e-6, atol=1e-6)
    algorithm = Algorithm.from_recipe({"preset": "rloo", "dialect": "trl", "kl_coef": beta})
    signals = Signals(logprobs=said[0], old_logprobs=said[0], ref_logprobs=said[-1])
    planned = algorithm.plan(rollouts, signals).values["advantages"][:, 0]
    torch.testing.assert_close(planned, theirs["advantages"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("minimum", [None, 0.8])
@pytest.mark.parametrize("maximum", [None, 1.4, 3.0])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_engine_ratios(tmp_path: Path, mode: str, minimum: float | None, maximum: float | None) -> None:
    if mode.endswith("truncate") and minimum is None and maximum is None:
        minimum = 1e-9  # TRL refuses a truncation without any bound
    level, _, kind = mode.partition("_")
    g = torch.Generator().manual_seed(3)
    sampler: list[list[float]] = []
    tool = [[1] * len(ids) for ids in COMPLETIONS]
    tool[2][1:3] = [0, 0]

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        return {"prompt_ids": [[3, 4]] * 8, "completion_ids": COMPLETIONS, "logprobs": sampler, "env_mask": tool}

    settings = {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": minimum,
        "vllm_importance_sampling_clip_max": maximum,
    }
    trainer = harness.grpo_trainer(tmp_path, scoring(REWARDS["mixed"]), rollout, **SIZES, **settings)
    # First the training engine's log-probs, then a sampler that strays from them and once says nothing.
    trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
    sampler[:] = [[0.0] * len(ids) for ids in COMPLETIONS]
    old = scored(trainer)["old_per_token_logps"]
    noise = 0.4 * torch.randn(old.shape, generator=g)
    sampler[:] = [[float(x) for x in (old - noise)[i, : len(ids)]] for i, ids in enumerate(COMPLETIONS)]
    sampler[1][0] = float("nan")
    found = scored(trainer)
    theirs = found["importance_sampling_ratio"].expand(old.shape)
    mask = (found["completion_mask"] * found["tool_mask"]).bool()

    rollouts = rollouts_of(
        REWARDS["mixed"], response_masks=[[bool(x) for x in m] for m in tool], sampler_logprobs=sampler
    )
    assert torch.equal(rollouts.mask, mask)
    part = {"truncate": "tis", "mask": "mis"}[kind]
    weight = {"part": part, "level": level, "minimum": minimum, "maximum": maximum}
    algorithm = Algorithm.from_recipe({"preset": "grpo", "dialect": "trl", "weight": [weight]})
    signals = Signals(logprobs=old, old_logprobs=old)
    ours = algorithm.plan(rollouts, signals).values["weights"]
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=2e-6, atol=1e-6)
    assert bool((ours[~mask] == 0).all())


ONE_STEP: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("default", {"preset": "grpo"}, {}),
    ("kl", {"preset": "grpo", "kl_coef": 0.2}, {"beta": 0.2}),
    ("two-iterations", {"preset": "grpo"}, {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.05}),
    ("sapo-batch", {"preset": "sapo", "advantage": {"std": "batch"}}, {"loss_type": "sapo", "scale_rewards": "batch"}),
    (
        "gspo",
        {"preset": "gspo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    (
        "dapo-filter",
        {"preset": "dapo", "overlong": "filter"},
        {"epsilon_high": 0.28, "mask_truncated_completions": True},
    ),
]


@pytest.mark.parametrize(("recipe", "settings"), [x[1:] for x in ONE_STEP], ids=[x[0] for x in ONE_STEP])
def test_a_real_training_step(tmp_path: Path, recipe: dict[str, Any], settings: dict[str, Any]) -> None:
    """Real sampling, rewards (some unscorable), advantages, loss and backward; every step's loss and gradient agree."""

    def rate(ids: Sequence[int]) -> float | None:
        return None if sum(ids) % 7 == 0 else float(sum(ids) % 3) / 2

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [rate(ids) for ids in completion_ids]

    settings = {"max_steps": 1, "learning_rate": 1e-3, "num_generations": 4, "max_completion_length": 6} | settings
    # The padding token is never sampled, so that the responses can be read off the padded batch.
    settings |= {"generation_kwargs": {"suppress_tokens": [2]}}
    trainer = harness.grpo_trainer(tmp_path, reward, per_device_train_batch_size=12, **settings)
    steps: list[dict[str, Any]] = []
    compute, forward = trainer._compute_loss, trainer._get_per_token_logps_and_entropies

    def recorded_forward(*arguments: Any, **named: Any) -> Any:
        out = forward(*arguments, **named)
        if steps and out[0].requires_grad:
            steps[-1]["logprobs"] = out[0].detach()
            out[0].register_hook(lambda g: steps[-1].__setitem__("gradient", g))
        return out

    def recorded_loss(model: Any, inputs: dict[str, Any]) -> Tensor:
        steps.append({"inputs": inputs})
        loss: Tensor = compute(model, inputs)
        steps[-1]["loss"] = loss.detach()
        return loss

    trainer._compute_loss, trainer._get_per_token_logps_and_entropies = recorded_loss, recorded_forward
    trainer.train()
    assert len(steps) == settings["max_steps"]
    algorithm = Algorithm.from_recipe({**recipe, "dialect": "trl"})
    for step in steps:
        inputs, logprobs = step["inputs"], step["logprobs"]
        ids, inside = inputs["completion_ids"], inputs["completion_ids"] != trainer._tokenizer.pad_token_id
        answers = [row[m].tolist() for row, m in zip(ids, inside, strict=True)]
        prompts = [tuple(p.tolist()) for p in inputs["prompt_ids"]]
        rewards = [rate(a) for a in answers]
        truncated = torch.tensor([a[-1] not in trainer.eos_token_ids for a in answers])
        rollouts = Rollouts.build(
            prompts,
            answers,
            [sorted(set(prompts)).index(p) for p in prompts],
            rewards=torch.tensor([float("nan") if r is None else r for r in rewards]),
            truncated=truncated,
            sampling=Sampling(max_tokens=6),
        )
        assert len(set(prompts)) == 3
        assert 0 < sum(r is None for r in rewards) < 12
        assert bool(truncated.any())
        assert not bool(truncated.all())
        signals = Signals(
            logprobs=logprobs,
            old_logprobs=inputs.get("old_per_token_logps"),
            ref_logprobs=inputs.get("ref_per_token_logps"),
        )
        harness.agree((step["loss"], step["gradient"]), harness.own_loss(algorithm, rollouts, signals))
    if len(steps) > 1:
        assert not torch.allclose(steps[1]["logprobs"], steps[1]["inputs"]["old_per_token_logps"])
