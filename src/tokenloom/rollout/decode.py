"""One wave of responses, decoded together, with or without drafts.

Without drafts a step feeds each row's last token and samples the next. With drafts it feeds the last token and a guess
at the next ones, and samples after each: token t of a row is drawn with the row's own number u_t (see `randomness`)
from the law after the tokens before it, so as long as the guess equals what was drawn, the draws behind it are the
ones that steps of a single token would have made. The first draw that differs from the guess is still right, being
conditioned on right tokens; what follows it is thrown away. The samples are thus the same as without drafts, not
merely of the same law; it is rejection sampling (arXiv:2211.17192) with a deterministic draft and common numbers.

Letters: N rows of the wave, B rows still in the batch, n tokens of a row in a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenloom.batch import Sampling
from tokenloom.rollout.draft import GroupDrafts
from tokenloom.rollout.forward import CachedForward, StatefulForward
from tokenloom.rollout.lean import Lean
from tokenloom.rollout.listeners import Listeners
from tokenloom.rollout.masked_forward import MaskedForward, can_be_masked
from tokenloom.rollout.randomness import row_key, uniform_streams
from tokenloom.rollout.record import Record, Request, Response
from tokenloom.rollout.sampler import Sampler
from tokenloom.rollout.stopping import StopStrings

ShapeLogits = Callable[[Tensor, int], Tensor]
# A batch is cut down once this share of its rows has finished: cutting copies the cache once,
# which a step of that many dead rows costs several times over.
_CUT_SHARE = 1 / 8
_NO_GUESS = -1
# Tokens up to which a step takes about as long as with one: then its time is that of reading the weights. Drafts fill
# up a step to so many, and a wide batch decodes without them until few of its rows are left.
_FREE_TOKENS = {"cpu": 16}
_FREE_ELSEWHERE = 256


def decode_wave(
    policy: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    seed: int,
    *,
    lean: Lean,
    speculate: int = 0,
    listeners: Listeners,
    shape_logits: ShapeLogits | None = None,
) -> list[Response]:
    """Responses to `requests`, in order. The caller holds `contexts.sampling_mode` and `lean.lean_modules`.

    Raises:
        FloatingPointError: when the model's logits are not numbers.
    """
    device = policy.device
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt for r in requests))}
    rows = torch.tensor([distinct[r.prompt] for r in requests], device=device)
    limits = torch.tensor([r.max_tokens for r in requests], device=device)
    ends = torch.tensor(sorted(policy.eos_ids), dtype=torch.int64, device=device)
    watchers = [StopStrings(policy.tokenizer, sampling.stop) for _ in requests] if sampling.stop else []
    drafts = GroupDrafts([r.prompt for r in requests], speculate) if speculate else None

    forward: CachedForward = MaskedForward(policy, lean=lean) if can_be_masked(policy) else StatefulForward(policy)
    logits = forward.start(list(distinct), rows)[:, None]
    record = Record(requests, logits)
    responses: dict[int, Response] = {}
    draws = _Draws(requests, sampling, seed, record, shape_logits)

    batch = torch.arange(len(requests), device=device)  # which row of the wave each row of the batch is
    alive = torch.ones(len(requests), dtype=torch.bool, device=device)  # [B], False once finished
    guesses = torch.empty(len(requests), 0, dtype=torch.int64, device=device)  # [B, n - 1]
    for step in range(int(limits.max())):
        ahead = torch.arange(logits.shape[1], device=device)
        # Without drafts the rows in step are all at the same place; those that have finished do not matter.
        places = record.counts[batch, None] + ahead if drafts is not None else torch.full_like(batch[:, None], step)
        tokens, logprobs = draws.at(logits, batch, places)
        right = (tokens[:, :-1] == guesses).long().cumprod(1).sum(1)
        fresh = torch.minimum(right + 1, limits[batch] - record.counts[batch]) * alive
        fresh, ended = _until(torch.isin(tokens, ends), fresh)
        if watchers:
            _until_stopped(watchers, batch, tokens, fresh, ended)
        record.write(batch, tokens, logprobs, fresh, ended)
        still = alive & ~ended & (record.counts[batch] < limits[batch])
        left = int(still.sum())
        added = _added(batch, tokens, fresh)
        for row, ids in added:
            listeners.tokens(row, ids)
        for row in batch[alive & ~still].tolist():
            responses[row] = record.response(row)
            listeners.finished(row, responses[row])
        listeners.step(len(requests) - left, int(record.counts.sum()))
        if left == 0:
            break
        last, alive = tokens.gather(1, (fresh - 1).clamp(min=0)[:, None]), still
        if len(batch) - left >= _CUT_SHARE * len(batch):
            kept = alive.nonzero()[:, 0]
            forward.keep(kept)
            batch, last, alive = batch[kept], last[kept], alive[kept]
        guesses = last[:, :0]
        done: int | Tensor = step
        if drafts is not None:
            drafts.learn(added)
            guesses, done = _guess(drafts, batch, alive, limits - record.counts), record.counts[batch] - 1
        logits = forward.step(torch.cat((last, guesses.clamp(min=0)), 1), done)
    return [responses[row] for row in range(len(requests))]


class _Draws:
    """Draws the next tokens of rows, each with its own numbers and laws."""

    def __init__(
        self, requests: Sequence[Request], sampling: Sampling, seed: int, record: Record, shape: ShapeLogits | None
    ) -> None:
        self._sampler, self._record, self._shape = Sampler(sampling), record, shape
        keys = [row_key(seed, r.prompt, r.copy) for r in requests]
        self._uniforms = uniform_streams(keys, record.tokens.shape[1], record.tokens.device)

    def at(self, logits: Tensor, batch: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs [B, n] from `logits` [B, n, V], for `places` [B, n] of the responses `batch` [B]."""
        b, n, vocab = logits.shape
        places = places.clamp(max=self._uniforms.shape[1] - 1)  # beyond a row's limit nothing is kept
        uniforms = self._uniforms[batch[:, None], places].flatten()
        logits, unshaped = logits.reshape(b * n, vocab), None
        if self._shape is not None:
            unshaped = logits.to(self._record.logprobs.dtype)
            logits = unshaped.clone()
            steps = sorted(set(places.flatten().tolist()))
            if len(steps) == 1:
                logits = self._shape(logits, steps[0])
            else:
                for step in steps:
                    here = (places == step).flatten()
                    logits[here] = self._shape(logits[here], step)
        tokens, logprobs = self._sampler.draw(logits, uniforms, unshaped)
        return tokens.view(b, n), logprobs.view(b, n)


def _until(hits: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """`fresh` [B] cut behind the first of `hits` [B, n], and whether there was one within it."""
    n = hits.shape[1]
    first = torch.where(hits, torch.arange(n, device=hits.device), n).amin(1) + 1
    return torch.minimum(fresh, first), first <= fresh


def _until_stopped(
    watchers: Sequence[StopStrings], batch: Tensor, tokens: Tensor, fresh: Tensor, ended: Tensor
) -> None:
    """Cut `fresh` [B] behind the token that completes a stop string, and set `ended` [B], in place."""
    known = zip(batch.tolist(), tokens.tolist(), fresh.tolist(), strict=True)
    for i, (row, ids, count) in enumerate(known):
        for number, token in enumerate(ids[:count], 1):
            if watchers[row].push(token):
                fresh[i], ended[i] = number, True
                break


def _guess(drafts: GroupDrafts, batch: Tensor, alive: Tensor, left: Tensor) -> Tensor:
    """Drafts for the rows in step [B, n - 1], `_NO_GUESS` where there is none; `left` [N] tokens are to come."""
    room = left.tolist()
    longest = _FREE_TOKENS.get(batch.device.type, _FREE_ELSEWHERE) // len(batch) - 1
    found: list[list[int]] = [[] for _ in batch]
    if longest > 0:
        for i, (row, running) in enumerate(zip(batch.tolist(), alive.tolist(), strict=True)):
            if running:
                # The last token of a response needs no guess at a token behind it.
                found[i] = drafts.propose(row, min(longest, room[row] - 1))
    guesses = torch.full((len(found), max(map(len, found))), _NO_GUESS, dtype=torch.int64)
    for i, draft in enumerate(found):
        guesses[i, : len(draft)] = torch.tensor(draft, dtype=torch.int64)
    return guesses.to(batch.device)


def _added(batch: Tensor, tokens: Tensor, fresh: Tensor) -> list[tuple[int, list[int]]]:
    """For each row of the batch that got tokens, its number in the wave and the tokens."""
    known = zip(batch.tolist(), tokens.tolist(), fresh.tolist(), strict=True)
    return [(row, ids[:count]) for row, ids, count in known if count]
