"""Soft Thinking as a loop: rows read mixtures of embeddings until they end their thinking, then decode as `generate`.

    model.generate(..., custom_generate=decode.loop("soft-thinking", tokenizer=tokenizer))

Prompts are expected to end where thinking begins. Thinking has its own temperature and cuts, given here; the answer
follows the generation config. Processors other than temperature and cuts apply to both. Rows of a batch may be in
different modes. The rules are in `methods.decoding.soft_thinking`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.embedded import embed, embedding_session, law_at, without_warpers
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.draw import Draw
from tokenloom.methods.decoding.soft_thinking import (
    cold_stop,
    concept,
    dirichlet_noise,
    entropy,
    gumbel_noise,
    mixture,
)


@decoder("soft-thinking", kind="loop")
class SoftThinking(Loop):
    """Mixtures of embeddings as inputs until `end` (text, by its last token, or an id); `temperature` 0 is greedy.

    `threshold` and `length` are the cold stop's: in thinking it forces the end of thinking, in the answer it ends
    the row. At temperature 0, where all laws are certain, its entropies are those at temperature 1. Mixtures are
    drawn around the model's with `dirichlet` (alpha) above 0, then made sharper or flatter at random with `gumbel`
    (temperature) above 0, whether the answer is sampled or not; the code uses 1.0 and 0.5.
    """

    unmasked = "feeds the model mixtures of tokens"

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        end: str | int = "</think>",
        temperature: float = 0.6,
        top_k: int = 30,
        top_p: float = 0.95,
        min_p: float = 0.001,
        max_topk: int = 10,
        threshold: float = 0.01,
        length: int = 256,
        dirichlet: float = 0.0,
        gumbel: float = 0.0,
    ) -> None:
        """Raises ValueError for cuts that keep nothing, a temperature or noise below 0, or an end without a token."""
        if not temperature >= 0:
            raise ValueError(f"soft-thinking: temperature must be 0 or more, got {temperature}")
        if length < 1:
            raise ValueError(f"soft-thinking: length = {length} would stop at once; threshold=0 is what never stops")
        if dirichlet < 0 or gumbel < 0:
            raise ValueError(
                f"soft-thinking: dirichlet (alpha) and gumbel (temperature) are above 0, or 0 for no noise; got "
                f"{dirichlet} and {gumbel}"
            )
        self.end = _end_token(tokenizer, end)
        self.temperature = temperature
        self.cuts: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "max_topk": max_topk}
        self.dirichlet, self.gumbel = dirichlet, gumbel
        self.stop: dict[str, Any] = {"threshold": threshold, "length": length}
        concept(torch.ones(1, 1), **self.cuts)  # refuses what cannot be, before any work

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        plain = replace(run, processors=without_warpers(run.processors))
        generated: list[list[int]] = [[] for _ in range(len(run))]
        live = list(range(len(run)))
        run.counts |= {"soft_steps": 0.0, "cold_stops": 0.0}
        with run.session() as opened:
            session = embedding_session(opened, "soft-thinking")
            scores = session.start()
            thinking = torch.ones(len(live), dtype=torch.bool, device=scores.device)
            cold = torch.zeros(len(live), dtype=torch.int64, device=scores.device)
            while True:
                news = [generated[r] for r in live]
                shaped = plain.shaped(live, news, scores)
                law = law_at(shaped, self.temperature)
                cold, stops = cold_stop(entropy(law_at(shaped, self.temperature or 1.0)), cold, **self.stop)
                weights, ids = concept(law, **self.cuts)
                if bool(thinking.any()):
                    weights, ids = self._disturbed(run.draw, weights, ids)
                tokens = torch.where(stops, self.end, ids[:, 0])
                if not bool(thinking.all()):
                    tokens = torch.where(thinking, tokens, self._answers(run, live, news, scores, thinking))
                soft = thinking & (tokens != self.end)
                inputs = torch.where(soft[:, None], mixture(weights, embed(run.model, ids)), embed(run.model, tokens))
                run.counts["soft_steps"] += float(soft.sum())
                run.counts["cold_stops"] += float(stops.sum())
                appended = run.append(live, generated, tokens.tolist())
                running = [place for place in appended if bool(thinking[place] | ~stops[place])]
                if not running:
                    return generated
                cold = torch.where(thinking & ~soft, 0, cold)
                thinking = soft
                if len(running) < len(live):
                    session.branch(running)
                    inputs, tokens, thinking, cold = (x[running] for x in (inputs, tokens, thinking, cold))
                live = [live[i] for i in running]
                scores = session.step_embeddings(inputs, tokens)

    def _disturbed(self, draw: Draw, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mixtures [B, M] under noise, first Dirichlet's."""
        ones = torch.ones_like(weights)
        if self.dirichlet > 0:
            gammas, exponentials = (draw.gamma(x).to(weights) for x in (self.dirichlet * weights + 1, ones))
            weights, ids = dirichlet_noise(weights, ids, gammas, exponentials, alpha=self.dirichlet)
        if self.gumbel > 0:
            weights, ids = gumbel_noise(weights, ids, draw.gamma(ones).to(weights), temperature=self.gumbel)
        return weights, ids

    def _answers(self, run: Run, live: list[int], news: list[list[int]], scores: Tensor, thinking: Tensor) -> Tensor:
        """Tokens [B] of the rows that answer, drawn as `generate` does; others are filled up."""
        places = (~thinking).nonzero()[:, 0].tolist()
        chosen = run.choose([live[i] for i in places], [news[i] for i in places], scores[places])
        tokens = torch.zeros(len(live), dtype=torch.int64, device=scores.device)
        tokens[places] = torch.tensor(chosen, device=scores.device)
        return tokens


def _end_token(tokenizer: Any, end: str | int) -> int:
    if isinstance(end, int):
        return end
    if tokenizer is None:
        raise ValueError(f"soft-thinking: to find the token of end={end!r} it needs tokenizer=...; or give its id")
    ids = tokenizer.encode(end, add_special_tokens=False)
    if not ids:
        raise ValueError(f"soft-thinking: end={end!r} has no token")
    return int(ids[-1])
