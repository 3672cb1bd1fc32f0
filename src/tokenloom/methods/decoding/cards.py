"""CARDS: accept or redraw a segment by its reward; segments end where the model becomes uncertain (arXiv 2406.16306).

segment     ends after min_segment tokens or more, where the entropy of the next law (raw, nats) is >= tau_u
r_0         (1 - alpha) r(prompt) + alpha r*
tau_r       min(r*, r_0 + (n / M) (r* - r_0)),     n tokens with the candidate of M at most
acceptance  min(1, exp((r - tau_r) / beta)) ("soft"), or 1 when r >= tau_r and 0 otherwise ("hard")

Limits: a constant large reward, or beta -> inf, is plain sampling; with alpha = 1 and the whole answer as segment,
what is accepted has the law p(y) min(1, exp((r(y) - r*) / beta)) up to its constant. Deviations: none in the rules;
see `tokenloom.decode.cards` for the limit of tries. Fidelity: code.
"""

from __future__ import annotations

import math
from typing import Literal

from tokenloom.catalog import part


@part("cards", stage="search", scope="row", paper="arXiv:2406.16306")
def acceptance(
    reward: float, threshold: float, *, beta: float = 0.7, accept: Literal["soft", "hard"] = "soft"
) -> float:
    """The probability with which a segment of `reward` is accepted.

    Raises:
        ValueError: unless beta > 0.
    """
    if not beta > 0:
        raise ValueError(f"cards: beta = {beta}; it must be above 0 (small: strict). For a sharp bound accept='hard'")
    if reward >= threshold:
        return 1.0
    return 0.0 if accept == "hard" else math.exp((reward - threshold) / beta)


@part("cards/threshold", stage="search", scope="row", paper="arXiv:2406.16306")
def reward_threshold(
    prompt_reward: float, tokens: int, limit: int, *, target: float = 8.5, alpha: float = 0.5
) -> float:
    """What a prefix of `tokens` new tokens of at most `limit` is expected to earn.

    Raises:
        ValueError: unless 0 <= alpha <= 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"cards: alpha = {alpha}; it mixes the prompt's reward with the target, in [0, 1]")
    start = (1 - alpha) * prompt_reward + alpha * target
    return min(target, start + tokens / limit * (target - start))
