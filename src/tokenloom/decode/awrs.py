"""AWRS with sequential Monte Carlo: strings of the model's law given a constraint, with few constraint calls.

Each prompt gets N particles. A step draws a token for each by `methods.decoding.awrs`, multiplies the particle's weight
by the unbiased estimate of the valid mass, and resamples when the weights have become too uneven. The result of a row
is drawn by the final weights; `posteriors` keeps all particles and the estimate of the normalizing constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.decode.constraints.protocol import allowed, describe, ending_with
from tokenloom.decode.particles import Posterior, check_swarm
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.methods.decoding.awrs import TAIL, awrs_token
from tokenloom.methods.decoding.locally_constrained import masked_token
from tokenloom.methods.decoding.smc import Scheme, resampled


@dataclass
class Particle:
    """A string with its log weight; `session_row` is where its state lies while it is live."""

    tokens: list[int] = field(default_factory=list)
    log_weight: float = 0.0
    log_twist: float = 0.0
    done: bool = False
    session_row: int = -1


@dataclass
class Known:
    """What was found out about the tokens behind a prefix: particles that share it do not ask again."""

    refused: Tensor
    """[V] bool."""
    allowed: Tensor | None = None
    """The same, once all were asked about."""
    answers: dict[int, bool] = field(default_factory=dict)


@decoder("awrs", kind="loop")
class Awrs(Loop):
    """Sampling from the model's law given a constraint, by adaptive weighted rejection and resampled particles.

    `critic(tokens) -> log weight` multiplies the law further; resampling uses its value at every prefix, and the final
    law its value of whole strings. Without valid strings a row is the longest prefix found, and its weight -inf.

    particles: strings per prompt. ess: resample when the effective size falls below this share of them; 0 never does,
    and asks the critic at the end only. mode: how a token is found, see the rule; "mask" asks about all tokens, which
    makes the weight exact. at_limit: "end" makes the end token come within the length limit, "cut" keeps what was cut.
    """

    def __init__(
        self,
        constraint: Any,
        critic: Any = None,
        *,
        particles: int = 8,
        ess: float = 0.5,
        resampling: Scheme = "systematic",
        mode: Literal["auto", "recursive", "geometric", "improper", "mask"] = "auto",
        max_accepts: int = 2,
        max_rejects: int | None = None,
        at_limit: Literal["end", "cut"] = "end",
    ) -> None:
        check_swarm("awrs", particles, ess)
        self.constraint, self.critic = constraint, critic
        self.particles, self.ess, self.at_limit = particles, ess, at_limit
        self.mode, self.max_accepts, self.max_rejects = mode, max_accepts, max_rejects
        self.resampling: Scheme = resampling
        self.posteriors: list[Posterior] = []
        """Of each row of the last call."""

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`.

        Raises:
            ValueError: without sampling, or when no token that the model gives mass to may come first.
        """
        if not run.sample:
            raise ValueError("awrs samples; call generate with do_sample=True, or use the loop 'locally-constrained'")
        constraint = ending_with(self.constraint, run.eos)
        run.counts |= {"constraint_calls": 0, "masks": 0, "tokens": 0, "resamplings": 0}
        swarms = [[Particle() for _ in range(self.particles)] for _ in range(len(run))]
        live = [(row, p) for row, swarm in enumerate(swarms) for p in swarm]
        with run.session([row for row, _ in live]) as session:
            scores = session.start()
            while True:
                known: dict[tuple[int, tuple[int, ...]], Known] = {}
                logws = run.shaped([r for r, _ in live], [p.tokens for _, p in live], scores).double().cpu()
                for place, (row, particle) in enumerate(live):
                    particle.session_row = place
                    refused = torch.zeros(logws.shape[-1], dtype=torch.bool)
                    here = known.setdefault((row, tuple(particle.tokens)), Known(refused))
                    self._extend(run, constraint, row, particle, here, logws[place].log_softmax(-1))
                for row in dict.fromkeys(row for row, _ in live):
                    swarms[row] = self._resampled(run, swarms[row])
                live = [(row, p) for row, swarm in enumerate(swarms) for p in swarm if not p.done]
                if not live:
                    break
                session.branch([p.session_row for _, p in live])
                scores = session.step(torch.tensor([p.tokens[-1] for _, p in live]))
        self.posteriors = [Posterior([p.tokens for p in swarm], _weights(swarm)) for swarm in swarms]
        return [self._chosen(run, row) for row in range(len(run))]

    def _extend(self, run: Run, constraint: Any, row: int, particle: Particle, known: Known, logw: Tensor) -> None:
        """One token for a particle, or its end."""
        prefix = particle.tokens
        if self.at_limit == "end" and len(prefix) == run.limit - 1:
            ends = torch.full_like(logw, -torch.inf)
            ends[list(run.eos)] = logw[list(run.eos)]
            logw = ends
        token, log_weight = self._token(run, constraint, known, prefix, logw)
        run.counts["tokens"] += 1
        particle.log_weight += log_weight
        if log_weight == -math.inf:
            if not prefix and not bool(allowed(constraint, prefix, logw.exp()).any()):
                raise ValueError(f"{describe(constraint)} allows no first token that the model gives mass to")
            particle.done = True
            return
        _, particle.done = run.until_stop(row, prefix, [token])
        particle.tokens = [*prefix, token]
        if self.critic is not None and (particle.done or self.ess > 0):
            twist = float(self.critic(particle.tokens))
            particle.log_weight += twist - particle.log_twist
            particle.log_twist = twist
            particle.done |= twist == -math.inf

    def _token(self, run: Run, constraint: Any, known: Known, prefix: list[int], logw: Tensor) -> tuple[int, float]:
        # What is known to be refused is left out, and with it its mass: the weight is as right without it.
        logw = logw.masked_fill(known.refused, -torch.inf)
        if float(logw.max()) == -math.inf:
            return -1, -math.inf
        if self.mode == "mask":
            if known.allowed is None:
                run.counts["constraint_calls"] += int((logw > -torch.inf).sum())
                known.allowed = allowed(constraint, prefix, logw.exp())
            return masked_token(logw, known.allowed, run.draw)

        def accept(token: int) -> bool:
            if token not in known.answers:
                run.counts["constraint_calls"] += 1
                known.answers[token] = bool(constraint.accept(prefix, token))
                known.refused[token] = not known.answers[token]
            return known.answers[token]

        def rest() -> Tensor:
            run.counts["masks"] += 1
            found = allowed(constraint, prefix, logw.exp())
            known.refused |= ~found
            return found

        def refused_with(token: int) -> Tensor:
            ids: Tensor = constraint.refused_with(prefix, token)
            ids = ids[ids < len(logw)]
            known.refused[ids] = True
            return ids

        has_mask = callable(getattr(constraint, "mask", None))
        explains = callable(getattr(constraint, "refused_with", None))
        return awrs_token(
            logw,
            accept,
            run.draw,
            rest=rest if has_mask else None,
            refused_with=refused_with if explains else None,
            mode=self.mode,
            max_accepts=self.max_accepts,
            max_rejects=self.max_rejects,
            # Where refusals take others along, few questions lead through all that is left.
            tail=0.0 if explains else TAIL,
        )

    def _resampled(self, run: Run, swarm: list[Particle]) -> list[Particle]:
        if all(p.done for p in swarm):
            return swarm
        made = resampled(_weights(swarm), run.draw, ess=self.ess, resampling=self.resampling)
        if made is None:
            return swarm
        run.counts["resamplings"] += 1
        parents = [swarm[i] for i in made[0]]
        return [
            Particle(p.tokens, weight, p.log_twist, p.done, p.session_row)
            for p, weight in zip(parents, made[1].tolist(), strict=True)
        ]

    def _chosen(self, run: Run, row: int) -> list[int]:
        chosen = self.posteriors[row].drawn(run.draw)
        run.stream(row, chosen)
        return chosen


def _weights(swarm: list[Particle]) -> Tensor:
    return torch.tensor([p.log_weight for p in swarm], dtype=torch.float64)
