"""Antislop: take back banned strings while sampling, find what to ban, train it away (arXiv 2510.15061).

Sampler (`decode.loop("antislop")`): where a banned string began, draw again without the tokens tried there,
    p'(v) = p(v) [v not tried] / sum                                   a ban of one token leaves p renormalized
    p'(v) = p(v) s^strength / sum, v a token that begins the phrase    the soft form, s < 1 a scale of the phrase
Profile: ratio = frequency in the model's texts / frequency in people's texts, of words or n-grams without stop words.
FTPO, for the last position only; b the rejected token, C the chosen ones, l logits, l0 those of the reference:
    D_c = l_c - l_b,  w_c = clip((eps - D_c) / eps, 0, 1), 1 for all of a row whose w are all 0
    L = sum w_c softplus(eps - D_c) / sum w_c                                    both sums over the whole batch
        + rest mean_{v not in {b} u C} (l - l0)^2 + spread mean_rows max(|mean_{b, C} (l - l0)| - 2, 0)^2
        + target mean_{b, C} max(|l - l0| - 1, 0)^2

Deviations: the weights w carry no gradient; `detach_weights=False` is the release. Fidelity: code (loss, matching),
reconstructed (profile).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.catalog import part

PAPER = "arXiv:2510.15061"
WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
STOP_WORDS = frozenset(
    WORD.findall(
        "a about after again all am an and any are as at be because been before being but by can could did do does "
        "doing down during each few for from further had has have having he her here hers him his how i if in into is "
        "it its itself just me more most my no nor not now of off on once only or other our out over own same she "
        "should so some such than that the their them then there these they this those through to too under until up "
        "very was we were what when where which while who whom why will with would you your"
    )
)
"""Words that say nothing by themselves, for n-grams."""
# How far the tethers of the paper let logits go for nothing.
_FREE_MEAN, _FREE_TARGET = 2.0, 1.0


@part("antislop", stage="shape", scope="row", paper=PAPER)
def without_tried(scores: Tensor, tried: Tensor) -> Tensor:
    """Scores [B, V] without the `tried` tokens [B, V] bool: their softmax is the law without them, renormalized."""
    return scores.masked_fill(tried, -torch.inf)


@part("antislop/soft", stage="shape", scope="row", paper=PAPER)
def down_weighted(scores: Tensor, factors: Tensor) -> Tensor:
    """Scores [B, V] whose softmax is the law times `factors` [B, V] in [0, 1], renormalized."""
    return scores + factors.log()


@part("antislop/ftpo", stage="objective", scope="batch", paper=PAPER)
def ftpo_loss(
    logits: Tensor, ref_logits: Tensor, rejected: Tensor, chosen: Tensor, chosen_mask: Tensor,
    *, epsilon: float = 2.0, rest: float = 0.4, spread: float = 0.1, target: float = 0.05, detach_weights: bool = True,
) -> Tensor:  # fmt: skip
    """The loss, a scalar, from logits [B, V] of the last position; rejected [B] ids, chosen [B, C] ids and their mask.

    Raises:
        ValueError: for a row without a chosen token, or one whose rejected token is among the chosen.
    """
    if not bool(chosen_mask.any(-1).all()) or bool(((chosen == rejected[:, None]) & chosen_mask).any()):
        raise ValueError("antislop: every row needs chosen tokens, and its rejected token must not be one of them")
    ids = torch.where(chosen_mask, chosen, rejected[:, None])  # padding: any id that is a target anyway
    gap = epsilon - (logits.gather(-1, ids) - logits.gather(-1, rejected[:, None]))
    weights = (gap / epsilon).clamp(0, 1) * chosen_mask
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, chosen_mask.to(weights.dtype))
    if detach_weights:
        weights = weights.detach()
    preference = (weights * torch.nn.functional.softplus(gap)).sum() / weights.sum()

    targets = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, True).scatter(-1, rejected[:, None], True)
    moved = logits - ref_logits.detach()
    others = torch.where(targets, 0.0, moved).square().sum() / (~targets).sum().clamp(min=1)
    mean = torch.where(targets, moved, 0.0).sum(-1) / targets.sum(-1)
    far = (mean.abs() - _FREE_MEAN).clamp(min=0).square().mean()
    beyond = torch.where(targets, (moved.abs() - _FREE_TARGET).clamp(min=0), 0.0).square().sum() / targets.sum()
    return preference + rest * others + spread * far + target * beyond


@dataclass(frozen=True)
class Overused:
    """A word or n-gram, how often the model says it, and how many times as often as people do."""

    term: str
    count: int
    ratio: float


def term_counts(texts: Iterable[str], n: int = 1, stop_words: Iterable[str] = STOP_WORDS) -> Counter[str]:
    """Counts of n-grams of lower-cased words, stop words left out before the n-grams are made."""
    without, counts = frozenset(stop_words), Counter[str]()
    for text in texts:
        words = [w for w in WORD.findall(text.lower()) if w not in without]
        counts.update(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    return counts


@part("antislop/profile", stage="analysis", scope="batch", paper=PAPER)
def slop_profile(
    model_counts: Mapping[str, int], human_counts: Mapping[str, int], *, least: int = 3, floor: float = 0.5
) -> list[Overused]:
    """Terms that the model says at least `least` times, the most overused first, by relative frequencies.

    A term that people never use counts as used `floor` times.

    Raises:
        ValueError: without counts of people's texts, or a floor that is not above 0.
    """
    said, written = sum(model_counts.values()), sum(human_counts.values())
    if written == 0 or floor <= 0:
        raise ValueError("antislop: the profile compares with counts of people's texts; it needs some, and a floor > 0")
    found = [
        Overused(term, count, (count / said) / (max(human_counts.get(term, 0), floor) / written))
        for term, count in model_counts.items()
        if count >= least
    ]
    return sorted(found, key=lambda entry: (-entry.ratio, -entry.count, entry.term))
