"""What a wave of rows has sampled so far: requests in, responses out.

Letters: N rows of the wave, B of them still in the batch, n tokens at most that one step adds to a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """One response to sample: its prompt's ids, its number among the prompt's copies, its longest length."""

    prompt: tuple[int, ...]
    copy: int
    max_tokens: int


@dataclass(frozen=True)
class Response:
    """Sampled ids, their log-probs, and whether the length limit cut the response off."""

    tokens: Tensor
    logprobs: Tensor
    truncated: bool


class Record:
    """Tokens and log-probs [N, longest], `counts` [N] of those that are valid, and which rows have `ended`."""

    def __init__(self, requests: Sequence[Request], logits: Tensor) -> None:
        rows, width = len(requests), max(r.max_tokens for r in requests)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        device = logits.device
        self.tokens = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, width, dtype=dtype, device=device)
        self.counts = torch.zeros(rows, dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)

    def write(self, batch: Tensor, tokens: Tensor, logprobs: Tensor, fresh: Tensor, ended: Tensor) -> None:
        """Append the first `fresh` [B] of `tokens` [B, n] to the rows `batch` [B]; `ended` [B] says the response ended.

        Raises:
            FloatingPointError: when a log-prob is not a number.
        """
        ahead = torch.arange(tokens.shape[1], device=tokens.device)
        valid = ahead < fresh[:, None]
        at = (self.counts[batch, None] + ahead)[valid]
        rows, taken = batch[:, None].expand_as(valid)[valid], logprobs[valid]
        if bool(taken.isnan().any()):
            where = int(at[taken.isnan()].min())
            raise FloatingPointError(
                f"the model's logits at token {where} of a response are not numbers; its weights have "
                "probably diverged. Resume an earlier checkpoint with a lower learning rate"
            )
        self.tokens[rows, at], self.logprobs[rows, at] = tokens[valid], taken
        self.counts[batch] += fresh
        self.ended[batch] |= ended

    def response(self, row: int) -> Response:
        """What row `row` of the wave has sampled."""
        count = int(self.counts[row])
        tokens, logprobs = self.tokens[row, :count].cpu(), self.logprobs[row, :count].cpu()
        return Response(tokens.clone(), logprobs.clone(), not bool(self.ended[row]))
