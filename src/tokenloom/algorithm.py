"""`Algorithm`: a composition of parts that plans a batch and states its loss.

loss = -sum(scale * weights * objective) + sum over terms k of coef_k * sum(scale_k * weights_k * term_k)

Terms over a corpus, `corpus`, are added to every update on rows of plain text instead of responses.
`plan` sees the whole batch, gathered over ranks, without gradient; `loss` sees any micro-batch of an
update. Whatever couples rows is settled in the plan, or in `refresh` when it must read the policy
being trained, so every split into micro-batches gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenloom import demands, losses
from tokenloom.assembly import Assembly
from tokenloom.batch import Rollouts
from tokenloom.plan import Metrics, Plan, Update
from tokenloom.planning import Planner, expect, plan_context, rows_that_may_enter
from tokenloom.signals import Signals


@dataclass(frozen=True)
class Algorithm(Assembly):
    """A composition of bound parts, one per stage or a list of them, and what it does with a batch.

    Build one with `Algorithm.compose(...)`, a preset (`Algorithm.from_recipe("grpo")`), or by changing
    another (`algorithm.override(bounds={"high": 0.28})`). `preset` names where it came from.
    """

    # -- what must be there -------------------------------------------------------------------------

    @property
    def needs(self) -> frozenset[str]:
        """Signals to compute without gradient before `plan`."""
        return demands.for_plan(self)

    @property
    def loss_needs(self) -> frozenset[str]:
        """Signals to compute with gradient for `loss`."""
        return demands.for_loss(self)

    @property
    def corpus_needs(self) -> frozenset[str]:
        """Signals to compute with gradient for `corpus_loss`; empty without terms over a corpus."""
        return demands.for_corpus(self)

    @property
    def given(self) -> frozenset[str]:
        """Signals taken before the update that signals of the loss take as inputs; they are among `needs`."""
        return demands.given(self)

    @property
    def rollout_needs(self) -> frozenset[str]:
        """What parts or their signals read of `Rollouts.extras`, to be collected with the responses."""
        return demands.of_rollouts(self)

    @property
    def needs_whole_rows(self) -> bool:
        """Whether a part of the loss sees the tokens of a row together, so that a row is live as a whole or not."""
        return any(b.part.scope != "token" and not b.coupled for b in self.late_parts())

    @property
    def refill(self) -> bool:
        """Whether a select part wants dropped groups replaced by newly sampled ones."""
        return any(b.part.refill for b in self.select)

    @property
    def needs_refresh(self) -> bool:
        """Whether parts couple rows and read the policy being trained, so that `refresh` must run per update."""
        return any(b.coupled for b in self.late_weights())

    # -- while responses are drawn ------------------------------------------------------------------

    def shape_logits(
        self, *, step: int = 0, total_steps: int | None = None, state: Mapping[str, Any] | None = None
    ) -> Callable[[Tensor], Tensor] | None:
        """The sampling stage as one function of logits [N, V], or None when it is empty.

        `state` is `Plan.state` of the previous step; a sampling part reads what its own method left there.
        """
        if not self.sampling:
            return None

        def shape(logits: Tensor) -> Tensor:
            for bound in self.sampling:
                arguments: dict[str, Any] = {"logits": logits, "step": step, "total_steps": total_steps}
                if "state" in bound.part.inputs:
                    arguments["state"] = self._state_of(bound.part.slug, state or {})
                logits = bound.part.function(
                    **{n: arguments[n] for n in bound.part.inputs}, **bound.at(step, total_steps)
                )
            return logits

        return shape

    def branches(self, rollouts: Rollouts, *, step: int = 0, total_steps: int | None = None) -> Tensor | None:
        """How many further responses to draw from the state before each token, [B, T] int64; None without that stage.

        The mean rewards of those responses are collected as `segment_values`.
        """
        if self.branch is None:
            return None
        ctx = plan_context(rollouts, Signals(), step, total_steps, None)
        return expect(self.branch, ctx.call(self.branch), rollouts.mask)

    # -- the plan -----------------------------------------------------------------------------------

    def keep(
        self,
        rollouts: Rollouts,
        state: Mapping[str, Any] | None = None,
        *,
        step: int = 0,
        total_steps: int | None = None,
    ) -> Tensor:
        """[B] bool from the refilling select parts alone, which need no model: may these rows enter the batch?

        `state` is `Plan.state` of the previous step, read and not changed.
        """
        return rows_that_may_enter(self, rollouts, state, step, total_steps)

    def plan(
        self,
        rollouts: Rollouts,
        signals: Signals,
        state: Mapping[str, Any] | None = None,
        *,
        step: int = 0,
        total_steps: int | None = None,
        generator: torch.Generator | None = None,
        one_update: bool = False,
    ) -> Plan:
        """Decide everything about a batch: rewards, advantages, rows, weights, updates and their scales.

        Args:
            rollouts: the whole batch, gathered over ranks, with `rewards`.
            signals: those named in `needs`; gradients are ignored.
            state: `Plan.state` of the previous step.
            generator: for parts that draw; default is seeded with `step`.
            one_update: put all kept rows into a single update whatever the updates part says.

        Raises:
            ValueError: when rewards or a needed signal are missing, or a part returns a wrong shape.
        """
        if rollouts.rewards is None:
            raise ValueError("plan needs rollouts.rewards; score the responses first")
        ctx = plan_context(rollouts, signals, step, total_steps, generator)
        return Planner(self, ctx, state or {}).plan(one_update=one_update)

    def refresh(self, update: Update, signals: Signals, generator: torch.Generator | None = None) -> Update:
        """Evaluate, for a whole update, the parts that couple rows and read the policy being trained.

        `signals` are those of `loss_needs` for all rows of the update, gradients ignored.
        """
        return losses.refresh(self, update, signals, generator) if self.needs_refresh else update

    # -- the loss -----------------------------------------------------------------------------------

    def loss(self, signals: Signals, update: Update) -> tuple[Tensor, Metrics]:
        """The loss (scalar, to minimize) of an update or of any micro-batch `update[rows]` of it, and its metrics.

        `signals` are those of `loss_needs` for the same rows; only the entries at `update.live` are read (a part
        that `refresh` settles saw all of them). Sums over a split equal the whole.

        Raises:
            ValueError: when a part that couples rows was not settled by `refresh` before slicing.
        """
        return losses.loss(self, signals, update)

    def corpus_loss(
        self,
        signals: Signals,
        rollouts: Rollouts,
        rows: Tensor | None = None,
        *,
        step: int = 0,
        total_steps: int | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The terms over a corpus (scalar, to minimize) of rows of plain text or of a micro-batch, and their metrics.

        Args:
            signals: those of `corpus_needs` for `rows`; entries off the mask are not read.
            rollouts: the whole corpus batch of the update, which settles the scales: a row's prompt is its first
                token, its response the tokens behind, `mask` those that enter the loss. Nothing else is read.
            rows: [n] int64, which rows `signals` speak of; None: all. Sums over a split equal the whole.

        Raises:
            ValueError: for signals that are missing or of another shape.
        """
        return losses.corpus_loss(self, signals, rollouts, rows, step, total_steps)

    def coefficients(
        self,
        rollouts: Rollouts,
        signals: Signals,
        state: Mapping[str, Any] | None = None,
        **surroundings: Any,
    ) -> dict[str, Tensor]:
        """-d loss / d signal for every differentiable signal, all rows in one update: {name: [B, T]}.

        Terms over a corpus are left out: they speak of other rows.

        The entry for `logprobs` is the picture of an algorithm: what it does to each token. `signals`
        needs `logprobs` and whatever else `needs` and `loss_needs` name.
        """
        return losses.coefficients(self, rollouts, signals, state=state, **surroundings)

    def _state_of(self, slug: str, state: Mapping[str, Any]) -> Any:
        """What the first stateful part of a method handed on, None at first."""
        keys = [k for k, b in self.bound_parts() if b.part.slug == slug and b.part.stage != "sampling"]
        return next((state[k] for k in keys if k in state), None)
