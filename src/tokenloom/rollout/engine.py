"""`generate`: sample groups of responses from a policy.

Every distinct prompt is prefilled once, all of them in one left-padded forward; its key/value cache
serves all copies; all rows decode together, finished ones leave the batch. A call makes as many
forward calls as its longest response has tokens (per wave, when `max_rows` asks for several).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenloom.batch import Rollouts, Sampling
from tokenloom.rollout.contexts import sampling_mode
from tokenloom.rollout.decode import ShapeLogits, decode_wave
from tokenloom.rollout.forward import base_model
from tokenloom.rollout.forward import model_positions as model_positions  # part of the engine's own surface
from tokenloom.rollout.lean import lean_modules
from tokenloom.rollout.listeners import Listeners, OnFinished, OnTokens, Progress
from tokenloom.rollout.masked_forward import can_be_masked
from tokenloom.rollout.randomness import base_seed
from tokenloom.rollout.record import Request, Response
from tokenloom.rollout.sampler import check_sampling


def generate(
    policy: Any,
    prompts: Sequence[Tensor | Sequence[int]],
    sampling: Sampling,
    *,
    copies: int | Sequence[int],
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    max_rows: int | None = None,
    shape_logits: ShapeLogits | None = None,
    speculate: int = 0,
    on_tokens: OnTokens | None = None,
    on_finished: OnFinished | None = None,
) -> Rollouts:
    """Sample `copies` responses (one number, or one per prompt) to each of `prompts` (ids, int64 [P_i]).

    Rows come prompt by prompt; `group_ids` is the index of the prompt in the list. A response ends
    with an end token of `policy.eos_ids`, with the token that completes one of `sampling.stop`, or
    at `sampling.max_tokens` (only then `truncated`); the token that ended it is part of it, of
    `lengths` and of `mask`. All tensors of the result are on the CPU.

    `sampler_logprobs` follow `sampling.processed`: False, the full softmax at the sampling
    temperature, which is what training log-probs are taken at; True, the law sampled from, after
    `shape_logits`, top-k and top-p (0 for greedy).

    Randomness: one seed per call, drawn from `generator`, or `sampling.seed`, or PyTorch's global
    state, and recorded as the result's `sampling.seed`; it alone reproduces the call. Each row has
    its own stream (see `randomness`), so neither finished neighbors nor `max_rows` change what it
    samples, beyond rounding of the forward. The same prompt twice in the list counts copies on.

    After every step `on_tokens(row, ids)` is told what was added to each row, `on_finished(row, response)`
    which rows have finished (`row` counts as the result's rows do), and `progress(finished, rows, tokens)` is
    called. `max_rows` bounds the rows that decode together, splitting prompts into waves.
    `shape_logits(logits [B, V] float32, step)` returns the logits to sample from, before the temperature, and
    may write in place; it sees rows of the batch that are at token `step` of their response, in no promised
    order, and must treat each by itself. `speculate` is the longest draft that a row checks in one step (see
    `draft`; 0: none); it changes how many steps a response takes, not the response, beyond rounding.

    Raises:
        ValueError: on an empty prompt, an id outside the vocabulary, more tokens than the model has
            positions, impossible parameters, drafts for a model that cannot take tokens back, or a model that
            takes no cache.
        FloatingPointError: when the model's logits are not numbers.
    """
    check_sampling(sampling)
    ids = [tuple(torch.as_tensor(p).reshape(-1).tolist()) for p in prompts]
    numbers = _copies(copies, len(ids))
    requests, groups = [], []
    seen: dict[tuple[int, ...], int] = {}
    for group, (prompt, number) in enumerate(zip(ids, numbers, strict=True)):
        first = seen.get(prompt, 0)
        requests += [Request(prompt, first + copy, sampling.max_tokens) for copy in range(number)]
        groups += [group] * number
        seen[prompt] = first + number
    seed = base_seed(generator, sampling.seed)
    responses = sample(
        policy,
        requests,
        sampling,
        seed,
        progress=progress,
        max_rows=max_rows,
        shape_logits=shape_logits,
        speculate=speculate,
        on_tokens=on_tokens,
        on_finished=on_finished,
    )
    return Rollouts.build(
        [r.prompt for r in requests],
        [r.tokens for r in responses],
        groups,
        pad_id=0 if policy.pad_id is None else policy.pad_id,
        sampler_logprobs=[r.logprobs for r in responses],
        truncated=torch.tensor([r.truncated for r in responses], dtype=torch.bool),
        sampling=replace(sampling, seed=seed),
    )


def sample(
    policy: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    seed: int,
    *,
    progress: Progress | None = None,
    max_rows: int | None = None,
    shape_logits: ShapeLogits | None = None,
    speculate: int = 0,
    on_tokens: OnTokens | None = None,
    on_finished: OnFinished | None = None,
) -> list[Response]:
    """Responses to `requests`, in order; each request has its own length limit.

    `row` counts the requests; the rest and what is raised is as in `generate`.
    """
    _check_requests(policy, requests, sampling, max_rows, speculate)
    listeners = Listeners(len(requests), progress, on_tokens, on_finished)
    responses: list[Response] = []
    with sampling_mode(policy), lean_modules(base_model(policy.model)) as lean:
        for wave in _waves(requests, max_rows):
            responses += decode_wave(
                policy,
                wave,
                sampling,
                seed,
                lean=lean,
                speculate=speculate,
                shape_logits=shape_logits,
                listeners=listeners.behind(responses),
            )
    return responses


def _copies(copies: int | Sequence[int], prompts: int) -> list[int]:
    numbers = [copies] * prompts if isinstance(copies, int) else [int(c) for c in copies]
    if len(numbers) != prompts:
        raise ValueError(f"copies has {len(numbers)} numbers for {prompts} prompts; give one number, or one per prompt")
    if any(number < 0 for number in numbers):
        raise ValueError(f"copies contains {min(numbers)}; a prompt is answered 0 times or more")
    return numbers


def _waves(requests: Sequence[Request], max_rows: int | None) -> Iterator[Sequence[Request]]:
    """Consecutive requests, at most `max_rows` at once; a prompt's copies stay together where they fit."""
    if max_rows is None or len(requests) <= max_rows:
        yield from [requests] if requests else []
        return
    start = 0
    while start < len(requests):
        end = min(start + max_rows, len(requests))
        cut = end
        while end < len(requests) and cut > start and requests[cut - 1].prompt == requests[end].prompt:
            cut -= 1
        end = cut if cut > start else end
        yield requests[start:end]
        start = end


def _check_requests(
    policy: Any, requests: Sequence[Request], sampling: Sampling, max_rows: int | None, speculate: int
) -> None:
    if not _takes_cache(base_model(policy.model)):
        raise ValueError(
            f"{type(base_model(policy.model)).__name__} does not keep all of its state in the cache that "
            "transformers' models share, so it cannot be decoded here; choose another model"
        )
    if speculate < 0:
        raise ValueError(f"speculate is {speculate}, must be >= 0, the longest draft in tokens (0: none)")
    if speculate and not can_be_masked(policy):
        raise ValueError(
            f"{type(base_model(policy.model)).__name__} has layers that cannot take rejected tokens back, so it "
            "decodes without drafts; set speculate to 0"
        )
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows is {max_rows}, must be >= 1, or None for no bound")
    if sampling.stop and policy.tokenizer is None:
        raise ValueError("stop strings are found in decoded text and this policy has no tokenizer; use end tokens")
    vocab = base_model(policy.model).get_input_embeddings().weight.shape[0]
    positions = model_positions(policy)
    for prompt in dict.fromkeys(r.prompt for r in requests):
        if not prompt:
            raise ValueError("a prompt has no tokens; a model needs at least one to continue, such as its start token")
        if min(prompt) < 0 or max(prompt) >= vocab:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise ValueError(f"a prompt contains token id {wrong}; this model's vocabulary is 0 to {vocab - 1}")
    for request in requests:
        if positions is not None and len(request.prompt) + request.max_tokens > positions:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and max_tokens={request.max_tokens} need more "
                f"than the {positions} positions this model has; lower max_tokens or drop prompts that long"
            )


def _takes_cache(model: Any) -> bool:
    """Whether the model's class, or one that it extends, knows the argument, and no module holds a state beside it."""
    forwards = [kind.__dict__["forward"] for kind in type(model).__mro__ if "forward" in kind.__dict__]
    known = any({"cache", "past_key_values"} & inspect.signature(f).parameters.keys() for f in forwards)
    # RecurrentGemma's, which a cache that hands a prompt on to its copies does not reach.
    return known and not any("recurrent_states" in vars(module) for module in model.modules())
