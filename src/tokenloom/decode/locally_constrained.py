"""Locally constrained decoding as a loop: every token from the law masked by a constraint.

Fast with constraints that have a mask, always valid, but biased: `log_weights` holds, for each row, the log of the
mass kept at all its steps, which is what the strings are worth as samples of the model's law given the constraint.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tokenloom.decode.constraints.protocol import allowed, describe, ending_with
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.methods.decoding.locally_constrained import locally_constrained, masked_token


@decoder("locally-constrained", kind="loop")
class LocallyConstrained(Loop):
    """Tokens that a constraint allows, renormalized at every step (without sampling: the most probable of them).

    A row whose constraint comes to an end where nothing may follow stops with what it has, and weight -inf. Text cut by
    the length limit is a beginning of an allowed one.
    """

    def __init__(self, constraint: Any) -> None:
        self.constraint = constraint
        self.log_weights: list[float] = []
        """Of each row of the last call."""

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`.

        Raises:
            ValueError: when no token that the model gives mass to may come first.
        """
        constraint = ending_with(self.constraint, run.eos)
        generated: list[list[int]] = [[] for _ in range(len(run))]
        self.log_weights = [0.0] * len(run)
        live = list(range(len(run)))
        with run.session() as session:
            scores = session.start()
            while True:
                shaped = run.shaped(live, [generated[r] for r in live], scores).double().cpu()
                running: list[int] = []
                chosen: list[int] = []
                for place, row in enumerate(live):
                    logw = shaped[place].log_softmax(-1)
                    keep = allowed(constraint, generated[row], logw.exp())
                    token, log_weight = masked_token(logw, keep, run.draw)
                    if not run.sample and token >= 0:
                        token = int(locally_constrained(logw[None], keep[None]).argmax())
                    if token < 0 and not generated[row]:
                        raise ValueError(f"{describe(constraint)} allows no first token that the model gives mass to")
                    self.log_weights[row] += log_weight
                    if log_weight == -math.inf:
                        continue
                    _, stopped = run.until_stop(row, generated[row], [token])
                    generated[row].append(token)
                    run.stream(row, [token])
                    if not stopped:
                        running.append(place)
                        chosen.append(token)
                if not running:
                    return generated
                if len(running) < len(live):
                    session.branch(running)
                live = [live[i] for i in running]
                scores = session.step(torch.tensor(chosen))
