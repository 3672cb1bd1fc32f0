"""Table policies: one logit vector for each prompt and state. Nothing generalizes, so nothing blurs the credit.

logprobs(s, a) = log softmax(logits(s))_a at temperature 1; entropies exact; values from a table of a critic; chunk
signals are run on the table's own logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, get_args

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.lab.critic import Critic
from tokenloom.lab.optimizer import ScaleFree
from tokenloom.lab.task import places
from tokenloom.lab.tree import Tree
from tokenloom.signals import CHUNK_SIGNALS, SIGNAL_NAMES, ChunkInput, ChunkSignal, Signals

CHUNK_INPUTS = {"logits", "ref_logits", "targets"}
"""What a table can hand to a chunk signal; it has no hidden states and no attention."""


STEP_LENGTH = 3.0
"""How far a batch moves all logits together. 32 rows visit some 150 states: about 0.25 nats each. Half of it takes
twice as many samples to learn, and twice of it half as many, with the methods in nearly the same order."""


class TablePolicy:
    """softmax(`logits` [P, S, V]) over a tree, with the frozen `reference` [P, S, V] that KL terms compare with."""

    def __init__(self, tree: Tree, logits: Tensor, *, critic: Critic, reference: Tensor | None = None) -> None:
        self.tree, self.critic = tree, critic
        self.logits = logits.detach().clone().requires_grad_()
        self.reference = self.logits.detach().clone() if reference is None else reference

    @property
    def parameters(self) -> list[Tensor]:
        """What the gradient is taken with respect to; the critic apart."""
        return [self.logits]

    def table(self) -> Tensor:
        """The logits of every state, [P, S, V], without gradient."""
        return self.logits.detach()

    def pull_back(self, gradient: Tensor) -> Tensor:
        """d / d parameters, flat, of what has the gradient [P, S, V] with respect to the table."""
        return gradient.reshape(-1)

    def moved(self, spread: float, generator: torch.Generator) -> Self:
        """A copy whose logits differ by independent normals of standard deviation `spread`."""
        noise = torch.randn(self.logits.shape, generator=generator, dtype=self.logits.dtype)
        return type(self)(self.tree, self.logits + spread * noise, critic=self.critic, reference=self.reference)

    def copy(self) -> Self:
        """The policy as it is now; the critic is shared."""
        return type(self)(self.tree, self.logits, critic=self.critic, reference=self.reference)

    def optimizer(self) -> ScaleFree:
        """A new optimizer of the logits."""
        return ScaleFree(self.parameters, STEP_LENGTH)

    def signals(self, rollouts: Rollouts, needs: Sequence[str], *, grad: bool = False,
                given: dict[str, Tensor] | None = None) -> Signals:  # fmt: skip
        """The signals named in `needs`, [B, T] float64; `given` are those taken before the update, by name.

        Raises:
            ValueError: for signals that a table does not have.
        """
        if missing := unknown_to_tables(needs):
            raise ValueError(f"a table policy has no {', '.join(missing)}: they need hidden states or attention")
        at = places(self.tree, rollouts)
        tokens = rollouts.tokens[..., None].clamp(0, self.tree.vocab - 1)
        found: dict[str, Tensor] = {}
        with torch.set_grad_enabled(grad):
            logits = _rows(self.logits, at)
            law = logits.log_softmax(-1)
            logprobs = law.gather(-1, tokens)[..., 0]
            found |= {n: logprobs for n in ("logprobs", "old_logprobs") if n in needs}
            if "entropies" in needs:
                found["entropies"] = -(law.exp() * law).sum(-1)
            if "ref_logprobs" in needs:
                reference = _rows(self.reference, at).log_softmax(-1)
                found["ref_logprobs"] = reference.gather(-1, tokens)[..., 0]
            if {"values", "old_values"} & set(needs):
                values = self.critic.at(self.tree, rollouts)
                found |= {n: values for n in ("values", "old_values") if n in needs}
            for chunk in [CHUNK_SIGNALS[n] for n in needs if n in CHUNK_SIGNALS]:
                held = dict(given or {})
                if missing := sorted(set(chunk.given) - held.keys()):
                    held |= self.signals(rollouts, missing).extras
                found[chunk.name] = self._chunk(chunk, logits, at, tokens[..., 0], rollouts.mask, held)
        for name in found:
            if name.startswith(("old_", "ref_")):
                found[name] = found[name].detach()
        return Signals(**{n: found.pop(n, None) for n in SIGNAL_NAMES}, extras=found)

    def _chunk(
        self, chunk: ChunkSignal, logits: Tensor, at: Tensor, targets: Tensor, mask: Tensor, given: dict[str, Tensor]
    ) -> Tensor:
        inputs: dict[str, Tensor] = {"logits": logits, "targets": targets} | given
        if "ref_logits" in chunk.inputs:
            inputs["ref_logits"] = _rows(self.reference, at)
        value: Tensor = chunk.function(*(inputs[n][mask] for n in chunk.inputs))
        out = value.new_zeros(mask.shape + value.shape[1:])
        # Not in place on a view: the values carry gradient.
        return out.masked_scatter(mask.view(mask.shape + (1,) * (value.ndim - 1)), value)


def unknown_to_tables(needs: Sequence[str]) -> list[str]:
    """The signals among `needs` that a table policy cannot give."""
    return sorted(n for n in needs if n not in SIGNAL_NAMES and not _from_logits(n))


def _from_logits(name: str) -> bool:
    chunk = CHUNK_SIGNALS.get(name)
    if chunk is None:
        return False
    own = CHUNK_INPUTS | {n for n in chunk.inputs if n not in get_args(ChunkInput) and _from_logits(n)}
    return set(chunk.inputs) <= own


def _rows(table: Tensor, at: Tensor) -> Tensor:
    """[B, T, V] of a table [P, S, V] at flat (prompt, state) numbers [B, T]."""
    return table.flatten(0, 1).index_select(0, at.reshape(-1)).reshape(*at.shape, -1)
