"""Sequential Monte Carlo as a segment search: draw a block, weigh it by a reward, resample.

model.generate(**inputs, do_sample=True, top_k=0,
               custom_generate=decode.loop("smc", reward=score, tokenizer=tokenizer, particles=16, block=8))

Where best-of-N looks for the largest reward, this samples: the law of responses is the model's own times
e^(strength x reward), the one that training with that reward and a KL penalty of 1/strength would tend to. A row is
drawn by the final weights; `posteriors` keeps all particles and the estimate of the normalizing constant.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from tokenloom.decode.constraints.protocol import allowed, describe, ending_with
from tokenloom.decode.particles import Posterior, check_swarm
from tokenloom.decode.registry import decoder
from tokenloom.decode.rewards import reward_of
from tokenloom.decode.run import Run
from tokenloom.decode.segment_search import Choice, Hypothesis, SearchLoop, draws, segment_search
from tokenloom.methods.decoding.locally_constrained import masked_token
from tokenloom.methods.decoding.smc import Scheme, resampled


@dataclasses.dataclass
class _Wanted:
    """What a call asks for; `potentials` are those of the hypotheses that are live (nats)."""

    run: Run
    constraint: Any
    potentials: dict[tuple[int, tuple[int, ...]], float] = dataclasses.field(default_factory=dict)


@decoder("smc", kind="loop")
class Smc(SearchLoop):
    """Sampling from the model's law times e^(strength x reward), given a constraint, by resampled particles.

    At least one of `reward` (see `tokenloom.decode.rewards`) and `constraint` is needed. The reward sees unfinished
    text too, which only steers: the law goes by whole responses, where cut ones count as whole. But -inf forbids, and
    with an unfinished text all that would follow it. With a
    constraint tokens come from the masked law, the weights undo the mask, and the end must come within the length
    limit. Where nothing has weight a row is the longest prefix found.

    particles: responses per prompt. ess: resample when the effective size falls below this share of them; 0 never does,
    and asks for rewards at the end only. block: tokens between two weighings.
    """

    def __init__(
        self,
        reward: Any = None,
        constraint: Any = None,
        tokenizer: Any = None,
        *,
        particles: int = 8,
        ess: float = 0.5,
        resampling: Scheme = "systematic",
        block: int = 1,
        strength: float = 1.0,
    ) -> None:
        """Raises ValueError for impossible numbers, or with neither a reward nor a constraint."""
        if reward is None and constraint is None:
            raise ValueError(
                "smc needs what responses are weighed by: a reward, a constraint, or both (on the command line "
                "smc:reward=FILE.py:NAME and --constraint)"
            )
        check_swarm("smc", particles, ess, block=block)
        if not 0 < strength < math.inf:
            raise ValueError(f"smc: strength lies above 0 and below infinity, got {strength}")
        self.constraint = constraint
        self.particles, self.ess, self.block, self.strength = particles, ess, block, strength
        self.resampling: Scheme = resampling
        self._reward = None if reward is None else reward_of("smc", reward, tokenizer)
        self.posteriors: list[Posterior] = []
        """Of each row of the last call."""

    def search(self, run: Run) -> list[list[Hypothesis]]:
        """See `SearchLoop`.

        Raises:
            ValueError: without sampling, or when no token that the model gives mass to may come first.
        """
        if not run.sample:
            raise ValueError("smc samples; call generate with do_sample=True, or use the loop 'best-of-n'")
        wanted = _Wanted(run, None if self.constraint is None else ending_with(self.constraint, run.eos))
        run.counts["resamplings"] = 0.0

        def tokens(run: Run, live: Sequence[Hypothesis], counts: Sequence[int]) -> list[list[Choice]]:
            return _tokens(wanted, live, counts)

        pools = segment_search(
            run,
            propose=lambda live: tokens(run, live, [1 if h.tokens else self.particles for h in live]),
            boundary=lambda h: len(h.tokens) - h.begin == self.block,
            score=lambda candidates: self._log_weights(wanted, candidates),
            select=lambda candidates: self._select(run, candidates),
            width=self.particles,
            tokens=tokens,
        )
        self.posteriors = [
            Posterior([_string(h) for h in pool], torch.tensor([h.score for h in pool], dtype=torch.float64))
            for pool in pools
        ]
        return pools

    def answer(self, run: Run, pool: list[Hypothesis]) -> Hypothesis:
        """See `SearchLoop`."""
        row = pool[0].row
        return Hypothesis(row, tuple(self.posteriors[row].drawn(run.draw)))

    def _log_weights(self, wanted: _Wanted, candidates: list[Hypothesis]) -> list[float]:
        asked = [h for h in candidates if (h.done or self.ess > 0) and h.notes[-1] > -math.inf]
        before, wanted.potentials = wanted.potentials, self._log_potentials(wanted.run, asked)
        weights = []
        for h in candidates:
            assert h.parent is not None, "what is weighed has just been extended"
            gained = wanted.potentials.get(h.key, 0.0) - before.get(h.parent.key, 0.0)
            weights.append(h.parent.score + sum(h.notes[h.begin :]) + gained)
        return weights

    def _log_potentials(self, run: Run, asked: list[Hypothesis]) -> dict[tuple[int, tuple[int, ...]], float]:
        # Children of one ancestor are equal for a while; a reward may cost as much as a forward.
        distinct = list({h.key: h for h in asked}.values())
        if self._reward is None or not distinct:
            return {}
        rewards = self._reward(run, distinct)
        if math.inf in rewards:
            raise ValueError("smc: a reward must be below infinity; to forbid everything else, give that -inf")
        return {h.key: self.strength * reward for h, reward in zip(distinct, rewards, strict=True)}

    def _select(self, run: Run, candidates: list[Hypothesis]) -> list[Hypothesis]:
        swarm = [dataclasses.replace(h, done=True) if h.score == -math.inf else h for h in candidates]
        if all(h.done for h in swarm):
            return swarm
        weights = torch.tensor([h.score for h in swarm], dtype=torch.float64)
        made = resampled(weights, run.draw, ess=self.ess, resampling=self.resampling)
        if made is None:
            return swarm
        run.counts["resamplings"] += 1
        return [
            dataclasses.replace(swarm[i], score=weight) for i, weight in zip(made[0], made[1].tolist(), strict=True)
        ]


def _tokens(wanted: _Wanted, live: Sequence[Hypothesis], counts: Sequence[int]) -> list[list[Choice]]:
    """Tokens by the law of `generate`, among those that the constraint allows; their note is their log weight."""
    run = wanted.run
    if wanted.constraint is None:
        return [[choice._replace(note=0.0) for choice in choices] for choices in draws(run, live, counts)]
    scores = torch.stack([h.scores for h in live if h.scores is not None])
    laws = run.shaped([h.row for h in live], [h.tokens for h in live], scores).double().cpu().log_softmax(-1)
    found = []
    for h, count, law in zip(live, counts, laws, strict=True):
        if len(h.tokens) == run.limit - 1:
            # What cannot end any more is not in the law that is wanted.
            ends = torch.full_like(law, -torch.inf)
            ends[list(run.eos)] = law[list(run.eos)]
            law = ends
        keep = allowed(wanted.constraint, h.tokens, law.exp())
        if not h.tokens and not bool(keep.any()):
            raise ValueError(f"{describe(wanted.constraint)} allows no first token that the model gives mass to")
        found.append([_choice(run, law, *masked_token(law, keep, run.draw)) for _ in range(count)])
    return found


def _choice(run: Run, law: torch.Tensor, token: int, log_weight: float) -> Choice:
    # Where nothing may follow, an end of weight 0 that `_string` takes back.
    return Choice(token, float(law[token]), log_weight) if token >= 0 else Choice(min(run.eos), -math.inf, -math.inf)


def _string(h: Hypothesis) -> list[int]:
    return list(h.tokens[:-1] if h.notes[-1] == -math.inf else h.tokens)
