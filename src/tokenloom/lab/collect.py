"""Drawing rollouts from a table of logits, and a step's batch as the trainer would collect it.

The token is the inverse of softmax(logits(s)) at one uniform number. A sampling stage shapes the logits that are
drawn from; `sampler_logprobs` are those of the unshaped policy that drew, as a sampling engine reports them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts, Sampling
from tokenloom.lab.exact import law
from tokenloom.lab.task import Task, places, prompt_tokens, spell
from tokenloom.masked import group_index, masked_sum, valid_positions

ROUNDS = 4
"""Sampling rounds of a step in which an algorithm may ask for other groups instead of those it drops."""

Shape = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """A step's rollouts, and what drawing them cost: all sampled rows and tokens, dropped ones included."""

    rollouts: Rollouts
    rows: int
    tokens: int


class Sampler:
    """Draws responses to a task's prompts from the policy whose `table` [P, S, V] of logits it is given."""

    def __init__(self, task: Task, table: Tensor, generator: torch.Generator, *, group_size: int = 8) -> None:
        self.task, self.generator = task, generator
        self.logits = table.flatten(0, 1)
        self.cumulative = law(self.logits).cumsum(-1)
        self.group_size = group_size
        self.prompt_tokens = [prompt_tokens(p, task.tree) for p in range(task.prompts)]

    def collect(
        self, algorithm: Algorithm, state: Mapping[str, Any], *, step: int = 0, total_steps: int | None = None
    ) -> Batch:
        """One group for each prompt; where the algorithm drops groups, others in their place as far as rounds last.

        Without a single group worth keeping, the last round stands for the step, as in the trainer.
        """
        shape = algorithm.shape_logits(step=step, total_steps=total_steps, state=state)
        kept: list[Rollouts] = []
        groups = rows = tokens = 0
        prompts = torch.arange(self.task.prompts).repeat_interleave(self.group_size)
        for _ in range(ROUNDS if algorithm.refill else 1):
            drawn = self.draw(prompts, shape, step)
            rows, tokens = rows + len(drawn), tokens + int(drawn.lengths.sum())
            if not algorithm.refill:
                branches = algorithm.branches(drawn, step=step, total_steps=total_steps)
                return self._with_extras(Batch(drawn, rows, tokens), algorithm, branches, shape)
            keep = algorithm.keep(drawn, state, step=step, total_steps=total_steps)
            chosen = torch.unique(drawn.group_ids[keep])[: self.task.prompts - groups]
            part = drawn.rows(torch.isin(drawn.group_ids, chosen).nonzero().reshape(-1))
            dense, count = group_index(part.group_ids)
            if count:
                kept.append(part.replace(group_ids=dense + groups))
                groups += count
            if groups == self.task.prompts:
                break
        joined = Rollouts.concat(kept or [drawn])
        branches = algorithm.branches(joined, step=step, total_steps=total_steps)
        return self._with_extras(Batch(joined, rows, tokens), algorithm, branches, shape)

    def draw(
        self, prompts: Tensor, shape: Shape | None = None, step: int = 0, begun: tuple[Tensor, Tensor] | None = None
    ) -> Rollouts:
        """A scored response to each of `prompts` [B] int64; `begun`: tokens [B, H] and how many of them are given."""
        tree = self.task.tree
        tokens, lengths = self._tokens(prompts, shape, begun)
        mask = valid_positions(lengths, tree.horizon)
        at = prompts[:, None] * tree.states + tree.states_of(tokens)
        end = tree.vocab - 1 if tree.end else -1
        ended = tokens.gather(1, lengths[:, None] - 1)[:, 0] == end
        decisive = tokens[:, list(self.task.decisive)].tolist()
        return Rollouts(
            prompt_tokens=tuple(self.prompt_tokens[p] for p in prompts.tolist()),
            tokens=tokens,
            lengths=lengths,
            mask=mask,
            group_ids=prompts,
            rewards=masked_sum(self.task.rewards.flatten(0, 1)[at, tokens], mask, -1),
            truncated=~ended if tree.end else torch.zeros_like(ended),
            answers=tuple(spell(row) for row in decisive),
            prompts=tuple({"prompt": p, "answer": self.task.truth[p]} for p in prompts.tolist()),
            sampler_logprobs=self.logits[at].log_softmax(-1).gather(-1, tokens[..., None])[..., 0],
            sampling=Sampling(max_tokens=tree.horizon),
            policy_version=torch.full_like(lengths, step),
        )

    def _tokens(
        self, prompts: Tensor, shape: Shape | None, begun: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """[B, H] tokens, 0 beyond the end, and lengths [B]."""
        tree = self.task.tree
        uniforms = torch.rand(len(prompts), tree.horizon, generator=self.generator, dtype=torch.float64)
        number = torch.zeros_like(prompts)
        columns = []
        for depth in range(tree.horizon):
            at = prompts * tree.states + tree.offsets[depth] + number
            cumulative = self.cumulative[at]
            if shape is not None:
                cumulative = law(shape(self.logits[at]).to(torch.float64)).cumsum(-1)
            # The last sum may round to below 1, and a uniform number may lie between.
            token = (uniforms[:, depth, None] >= cumulative).sum(-1).clamp(max=tree.vocab - 1)
            if begun is not None:
                token = torch.where(depth < begun[1], begun[0][:, depth], token)
            columns.append(token)
            number = number * tree.branching + token.clamp(max=tree.branching - 1)
        tokens = torch.stack(columns, -1)
        if not tree.end:
            return tokens, torch.full_like(prompts, tree.horizon)
        ends = (tokens == tree.vocab - 1).long()
        before = ends.cumsum(-1) - ends
        return tokens * (before == 0), (before == 0).sum(-1)

    def _with_extras(self, batch: Batch, algorithm: Algorithm, branches: Tensor | None, shape: Shape | None) -> Batch:
        """What parts read besides the responses: where the answer stands, how the reference answers, and how further
        responses end that branch off before a token.
        """
        extras: dict[str, Tensor] = {}
        rollouts, rows, tokens = batch.rollouts, batch.rows, batch.tokens
        if "answer_mask" in algorithm.rollout_needs:
            decisive = torch.zeros(self.task.tree.horizon, dtype=torch.bool)
            decisive[list(self.task.decisive)] = True
            extras["answer_mask"] = rollouts.mask & decisive
        if "reference_rewards" in algorithm.rollout_needs:
            prompts = torch.tensor([meta["prompt"] for meta in rollouts.prompts or ()])
            reference = Sampler(self.task, self.task.logits, self.generator).draw(prompts)
            assert reference.rewards is not None
            extras["reference_rewards"] = reference.rewards
            rows, tokens = rows + len(reference), tokens + int(reference.lengths.sum())
        if branches is not None:
            extras["segment_values"], more = self._segment_values(rollouts, branches, shape)
            rows, tokens = rows + more.rows, tokens + more.tokens
        return Batch(rollouts.replace(extras=extras), rows, tokens) if extras else batch

    def _segment_values(self, rollouts: Rollouts, branches: Tensor, shape: Shape | None) -> tuple[Tensor, Batch]:
        """[B, T] mean reward of `branches` [B, T] responses that go on from before a token, NaN where there are none.

        Rows that share a prefix share them, as many as the row with the most asks for, as in the trainer.
        """
        row, position = branches.nonzero(as_tuple=True)
        state, where = torch.unique(places(self.task.tree, rollouts)[row, position], return_inverse=True)
        count = torch.zeros_like(state).scatter_reduce_(0, where, branches[row, position], "amax")
        one = torch.zeros_like(state).scatter_(0, where, torch.arange(len(row)))
        each = torch.arange(len(state)).repeat_interleave(count)
        prompts = torch.tensor([meta["prompt"] for meta in rollouts.prompts or ()])
        from_row, start = row[one][each], position[one][each]
        drawn = self.draw(prompts[from_row], shape, begun=(rollouts.tokens[from_row], start))
        assert drawn.rewards is not None
        total = torch.zeros(len(state), dtype=drawn.rewards.dtype).index_add_(0, each, drawn.rewards)
        values = torch.full(rollouts.mask.shape, float("nan"), dtype=total.dtype)
        values[row, position] = (total / count)[where]
        return values, Batch(drawn, len(drawn), int((drawn.lengths - start).sum()))
