"""Signals the slow, obvious way: one row at a time, without padding, from the model's whole logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenloom.batch import Rollouts, Sampling


def ragged_rollouts(vocab: int = 64, temperature: float = 0.7, seed: int = 3) -> Rollouts:
    """Five rows: ragged prompts and responses, a tool's tokens inside one, one row empty and one dead.

    What lies beyond a row's length is no token id at all: no code may read it.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(3, vocab, (n,), generator=generator).tolist()

    lengths = [6, 9, 0, 4, 3]
    masks = [[True] * n for n in lengths]
    masks[1][3:6] = [False] * 3
    masks[4] = [False] * 3
    return Rollouts.build(
        [ids(n) for n in (4, 9, 5, 1, 2)],
        [ids(n) for n in lengths],
        [0, 0, 1, 1, 1],
        response_masks=masks,
        pad_id=-(10**9),
        sampling=Sampling(temperature=temperature),
    )


def full_logits_signals(model: Any, rollouts: Rollouts, value: Any = None) -> dict[str, Tensor]:
    """`logprobs` and `entropies` (and `values`, with a function of hidden states) [B, T], with gradients."""
    temperature = rollouts.sampling.temperature or 1.0
    shape = rollouts.tokens.shape
    dtype = next(model.parameters()).dtype
    out = {n: torch.zeros(shape, dtype=dtype) for n in ("logprobs", "entropies", "values")}
    for i, prompt in enumerate(rollouts.prompt_tokens):
        response = rollouts.response(i)
        if len(response) == 0:
            continue
        output = model(torch.cat([prompt, response])[None], output_hidden_states=True, use_cache=False)
        law = torch.log_softmax(output.logits[0] / temperature, -1)
        for t in rollouts.mask[i].nonzero()[:, 0].tolist():
            state = len(prompt) + t - 1
            out["logprobs"][i, t] = law[state, response[t]]
            out["entropies"][i, t] = -(law[state].exp() * law[state]).sum()
            if value is not None:
                out["values"][i, t] = value(output.hidden_states[-1][0, state])
    return out
