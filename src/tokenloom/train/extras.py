"""What parts may ask to be collected beside the responses, into `Rollouts.extras` (names: `vocabulary.EXTRAS`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenloom.batch import Rollouts

Answered = Callable[[], Rollouts]
"""Lets the frozen reference answer the same prompts, as often as they were answered."""


def with_extras(needs: Collection[str], rollouts: Rollouts, tokenizer: Any, answered: Answered) -> Rollouts:
    """`rollouts` with the extras that `needs` names."""
    found: dict[str, Tensor] = {}
    if "answer_mask" in needs:
        found["answer_mask"] = answer_mask(tokenizer, rollouts)
    if "reference_rewards" in needs:
        # The i-th response of a prompt is paired with the reference's i-th: any fixed pairing within a group would do.
        rewards = answered().rewards
        assert rewards is not None
        found["reference_rewards"] = rewards
    return rollouts.replace(extras=rollouts.extras | found) if found else rollouts


def answer_mask(tokenizer: Any, rollouts: Rollouts) -> Tensor:
    """[B, T] bool: the tokens whose text holds the last occurrence of the row's answer; none where it is not found."""
    mask = torch.zeros_like(rollouts.mask)
    for row, answer in enumerate(rollouts.answers or ()):
        ids = rollouts.response(row).tolist()
        text = "" if answer is None else str(answer).strip()
        at = _decoded(tokenizer, ids).rfind(text) if text else -1
        if at >= 0:
            first = _token_at(tokenizer, ids, at, begins=True)
            last = _token_at(tokenizer, ids, at + len(text) - 1, begins=False)
            mask[row, first : last + 1] = True
    return mask & rollouts.mask


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _token_at(tokenizer: Any, ids: Sequence[int], place: int, *, begins: bool) -> int:
    """The token that begins or completes character `place`: the first whose prefix decodes to more than that.

    Bisected, since a token has no characters of its own: several may share one, or one hold many. An unfinished
    character at the end of a prefix decodes to a replacement mark, which counts as its beginning.
    """
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high) // 2
        written = _decoded(tokenizer, ids[: middle + 1])
        written = written if begins else written.rstrip("\ufffd")
        low, high = (low, middle) if len(written) > place else (middle + 1, high)
    return low
