"""CyclicReflex as a logits processor; the waves are in `methods.decoding.cyclicreflex`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokenloom.decode.registry import decoder
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.cyclicreflex import cyclicreflex


@decoder("cyclicreflex", kind="shaper")
class CyclicReflex(LogitsProcessor):
    """Waves on the scores of reflection words while a row thinks, by its number of generated tokens.

    `words` are separated by commas; of each, the forms with and without a space before it that are one token count,
    longer ones are skipped. A row stops thinking with `end_of_thinking` in what it generated ("" for never). The width
    of the prompts is learned from the first call and from any that does not continue those: to go on with a text that
    an earlier call generated, build a new processor.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        amplitude: float = 5.0,
        period: float = 1200.0,
        shift: float = 0.0,
        start: int = 0,
        stop: int = 8192,
        schedule: Literal["triangle", "constant"] = "triangle",
        words: str = "wait,Wait,but,But,Alternatively",
        end_of_thinking: str = "</think>",
    ) -> None:
        """See the class.

        Raises:
            ValueError: when none of the words is one token, or the period is not above 0.
        """
        if not period > 0:
            raise ValueError(f"cyclicreflex: the period is a number of tokens above 0, got {period}")
        self.reflection_ids = reflection_ids(tokenizer, [w.strip() for w in words.split(",") if w.strip()])
        self.end_ids = tokenizer.encode(end_of_thinking, add_special_tokens=False) if end_of_thinking else []
        self._options: dict[str, Any] = {
            "amplitude": amplitude, "period": period, "shift": shift, "start": start, "stop": stop,
            "schedule": schedule,
        }  # fmt: skip
        self._width = -1
        self._prompts: set[tuple[int, ...]] = set()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after ids [B, T]."""
        return self.shape(input_ids[:, self._prompt_width(input_ids) :], scores)

    def shape(self, generated: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after the `generated` ids [B, t] alone."""
        lengths = torch.full((len(generated),), generated.shape[1], device=scores.device)
        ids = torch.tensor(self.reflection_ids, device=scores.device)
        thinking = ~_contains(generated, self.end_ids).to(scores.device)
        return cyclicreflex(wide(scores), lengths, thinking, ids, **self._options).to(scores.dtype)

    def _prompt_width(self, input_ids: Tensor) -> int:
        width = input_ids.shape[1]
        known = width >= self._width and all(tuple(r) in self._prompts for r in input_ids[:, : self._width].tolist())
        if not known:
            if width != self._width:
                self._width, self._prompts = width, set()
            self._prompts.update(tuple(r) for r in input_ids.tolist())
        return self._width


def reflection_ids(tokenizer: Any, words: list[str]) -> list[int]:
    """Ids of the words, and of the words behind a space, that are one token.

    Raises:
        ValueError: when there is none.
    """
    forms = [form for word in words for form in (word, " " + word)]
    encoded = [tokenizer.encode(form, add_special_tokens=False) for form in forms]
    found = sorted({ids[0] for ids in encoded if len(ids) == 1})
    if not found:
        raise ValueError(
            f"cyclicreflex: none of {', '.join(words)} is one token of {type(tokenizer).__name__}; name other words"
        )
    return found


def _contains(ids: Tensor, sought: list[int]) -> Tensor:
    """Whether each row of ids [B, t] has the ids `sought` in it, one after the other."""
    if not sought or ids.shape[1] < len(sought):
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    windows = ids.unfold(1, len(sought), 1)
    return (windows == torch.tensor(sought, device=ids.device)).all(-1).any(-1)
