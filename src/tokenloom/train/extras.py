"""What parts may ask to be collected beside the responses, into `Rollouts.extras` (names: `vocabulary.EXTRAS`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenloom.batch import Rollouts

Answered = Callable[[], Rollouts]
"""Lets the frozen reference answer the same prompts, as often as they were answered."""

Continued = Callable[[list[int], list[Tensor], list[int]], Rollouts]
"""Rewarded continuations, grouped in order, of prefixes given as the batch's row, the ids so far, and how many."""


def with_extras(
    needs: Collection[str],
    rollouts: Rollouts,
    tokenizer: Any,
    *,
    answered: Answered,
    continued: Continued,
    branches: Tensor | None,
) -> Rollouts:
    """`rollouts` with the extras that `needs` names; `branches` [B, T] says how many continuations to draw where."""
    found: dict[str, Tensor] = {}
    if "answer_mask" in needs:
        found["answer_mask"] = answer_mask(tokenizer, rollouts)
    if "reference_rewards" in needs:
        # The i-th response of a prompt is paired with the reference's i-th: any fixed pairing within a group would do.
        rewards = answered().rewards
        assert rewards is not None
        found["reference_rewards"] = rewards
    if "segment_values" in needs and branches is not None:
        found["segment_values"] = segment_values(rollouts, branches, continued)
    return rollouts.replace(extras=rollouts.extras | found) if found else rollouts


def segment_values(rollouts: Rollouts, branches: Tensor, continued: Continued) -> Tensor:
    """[B, T] mean reward of `branches` continuations drawn before token t, NaN where none were (or none was scored).

    Rows that share a prefix share its continuations, as many as the row with the most asks for.
    """
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, int]]] = {}
    for row, t in branches.nonzero().tolist():
        key = (tuple(rollouts.prompt_tokens[row].tolist()), tuple(rollouts.tokens[row, :t].tolist()))
        places.setdefault(key, []).append((row, t))
    values = torch.full(rollouts.mask.shape, float("nan"))
    if not places:
        return values
    rows = [at[0][0] for at in places.values()]
    prefixes = [torch.tensor([*prompt, *begun], dtype=torch.int64) for prompt, begun in places]
    counts = [max(int(branches[row, t]) for row, t in at) for at in places.values()]
    drawn = continued(rows, prefixes, counts)
    assert drawn.rewards is not None
    for number, at in enumerate(places.values()):
        mean = drawn.rewards[drawn.group_ids == number].nanmean()
        for row, t in at:
            values[row, t] = mean
    return values


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
