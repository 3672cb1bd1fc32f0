"""The padded forward: prompt and response side by side, one row each, padding on the right.

Attention is causal, so what stands to the right of a token cannot change it: right padding needs
no mask, and default positions are right for every row. Rows of similar length share a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.masked import valid_positions
from tokenloom.policy.interface import Gathered, Trunk


def predicting_positions(prompt_lengths: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which hidden state predicts which sampled token. The only code that shifts.

    For prompts of `prompt_lengths` [B] followed by responses with `mask` [B, T]: `rows`, `columns`
    [N] of the masked-in tokens and `positions` [N] in the joined sequence. Token t of a response
    stands at position P + t and is predicted by the state at P + t - 1.

    Raises:
        ValueError: when a first token has no state before it, its prompt being empty.
    """
    rows, columns = mask.nonzero(as_tuple=True)
    positions = prompt_lengths[rows] + columns - 1
    if bool((positions < 0).any()):
        row = int(rows[positions < 0][0])
        raise ValueError(
            f"row {row} has an empty prompt and a sampled first token: no state predicts it. "
            "Give every prompt at least one token, such as the model's start token"
        )
    return rows, columns, positions


def needed_lengths(count: int, rows: Tensor, positions: Tensor) -> Tensor:
    """How many tokens of each of `count` rows must be fed, [count] int64; 0 for a row without a sampled token.

    A row is fed up to its last predicting state: the last token itself predicts nothing asked for.
    """
    needed = torch.zeros(count, dtype=torch.int64)
    return needed.scatter_reduce_(0, rows, positions + 1, "amax")


def rotation_reach(config: Any) -> int | None:
    """Length beyond which a call turns all of its rows by other rotary angles; None where angles never change.

    LongRoPE (arXiv:2402.13753), as Phi-3 and Phi-4 have it, knows two sets of them, and the longest row decides.
    """
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [rope, *(r for r in rope.values() if isinstance(r, dict))]
    found = [r["original_max_position_embeddings"] for r in kinds if r.get("rope_type") == "longrope"]
    return min(found, default=None)


def rotated_alike(needed: Tensor, reach: int | None) -> list[Tensor]:
    """`needed` [B] for each set of rows that may share a call, 0 for the other rows; see `rotation_reach`."""
    if reach is None:
        return [needed]
    return [torch.where(side, needed, 0) for side in (needed <= reach, needed > reach)]


class PaddedForward:
    """Rows sorted by length, at most `token_budget` padded tokens a call (a longer row goes alone).

    `exact` puts only rows of equal length together: for a model that padding disturbs. `reach`: see `rotation_reach`.
    """

    def __init__(
        self, device: torch.device, *, token_budget: int, exact: bool = False, reach: int | None = None
    ) -> None:
        self.device, self.token_budget, self.exact, self.reach = device, token_budget, exact, reach

    def gather(self, trunk: Trunk, rollouts: Rollouts) -> Iterator[Gathered]:
        """One `Gathered` per call. Rows without a sampled token never reach the model."""
        mask = rollouts.mask.cpu()
        prompts = torch.tensor([len(p) for p in rollouts.prompt_tokens], dtype=torch.int64)
        rows, columns, positions = predicting_positions(prompts, mask)
        needed = needed_lengths(len(rollouts), rows, positions)
        for batch in self._batches(needed):
            width = int(needed[batch].max())
            hidden = trunk(self._tokens(rollouts, batch, width).to(self.device))
            place = torch.full((len(rollouts),), -1, dtype=torch.int64)
            place[batch] = torch.arange(len(batch))
            here = place[rows] >= 0
            at = (place[rows[here]] * width + positions[here]).to(self.device)
            flat = hidden.reshape(-1, hidden.shape[-1])
            yield Gathered(flat.index_select(0, at), rows[here].to(self.device), columns[here].to(self.device))

    def split(self, rollouts: Rollouts, token_budget: int) -> list[Tensor]:
        """Rows of micro-batches by falling length, `token_budget` padded tokens each; see `Forward.split`."""
        prompts = torch.tensor([len(p) for p in rollouts.prompt_tokens], dtype=torch.int64)
        rows, _, positions = predicting_positions(prompts, rollouts.mask.cpu())
        return PaddedForward(self.device, token_budget=token_budget)._batches(
            needed_lengths(len(rollouts), rows, positions)
        )

    def _batches(self, needed: Tensor) -> list[Tensor]:
        order = torch.argsort(needed, stable=True, descending=True)
        batches: list[list[int]] = []
        width = 0
        for row in order[needed[order] > 0].tolist():
            length = int(needed[row])
            full = not batches or (len(batches[-1]) + 1) * width > self.token_budget
            turned = self.reach is not None and length <= self.reach < width
            if full or turned or (self.exact and length != width):
                batches.append([])
                width = length
            batches[-1].append(row)
        return [torch.tensor(b, dtype=torch.int64) for b in batches]

    def _tokens(self, rollouts: Rollouts, batch: Tensor, width: int) -> Tensor:
        tokens = torch.empty(len(batch), width, dtype=torch.int64)
        valid = valid_positions(rollouts.lengths, rollouts.tokens.shape[1])
        for i, row in enumerate(batch.tolist()):
            prompt = rollouts.prompt_tokens[row]
            joined = torch.cat([prompt.cpu(), rollouts.tokens[row][valid[row]].cpu()])[:width]
            # Filled with the row's last token: some models search their input for a padding id and complain.
            tokens[i, : len(joined)], tokens[i, len(joined) :] = joined, joined[-1]
        return tokens
