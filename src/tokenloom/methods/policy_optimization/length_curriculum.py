"""Curriculum GRPO: a token budget that shrinks over training, "train long, think short" (arXiv 2508.08940).

R = correct * outcome + length * shape(l / B) + format * [an answer was found]                               [B]
B = max(1, floor(budget * decay^floor(step / every))) tokens; l = the row's thinking tokens
triangle: l / B up to B, then 2 - l / B down to 0 at 2 B: a response is to use its budget, not more
band: 1 up to B, then 2 - l / B down to 0 at 2 B (the paper's ablation)
The budget also stands in the prompt, so an item's own `budget` (what was stated to the model) goes before the
schedule. Thinking tokens are the sampled ones before the token `end_of_thinking`, all of them without one. The
format is right where the verifier could parse an answer, which it does out of the tags; without `answers` the term
is 0 for everyone, and so drops out of a group's baseline. A linear decay is decay=1 and a schedule as budget.
Deviations: `every` is not in the source at hand, the three weights and decay are unverified (256 * 0.7^3 = 87.8 is
the known last budget). Limits: decay = 1 is a fixed budget, length = format = 0 is GRPO up to scale.
Fidelity: reconstructed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset

Shape = Literal["triangle", "band"]


@part("length-curriculum", stage="reward", scope="row", paper="arXiv:2508.08940")
def length_curriculum(
    rewards: Tensor,
    tokens: Tensor,
    mask: Tensor,
    step: int,
    answers: tuple[Any, ...] | None = None,
    prompts: tuple[dict[str, Any], ...] | None = None,
    *,
    correct: float = 0.3,
    length: float = 0.6,
    format: float = 0.1,
    budget: float = 256.0,
    decay: float = 0.7,
    every: int = 100,
    shape: Shape = "triangle",
    end_of_thinking: int | None = None,
) -> Tensor:
    """Rewards [B] in [0, correct + length + format] for outcomes in [0, 1]; NaN stays NaN.

    Raises:
        ValueError: for a budget below one token, a decay outside (0, 1] or an interval below one step.
    """
    scheduled = token_budget(step, budget=budget, decay=decay, every=every)
    stated = [p.get("budget", scheduled) for p in prompts] if prompts is not None else [scheduled] * len(rewards)
    budgets = torch.tensor(stated, dtype=rewards.dtype, device=rewards.device)
    if bool((budgets < 1).any()):
        raise ValueError(f"an item's budget is at least one token, got {min(stated)}")
    used = thinking_tokens(tokens, mask, end_of_thinking).to(rewards.dtype)
    parsed = [a is not None for a in answers] if answers is not None else [False] * len(rewards)
    formatted = torch.tensor(parsed, dtype=rewards.dtype, device=rewards.device)
    return correct * rewards + length * length_reward(used, budgets, shape) + format * formatted


def token_budget(step: int, *, budget: float = 256.0, decay: float = 0.7, every: int = 100) -> int:
    """Tokens a response may use at a step, a whole number for the prompt to state.

    Raises:
        ValueError: for a budget below one token, a decay outside (0, 1] or an interval below one step.

    >>> [token_budget(step) for step in (0, 99, 100, 200, 300)]
    [256, 256, 179, 125, 87]
    """
    if budget < 1 or not 0 < decay <= 1 or every < 1:
        raise ValueError(f"a budget needs budget >= 1, 0 < decay <= 1, every >= 1, got {budget=}, {decay=}, {every=}")
    # The product may come out a hair below a whole number.
    return max(1, int(budget * decay ** (step // every) + 1e-9))


def length_reward(used: Tensor, budget: Tensor, shape: Shape = "triangle") -> Tensor:
    """Reward in [0, 1] for `used` of `budget` tokens, both [B].

    >>> length_reward(torch.tensor([0.0, 50.0, 100.0, 150.0, 200.0, 300.0]), torch.tensor(100.0))
    tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000, 0.0000])
    """
    share = used / budget
    rising = share if shape == "triangle" else torch.ones_like(share)
    return torch.minimum(rising, 2 - share).clamp(0, 1)


def thinking_tokens(tokens: Tensor, mask: Tensor, end_of_thinking: int | None) -> Tensor:
    """Sampled tokens of each row before the first `end_of_thinking`, all of them if there is none: [B] int64."""
    if end_of_thinking is None:
        return mask.sum(-1)
    return (mask & ((mask & (tokens == end_of_thinking)).cumsum(-1) == 0)).sum(-1)


@preset("length-curriculum", paper="arXiv:2508.08940")
def length_curriculum_preset(
    *,
    correct: float = 0.3,
    length: float = 0.6,
    format: float = 0.1,
    budget: float = 256.0,
    decay: float = 0.7,
    every: int = 100,
    shape: Shape = "triangle",
    end_of_thinking: int | None = None,
    kl_coef: float = 0.04,
) -> Algorithm:
    """GRPO on outcome, length and format, with a budget that shrinks every `every` steps."""
    reward = {
        "part": "length-curriculum", "correct": correct, "length": length, "format": format, "budget": budget,
        "decay": decay, "every": every, "shape": shape, "end_of_thinking": end_of_thinking,
    }  # fmt: skip
    return Algorithm.from_recipe({"preset": "grpo", "kl_coef": kl_coef}).override(reward=[reward])
