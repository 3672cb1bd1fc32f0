"""TW-GRPO: weight positions at which a group's distributions disagree; soft rewards for several right options.

Per group of R rows, with l the log-probs of the whole vocabulary at position t, -ln V where a row has no sampled
token there, and x = clamp(mean over rows of l - l, -11, 11):
divergence_t = mean over rows of sum_v (e^x - x - 1), in nats, the same for all rows               [B, T]
n_t = (divergence_t - min) / (max - min + 1e-8) over the group's columns;  weights = 1 + (alpha - 1) n_t   [B, T]
The weights do not enter the normalizer. Where most rows have ended, the uniform filler looks like disagreement:
columns with fewer than `min_active` sampled tokens weigh 1 and are left out of min and max. With `padded` a
column of padding, whose divergence is 0, counts as well, as in the released code where a batch holds longer groups.
Soft reward: what the verifier found right keeps its reward; else |predicted| / |right| if the predicted options are a
subset of the right ones, and 0 otherwise or when nothing was predicted.
`inverted` asks which options are wrong instead, so that items with one right option have several.
Paper: arXiv 2505.24718. Deviations: weights are detached (the released code lets gradients through them); options are
compared without case. Limit: alpha = 1 is GRPO with the token mean. Fidelity: code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import group_extreme, group_index, where_mask
from tokenloom.signals import group_signal

PAPER = "arXiv:2505.24718"
LIMIT = 11.0
"""Of log-ratios before exp."""
CHUNK = 128
"""Tokens whose logits exist at once, or one column of a larger group."""


def _example(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return 3 * torch.rand(rows, width, generator=generator, dtype=torch.float64)


@group_signal("position_divergence", "hidden", "logits", "mask", example=_example)
def position_divergence(hidden: Tensor, logits: Callable[[Tensor], Tensor], mask: Tensor) -> Tensor:
    """[R, T] nats, the same in all rows; 0 where no row has a sampled token."""
    out = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device)
    if not bool(mask.any()):
        return out
    for at in torch.split(mask.any(0).nonzero()[:, 0], max(1, CHUNK // len(mask))):
        there = mask[:, at]
        # A token that the model excludes (-inf) in every row would give inf - inf; the limit hides its exact size.
        own = torch.log_softmax(logits(hidden[:, at][there]), -1).clamp(min=-1e4)
        law = own.new_full((*there.shape, own.shape[-1]), -math.log(own.shape[-1]))
        law[there] = own
        x = (law.mean(0) - law).clamp(-LIMIT, LIMIT)
        out[:, at] = (x.exp() - x - 1).sum(-1).mean(0).to(out.dtype)
    return out


@part("tw-grpo", stage="weight", scope="group", paper=PAPER)
def position_weights(
    position_divergence: Tensor, group_ids: Tensor, mask: Tensor,
    *, alpha: float = 1.7, min_active: int = 1, padded: bool = False,
) -> Tensor:  # fmt: skip
    """Weights [B, T] in [1, alpha] on the mask: alpha where the group disagrees most, 1 where it does least.

    Raises:
        ValueError: for alpha or min_active below 1.
    """
    if not (alpha >= 1 and min_active >= 1):
        raise ValueError(
            f"alpha is the largest weight and min_active counts rows, both >= 1; got {alpha}, {min_active}"
        )
    dense, groups = group_index(group_ids)
    active = torch.zeros(groups, mask.shape[1], dtype=torch.int64, device=mask.device)
    chosen = mask & (active.index_add_(0, dense, mask.long())[dense] >= min_active)
    divergence = where_mask(position_divergence.detach(), chosen)

    def extreme(largest: bool) -> Tensor:
        none = -math.inf if largest else math.inf
        # One more column: the padding that counts as 0, or nothing, so that batches without columns have extremes.
        own = pad(where_mask(divergence, chosen, none), (0, 1), value=0.0 if padded else none)
        return group_extreme(own.amax(-1) if largest else own.amin(-1), group_ids, largest=largest)[:, None]

    low, high = extreme(False), extreme(True)
    weights = 1 + (alpha - 1) * (divergence - low) / (high - low + 1e-8)
    return where_mask(where_mask(weights, chosen, 1.0), mask)


@part("tw-grpo/soft-reward", stage="reward", scope="row", paper=PAPER)
def soft_reward(
    rewards: Tensor, answers: tuple[Any, ...], prompts: tuple[dict[str, Any], ...], *, key: str = "right_options"
) -> Tensor:
    """Rewards [B] with partial credit for rows whose item's metadata name their right options under `key`.

    Options are a list, or text with commas between them. Rows whose item names none keep their reward.

    Raises:
        ValueError: when an item says that no option is right.

    >>> item = {"right_options": ["A", "C"]}
    >>> soft_reward(torch.zeros(3), ("C, A", "a", "A,B"), (item, item, item))
    tensor([1.0000, 0.5000, 0.0000])
    """
    out = rewards.clone()
    for i, (answer, item) in enumerate(zip(answers, prompts, strict=True)):
        if key not in item or not float(rewards[i]) < 1:
            continue
        predicted, right = option_set(answer), option_set(item[key])
        if not right:
            raise ValueError(f"row {i}: the item's {key!r} is {item[key]!r}, which names no option; name at least one")
        out[i] = len(predicted) / len(right) if predicted <= right else 0.0
    return out


def option_set(answer: Any) -> frozenset[str]:
    """The options that an answer names, without blanks and case; none for None.

    >>> sorted(option_set(" b,A "))
    ['A', 'B']
    """
    if answer is None:
        return frozenset()
    parts = answer.split(",") if isinstance(answer, str) else answer if isinstance(answer, list | tuple) else [answer]
    return frozenset("".join(str(p).split()).upper() for p in parts) - {""}


def inverted(
    question: str, options: Sequence[str], right: Sequence[str], *, negate: Callable[[str], str] | None = None
) -> tuple[str, tuple[str, ...]]:
    """The negated question and the options that answer it, which are all the others; `negate` defaults to `negated`.

    Raises:
        ValueError: when a right option is not among the options, when none would be right, or as `negate` does.

    >>> inverted("Which of these is a prime?", ["4", "5", "6"], ["5"])
    ("Which of these isn't a prime?", ('4', '6'))
    """
    if unknown := [r for r in right if r not in options]:
        raise ValueError(f"{unknown} are right but not among the options {list(options)}")
    rest = tuple(o for o in options if o not in right)
    if not rest:
        raise ValueError(
            "every option is right, so that none would answer the negated question; leave the item as it is"
        )
    return (negate or negated)(question), rest


def negated(question: str) -> str:
    """The question with its first word that has an opposite replaced: "correct" before verbs such as "did".

    Raises:
        ValueError: when there is no such word.

    >>> negated("Which statement is incorrect?"), negated("What did she take?")
    ('Which statement is correct?', "What didn't she take?")
    """
    for table in (_ADJECTIVES, _VERBS):
        both = table | {v: k for k, v in table.items()}
        words = "|".join(sorted(both, key=len, reverse=True))
        found = re.search(rf"\b({words})\b", question, re.IGNORECASE)
        if found:
            word = both[found.group().lower()]
            word = word.capitalize() if found.group()[0].isupper() else word
            return question[: found.start()] + word + question[found.end() :]
    raise ValueError(f"no word to negate in {question!r}; pass `negate`, a function that negates such questions")


_ADJECTIVES = {"correct": "incorrect", "true": "false", "right": "wrong", "able": "unable", "possible": "impossible"}
_VERBS = {"can": "can't", "will": "won't"} | {
    v: f"{v}n't"
    for v in ("is", "are", "was", "were", "would", "could", "should", "must", "do", "does", "did", "has", "have", "had")
}


@preset("tw-grpo", paper=PAPER)
def tw_grpo_preset(*, alpha: float = 1.7, min_active: int = 1, padded: bool = False) -> Algorithm:
    """GRPO (std eps 1e-4, no KL) with the token mean, position weights and soft rewards for items with options."""
    weight = {"part": "tw-grpo", "alpha": alpha, "min_active": min_active, "padded": padded}
    return Algorithm.compose(
        reward=["tw-grpo/soft-reward"],
        advantage={"part": "grpo", "eps": 1e-4},
        weight=[weight],
        surrogate="ppo-clip",
        aggregate="token-mean",
    )
