"""Text answers against first-token answers: do they agree, and which stays when options move (arXiv 2404.08382).

mismatch      mean over samples of 1{first-token answer != text answer}
agreement     mean over samples of the share of orders that give the most frequent content
consistency   mean over samples of the share of pairs of orders that give the same content
entropy       mean over samples of -sum_c p(c) log p(c) over the contents given in the different orders, nats

A choice is the number of an option as shown; `contents_of` maps it back through the order it was shown in. Below 0 is
no option (refusal, nothing found): it counts as a content of its own. Q samples, R orders. RStd is `pride/rstd`.
Limits: a model that follows the contents has agreement and consistency 1 and entropy 0; one that always says "A" over
the n cyclic orders has agreement 1/n. Deviations: the paper reports RStd and mismatch; the three measures across
orders are the usual ones. Fidelity: paper (abstract and project page).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenloom.catalog import part


@part("mcq-text-answers", stage="analysis", scope="batch", paper="arXiv:2404.08382")
def mismatch_rate(first_token: Tensor, text: Tensor) -> float:
    """The share of samples whose `first_token` and `text` answers [Q] differ; a refusal in the text is a mismatch.

    Raises:
        ValueError: without samples, or for different numbers of them.
    """
    if first_token.shape != text.shape or first_token.numel() == 0:
        raise ValueError(f"mismatch compares two answers per sample, got {first_token.numel()} and {text.numel()}")
    return float((first_token != text).double().mean())


@part("mcq-text-answers/first-token", stage="choose", scope="row", paper="arXiv:2404.08382")
def first_token_answer(scores: Tensor, letters: Sequence[Sequence[int]]) -> Tensor:
    """The answers [B] at the first response position, from scores [B, V] and the token ids of each letter.

    The probabilities of a letter's several tokens (with and without a space before it) are added; the first wins a tie.
    """
    return letter_logprobs(scores, letters).argmax(-1)


def letter_logprobs(scores: Tensor, letters: Sequence[Sequence[int]]) -> Tensor:
    """Log-probs [B, n] of the letters over the whole vocabulary, summed over the tokens of each.

    Raises:
        ValueError: when a letter has no token, or two share one.
    """
    ids = [token for tokens in letters for token in tokens]
    if any(len(tokens) == 0 for tokens in letters) or len(set(ids)) < len(ids):
        raise ValueError("each option letter needs tokens of its own; choose letters that the tokenizer keeps apart")
    logprobs = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)
    return torch.stack([logprobs[:, list(tokens)].logsumexp(-1) for tokens in letters], -1)


def contents_of(choices: Tensor, orders: Tensor) -> Tensor:
    """The contents [Q, R] behind `choices` [Q, R]; `orders` [R, n] says which content stood under each letter."""
    shown = orders.expand(len(choices), *orders.shape)
    found = shown.gather(2, choices.clamp(min=0)[:, :, None])[:, :, 0]
    return torch.where(choices < 0, choices, found)


@part("mcq-text-answers/agreement", stage="analysis", scope="batch", paper="arXiv:2404.08382")
def agreement(contents: Tensor) -> float:
    """The mean share [0, 1] of orders that give a sample's most frequent content; `contents` [Q, R]."""
    return float(_same(contents).mean(-1).amax(-1).mean())


@part("mcq-text-answers/consistency", stage="analysis", scope="batch", paper="arXiv:2404.08382")
def consistency(contents: Tensor) -> float:
    """The mean share [0, 1] of pairs of different orders that give the same content; `contents` [Q, R].

    Raises:
        ValueError: for fewer than two orders.
    """
    r = contents.shape[1]
    if r < 2:
        raise ValueError("consistency compares orders: ask each question in at least two")
    same = _same(contents).sum((1, 2)) - r
    return float((same / (r * (r - 1))).mean())


@part("mcq-text-answers/entropy", stage="analysis", scope="batch", paper="arXiv:2404.08382")
def content_entropy(contents: Tensor) -> float:
    """The mean entropy, nats, of the contents that a sample's orders give; `contents` [Q, R]."""
    # Each order sees the share of its own content: the mean of -log share is the entropy.
    return float(-_same(contents).mean(-1).log().mean())


def _same(contents: Tensor) -> Tensor:
    """[Q, R, R] float64."""
    return (contents[:, :, None] == contents[:, None]).double()
