"""Contrastive search as a loop, for batches; the k candidates are read in one forward, as a tree of one level.

model.generate(**inputs, custom_generate=decode.loop("contrastive-search", alpha=0.6, k=4))
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.decode.session import ROOT
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.beam_search import best_continuations
from tokenloom.methods.decoding.contrastive_search import contrastive_scores, largest_cosine


@decoder("contrastive-search", kind="loop")
class ContrastiveSearch(Loop):
    """Of the `k` likeliest tokens the one that best trades probability for being unlike the text so far."""

    def __init__(self, *, alpha: float = 0.6, k: int = 5) -> None:
        """Raises ValueError unless 0 <= alpha <= 1 and k >= 1."""
        if k < 1:
            raise ValueError(f"contrastive-search: k = {k}; at least one candidate is needed")
        contrastive_scores(torch.ones(1, 1), torch.ones(1, 1), alpha=alpha)
        self.alpha, self.k = alpha, k

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        if run.sample:
            raise ValueError("contrastive-search draws nothing: pass do_sample=False (temperature 0)")
        generated: list[list[int]] = [[] for _ in range(len(run))]
        live = list(range(len(run)))
        with run.session(output_hidden_states=True) as session:
            scores = session.start()
            if not hasattr(session, "output"):
                raise ValueError("contrastive-search compares hidden states; this model hands none out")
            context, mask = _prompt_states(run, session.output.hidden_states[-1])
            while True:
                laws = run.shaped(live, [generated[r] for r in live], scores).softmax(-1)
                tokens = best_continuations(laws, beams=self.k)
                probs = laws.gather(1, tokens)
                tried = session.try_nodes(tokens, torch.full_like(tokens, ROOT))
                run.counts["forwards"] = run.counts.get("forwards", 0.0) + 1
                states = wide(session.output.hidden_states[-1])
                likeness = largest_cosine(states, context, mask)
                best = contrastive_scores(probs.to(likeness.dtype), likeness, alpha=self.alpha).argmax(-1)
                running = run.append(live, generated, tokens.gather(1, best[:, None])[:, 0].tolist())
                if not running:
                    return generated
                session.accept([[b] for b in best.tolist()])
                every = torch.arange(len(live), device=states.device)
                context = torch.cat((context, states[every, best][:, None]), 1)
                mask = torch.cat((mask, mask.new_ones(len(live), 1)), 1)
                scores = tried[every, best]
                if len(running) < len(live):
                    session.branch(running)
                    context, mask, scores = context[running], mask[running], scores[running]
                    live = [live[i] for i in running]


def _prompt_states(run: Run, states: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [B, S, D] of all prompts and which of them are real, from those of the distinct prompts."""
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(p) for p in run.prompts))}
    lengths = torch.tensor([len(p) for p in run.prompts], device=states.device)
    mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    return wide(states)[[order[tuple(p)] for p in run.prompts]], mask
