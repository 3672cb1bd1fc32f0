"""BroRL: many rollouts per prompt, and why more of them cannot hurt (arXiv 2510.01180); analysis, no preset.

One softmax choice with probabilities p, right set P, wrong set N; sampled are A of P and B of N, rewarded R_c >= 0 and
R_w <= 0, everything unsampled 0. The update of the logits is dz_i = (eta / n) p_i (R_i - S), S = R_c p(A) + R_w p(B).
To first order the mass of right choices Q+ (Q- of wrong ones) moves by
dQ+ = eta / n [(R_c - S) Q- A2 + (S - R_w) Q+ B2 + S (Q+ U-2 - Q- U+2)]
with A2, B2, U+2, U-2 the sums of p^2 over sampled right, sampled wrong, unsampled right, unsampled wrong choices.
The first two terms are never negative; the third, of unsampled choices, can be, and vanishes as n grows.
The recipe is any algorithm with a large `rollout.group_size` (the paper: 512) and large batches.
On a batch, `bro-rl` reads whole responses as choices: how much of a prompt's law the group has seen. Fidelity: paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import part
from tokenloom.masked import masked_sum

PAPER = "arXiv:2510.01180"


def mass_balance(
    probabilities: Tensor, correct: Tensor, sampled: Tensor, *, right: float = 1.0, wrong: float = -1.0,
    rate: float = 1.0, samples: int = 1,
) -> dict[str, Tensor]:  # fmt: skip
    """First-order change of the right choices' mass: `sampled_right`, `sampled_wrong`, `unsampled`, `total`.

    `probabilities` [..., V]; `correct`, `sampled` [..., V] bool; results [...]. `samples` is n, `rate` eta.

    Raises:
        ValueError: unless right >= 0 >= wrong.
    """
    if not right >= 0 >= wrong:
        raise ValueError(f"needs right >= 0 >= wrong, got {right} and {wrong}")

    def mass(chosen: Tensor, power: int = 1) -> Tensor:
        return (probabilities**power * chosen).sum(-1)

    q_right, q_wrong = mass(correct), mass(~correct)
    s = right * mass(correct & sampled) + wrong * mass(~correct & sampled)
    scale = rate / samples
    found = {
        "sampled_right": scale * (right - s) * q_wrong * mass(correct & sampled, 2),
        "sampled_wrong": scale * (s - wrong) * q_right * mass(~correct & sampled, 2),
        "unsampled": scale * s * (q_right * mass(~correct & ~sampled, 2) - q_wrong * mass(correct & ~sampled, 2)),
    }
    return found | {"total": found["sampled_right"] + found["sampled_wrong"] + found["unsampled"]}


def chance_of_decline(
    samples: int, *, size: int = 64, right_share: float = 0.25, trials: int = 1000, temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> float:  # fmt: skip
    """How often the right mass falls, over random softmaxes of `size` choices from which `samples` are drawn.

    Raises:
        ValueError: for fewer than one sample or trial.
    """
    if samples < 1 or trials < 1:
        raise ValueError(f"needs at least one sample and one trial, got {samples} and {trials}")
    logits = torch.randn(trials, size, generator=generator, dtype=torch.float64) / temperature
    law = logits.softmax(-1)
    drawn = torch.multinomial(law, samples, replacement=True, generator=generator)
    seen = torch.zeros(trials, size, dtype=torch.bool).scatter_(-1, drawn, True)
    correct = (torch.arange(size) < max(1, round(right_share * size))).expand(trials, -1)
    total = mass_balance(law, correct, seen, samples=samples)["total"]
    return float((total < 0).double().mean())


@part("bro-rl", stage="metric", scope="batch", paper=PAPER)
def seen_mass(old_logprobs: Tensor, tokens: Tensor, mask: Tensor, group_ids: Tensor) -> dict[str, Tensor]:
    """Means over prompts: `mass`, the probability of the distinct responses seen, and `repeat`, the chance that two
    fresh responses are the same seen one; low values say that most of the law is still unsampled.
    """
    probability = masked_sum(old_logprobs, mask, -1).exp()
    mass, repeat = [], []
    for group in torch.unique(group_ids):
        rows = ((group_ids == group) & mask.any(-1)).nonzero().reshape(-1).tolist()
        distinct = {tuple(tokens[i][mask[i]].tolist()): probability[i] for i in rows}
        if distinct:
            p = torch.stack(list(distinct.values()))
            mass.append(p.sum().clamp(max=1))
            repeat.append((p * p).sum())
    if not mass:
        return {"mass": probability.new_zeros(()), "repeat": probability.new_zeros(())}
    return {"mass": torch.stack(mass).mean(), "repeat": torch.stack(repeat).mean()}
