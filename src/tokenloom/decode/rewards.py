"""Rewards that search methods take: any callable of one of two forms.

    reward(texts: list[str]) -> list[float]      whole texts, prompt and response together, special tokens left out
    reward(prompt_ids: list[int], ids: list[int]) -> float      ids of one prompt and of the response so far

Which form it is follows from how many arguments it needs. The first needs a tokenizer. Responses may be unfinished
where a method rewards prefixes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from tokenloom.decode.run import Run
from tokenloom.decode.segment_search import Hypothesis

Rewarded = Callable[[Run, Sequence[Hypothesis]], list[float]]


def reward_of(method: str, reward: Any, tokenizer: Any = None) -> Rewarded:
    """A function that rewards hypotheses of a run by `reward`, in either form.

    Raises:
        ValueError: for what is no such callable, or a reward of texts without a tokenizer. The function returned raises
            it for a result of another number than asked, or one that is not a number.
    """
    if not callable(reward):
        raise ValueError(f"{method}: a reward is a function of texts or of (prompt_ids, ids), got {reward!r}")
    of_ids = _needed(method, reward) == 2
    if not of_ids and tokenizer is None:
        raise ValueError(
            f"{method}: a reward of texts needs the tokenizer; give tokenizer=..., or a reward(prompt_ids, ids)"
        )

    def rewarded(run: Run, hypotheses: Sequence[Hypothesis]) -> list[float]:
        whole = [(run.prompts[h.row], list(h.tokens)) for h in hypotheses]
        if of_ids:
            found = [float(reward(list(prompt), ids)) for prompt, ids in whole]
        else:
            texts = [tokenizer.decode([*prompt, *ids], skip_special_tokens=True) for prompt, ids in whole]
            found = [float(r) for r in reward(texts)] if texts else []
        run.counts["rewarded"] = run.counts.get("rewarded", 0.0) + len(whole)
        if len(found) != len(whole) or any(math.isnan(r) for r in found):
            raise ValueError(f"{method}: the reward of {len(whole)} responses must be as many numbers, got {found}")
        return found

    return rewarded


def _needed(method: str, reward: Any) -> int:
    """How many arguments it cannot do without, 1 or 2."""
    try:
        signature = inspect.signature(reward)
    except ValueError:  # some built-in functions have none
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = [p for p in signature.parameters.values() if p.kind in kinds]
    needed = sum(p.default is p.empty for p in places)
    if needed > 2 or not (places or any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())):
        raise ValueError(f"{method}: a reward takes texts, or prompt_ids and ids; {reward!r} takes {signature}")
    return max(needed, 1)
