"""One wave of responses: prefill every distinct prompt once, then decode all rows together.

Letters: U distinct prompts, B rows still in the batch, N rows of the wave, P longest prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenloom.batch import Sampling
from tokenloom.rollout.randomness import UniformStreams, row_key
from tokenloom.rollout.sampler import Sampler
from tokenloom.rollout.stopping import StopStrings

ShapeLogits = Callable[[Tensor, int], Tensor]
Report = Callable[[int, int], None]
# A batch is cut down once this share of its rows has finished: cutting copies the cache once,
# which a step of that many dead rows costs several times over.
_CUT_SHARE = 1 / 8


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


def base_model(model: Any) -> Any:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _Forward:
    """Calls the model with the arguments that its architecture has."""

    def __init__(self, model: Any) -> None:
        base = base_model(model)
        accepted = inspect.signature(base.forward).parameters
        self._model = model
        self._config = base.config
        # transformers renamed the argument in 5.x.
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        self._positions = "position_ids" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def prefill(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> tuple[Tensor, Any]:
        from tokenloom.rollout.cache import (
            new_cache,
        )  # brings transformers, which reading a recipe need not wait for

        cache = new_cache(self._config)
        return self.step(ids, mask, positions, cache), cache

    def step(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        """Logits [B, V] of the token after `ids` [B, S]."""
        extra = {"position_ids": positions} if self._positions else {}
        out = self._model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            **{self._cache_name: cache},
            **extra,
            **self._last_only,
        )
        logits: Tensor = out.logits[:, -1]
        return logits


def decode_wave(
    policy: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    seed: int,
    *,
    report: Report | None = None,
    shape_logits: ShapeLogits | None = None,
) -> list[Response]:
    """Responses to `requests`, in order. The caller holds `contexts.sampling_mode`.

    Raises:
        FloatingPointError: when the model's logits are not numbers.
    """
    device = policy.device
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt for r in requests))}
    rows = torch.tensor([distinct[r.prompt] for r in requests], device=device)
    limits = torch.tensor([r.max_tokens for r in requests], device=device)
    width = max(r.max_tokens for r in requests)
    ends = torch.tensor(sorted(policy.eos_ids), dtype=torch.int64, device=device)
    watchers = [StopStrings(policy.tokenizer, sampling.stop) for _ in requests] if sampling.stop else []
    streams = UniformStreams([row_key(seed, r.prompt, r.copy) for r in requests], device)
    sampler = Sampler(sampling)

    forward = _Forward(policy.model)
    ids, mask, lengths = _left_padded(list(distinct), width, device)
    prompt_width = ids.shape[1]
    positions = (torch.arange(prompt_width, device=device) - (prompt_width - lengths)[:, None]).clamp(min=0)
    padded = bool((lengths < prompt_width).any())
    logits, cache = forward.prefill(ids, mask[:, :prompt_width] if padded else None, positions)
    logits, mask, positions = logits[rows], mask[rows], lengths[rows, None]
    cache.reorder_cache(rows)

    record = _Record(len(requests), width, logits)
    batch = torch.arange(len(requests), device=device)  # which row of the wave each row of the batch is
    alive = torch.ones(len(requests), dtype=torch.bool, device=device)  # [B], False once finished
    for step in range(width):
        unshaped = None
        if shape_logits is not None:
            unshaped = logits.to(record.logprobs.dtype)
            logits = shape_logits(unshaped.clone(), step)
        token, logprob = sampler.draw(logits, streams.at(step)[batch], unshaped)
        hit = torch.isin(token, ends)
        if watchers:
            hit |= _push(watchers, batch, token, alive)
        record.write(step, batch, token, logprob, alive, hit)
        alive &= ~hit & (limits[batch] > step + 1)
        left = int(alive.sum())
        if report is not None:
            report(len(requests) - left, int(record.counts.sum()))
        if left == 0:
            break
        if len(batch) - left >= _CUT_SHARE * len(batch):
            kept = alive.nonzero()[:, 0]
            cache.reorder_cache(kept)
            batch, token, positions, mask, alive = (x[kept] for x in (batch, token, positions, mask, alive))
        seen = mask[:, : prompt_width + step + 1] if padded else None
        logits = forward.step(token[:, None], seen, positions + step, cache)
    return record.responses()


class _Record:
    """What has been sampled, by row of the wave: tokens and log-probs [N, width], counts and ends [N]."""

    def __init__(self, rows: int, width: int, logits: Tensor) -> None:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.tokens = torch.zeros(rows, width, dtype=torch.int64, device=logits.device)
        self.logprobs = torch.zeros(rows, width, dtype=dtype, device=logits.device)
        self.counts = torch.zeros(rows, dtype=torch.int64, device=logits.device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=logits.device)

    def write(self, step: int, batch: Tensor, token: Tensor, logprob: Tensor, alive: Tensor, hit: Tensor) -> None:
        # Finished rows that are still in the batch write beyond their count, where nothing reads.
        self.tokens[batch, step], self.logprobs[batch, step] = token, logprob
        self.counts[batch] += alive
        self.ended[batch] |= hit & alive

    def responses(self) -> list[Response]:
        tokens, logprobs = self.tokens.cpu(), self.logprobs.cpu()
        out = []
        for row, (count, ended) in enumerate(zip(self.counts.tolist(), self.ended.tolist(), strict=True)):
            taken = logprobs[row, :count].clone()
            if bool(taken.isnan().any()):
                where = int(taken.isnan().int().argmax())
                raise FloatingPointError(
                    f"the model's logits at token {where} of a response are not numbers; its weights have "
                    "probably diverged. Resume an earlier checkpoint with a lower learning rate"
                )
            out.append(Response(tokens[row, :count].clone(), taken, not ended))
        return out


def _left_padded(prompts: Sequence[tuple[int, ...]], room: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [U, P], mask [U, P + room] (1 in the room), lengths [U]. The mask hides the pads' id."""
    lengths = torch.tensor([len(p) for p in prompts])
    longest = int(lengths.max())
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
    mask = torch.arange(longest + room) >= (longest - lengths)[:, None]
    return ids.to(device), mask.long().to(device), lengths.to(device)


def _push(watchers: Sequence[StopStrings], batch: Tensor, token: Tensor, alive: Tensor) -> Tensor:
    """Which rows of the batch [B] now contain a stop string."""
    known = zip(batch.tolist(), token.tolist(), alive.tolist(), strict=True)
    hits = [running and watchers[row].push(taken) for row, taken, running in known]
    return torch.tensor(hits, device=token.device)
