"""One step's batch: sample responses, score them, and sample anew where the algorithm drops groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts
from tokenloom.masked import group_index
from tokenloom.tasks import Item
from tokenloom.train.data import PromptStream, derive
from tokenloom.train.extras import with_extras
from tokenloom.train.recipe import Recipe
from tokenloom.train.respond import Report, Responder, Responses


@dataclass(frozen=True)
class Collected:
    """A step's rollouts, the items and texts of its rows, and how the collection went.

    `first_*` speak of the first sampling round, before any group was dropped: what the policy achieves on the
    prompts as they come.
    """

    rollouts: Rollouts
    items: list[Item]
    texts: list[str]
    first_accuracy: float
    first_reward: float
    rounds: int
    sampled_groups: int
    errors: int
    messages: list[str]


class Collector:
    """Draws prompts, samples groups of responses and scores them."""

    def __init__(self, recipe: Recipe, responder: Responder, stream: PromptStream) -> None:
        self.recipe, self.responder, self.stream = recipe, responder, stream

    def collect(
        self, algorithm: Algorithm, step: int, state: Mapping[str, Any] | None = None, report: Report | None = None
    ) -> Collected:
        """The rollouts of a step, rows prompt by prompt, at most `prompts_per_step` groups.

        `state` is that of the algorithm's parts; a part that decides what is kept reads it.
        """
        recipe, total = self.recipe, self.recipe.train.steps
        wanted = recipe.rollout.prompts_per_step
        limit = recipe.train.max_sampling_rounds if algorithm.refill else 1
        rounds: list[Responses] = []
        drawn: list[list[Item]] = []
        kept: list[tuple[int, Tensor]] = []
        groups = 0
        while groups < wanted and len(rounds) < limit:
            items = self.stream.draw(wanted, step / total)
            responses = self._round(algorithm, items, step, len(rounds), state, report)
            keep = algorithm.keep(responses.rollouts, state, step=step, total_steps=total)
            chosen = torch.unique(responses.rollouts.group_ids[keep])[: wanted - groups]
            rows = torch.isin(responses.rollouts.group_ids, chosen).nonzero().reshape(-1)
            kept.append((len(rounds), rows))
            groups += len(chosen)
            rounds.append(responses)
            drawn.append(items)
        if not groups:
            # Nothing to learn from: the last round stands for the step, which is measured and changes nothing.
            kept = [(len(rounds) - 1, torch.arange(len(rounds[-1].texts)))]
        joined = self._join(rounds, drawn, [(n, rows) for n, rows in kept if len(rows)])
        return self._with_extras(algorithm, joined, step, report)

    def _round(
        self,
        algorithm: Algorithm,
        items: list[Item],
        step: int,
        number: int,
        state: Mapping[str, Any] | None,
        report: Report | None,
    ) -> Responses:
        config = self.recipe.rollout
        responses = self.responder.respond(
            items,
            config.sampling(),
            copies=config.group_size,
            generator=torch.Generator().manual_seed(derive(self.recipe.train.seed, "rollout", step, number)),
            report=report,
            shape=algorithm.shape_logits(step=step, total_steps=self.recipe.train.steps, state=state),
        )
        version = torch.full((len(responses.texts),), step, dtype=torch.int64)
        return replace(responses, rollouts=responses.rollouts.replace(policy_version=version))

    def _with_extras(self, algorithm: Algorithm, joined: Collected, step: int, report: Report | None) -> Collected:
        config, total = self.recipe.rollout, self.recipe.train.steps

        def generator(name: str) -> torch.Generator:
            return torch.Generator().manual_seed(derive(self.recipe.train.seed, name, step))

        def answered() -> Rollouts:
            first = {g: i for i, g in reversed(list(enumerate(joined.rollouts.group_ids.tolist())))}
            items = [joined.items[first[g]] for g in sorted(first)]
            with self.responder.policy.frozen() as old:
                responses = self.responder.under(old).respond(
                    items, config.sampling(), copies=config.group_size, generator=generator("reference"), report=report
                )
            return responses.rollouts

        def continued(rows: list[int], prefixes: list[Tensor], counts: list[int]) -> Rollouts:
            lengths = [len(joined.rollouts.prompt_tokens[row]) for row in rows]
            return self.responder.continue_from(
                [joined.items[row] for row in rows], lengths, prefixes, config.sampling(), counts=counts,
                generator=generator("branches"), report=report,
            )  # fmt: skip

        rollouts = with_extras(
            algorithm.rollout_needs, joined.rollouts, self.responder.policy.tokenizer, answered=answered,
            continued=continued, branches=algorithm.branches(joined.rollouts, step=step, total_steps=total),
        )  # fmt: skip
        return replace(joined, rollouts=rollouts)

    def _join(self, rounds: list[Responses], drawn: list[list[Item]], kept: list[tuple[int, Tensor]]) -> Collected:
        parts, items, texts = [], [], []
        groups = 0
        for number, rows in kept:
            part = rounds[number].rollouts.rows(rows)
            items += [drawn[number][g] for g in part.group_ids.tolist()]
            texts += [rounds[number].texts[i] for i in rows.tolist()]
            dense, count = group_index(part.group_ids)
            parts.append(part.replace(group_ids=dense + groups))
            groups += count
        first = rounds[0]
        rewards = first.rollouts.rewards
        return Collected(
            rollouts=Rollouts.concat(parts),
            items=items,
            texts=texts,
            first_accuracy=sum(first.correct) / max(len(first.correct), 1),
            first_reward=float(rewards.nanmean()) if rewards is not None else 0.0,
            rounds=len(rounds),
            sampled_groups=sum(len(d) for d in drawn),
            errors=sum(r.errors for r in rounds),
            messages=[m for r in rounds for m in r.messages],
        )
