"""Logits processors of two kinds: `Truncate` cuts a law off, `Shape` changes scores.

Both leave the caller's scores alone, compute at least in float32 and give back the caller's format, row by row.

Letters: B rows, T ids so far (left padding included, as `generate` hands them on), V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokenloom.catalog import Part


class Truncate(LogitsProcessor):
    """Keeps the tokens that `rule(probs [B, V]) -> keep [B, V]` keeps; all others become -inf."""

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        self.rule = rule

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        keep = self.rule(wide(scores).softmax(-1))
        return torch.where(keep, scores, -torch.inf)


class Shape(LogitsProcessor):
    """Replaces scores by `rule(scores [B, V])`."""

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        self.rule = rule

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.rule(wide(scores)).to(scores.dtype)


def wide(scores: Tensor) -> Tensor:
    """Scores in float32 at least."""
    return scores if scores.dtype == torch.float32 else scores.to(torch.promote_types(scores.dtype, torch.float32))


def rule_shaper(part: Part) -> Callable[..., LogitsProcessor]:
    """A builder of the processor that applies a rule, with the rule's hyperparameters."""
    wrapper = Truncate if part.stage == "truncate" else Shape
    optional = [name for name, needed in part.inputs.items() if not needed]

    def build(**parameters: Any) -> LogitsProcessor:
        part.function(torch.full((1, 2), 0.5), **parameters)  # impossible parameters are told now
        return wrapper(functools.partial(part.function, **parameters))

    assert not optional, f"{part.name}: a rule that is a shaper by itself takes nothing but {list(part.inputs)}"
    build.__doc__ = inspect.getdoc(part.function)
    return build
