"""What the laboratory's tests share: tiny tasks whose batches can all be enumerated, and parts that only tests need."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tokenloom.batch import Rollouts, Sampling
from tokenloom.catalog import Part
from tokenloom.composition import Bound
from tokenloom.lab.collect import Batch
from tokenloom.lab.critic import Critic
from tokenloom.lab.table import TablePolicy
from tokenloom.lab.task import Draft, Lag, Task, prompt_tokens
from tokenloom.lab.tree import Tree
from tokenloom.masked import masked_sum, valid_positions
from tokenloom.parameters import signature_inputs


def tiny_task(tree: Tree | None = None, *, prompts: int = 1, seed: int = 0, lag: Lag = "none") -> Task:
    """Random rewards on all complete responses."""
    draft = Draft(tree or Tree(2, 2), seed, prompts=prompts)
    generator = torch.Generator().manual_seed(seed + 1)

    def reward(prompt: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        return torch.rand(len(tokens), generator=generator, dtype=torch.float64)

    return draft.finish(reward, decisive=[0], truth=[[0]] * prompts, lag=lag)


def table_of(task: Task) -> TablePolicy:
    """The task's initial policy as a table, its critic at zero."""
    return TablePolicy(task.tree, task.logits, critic=Critic(torch.zeros(task.logits.shape[:2], dtype=torch.float64)))


def rollouts_of(task: Task, tokens: Tensor, lengths: Tensor, prompts: Tensor) -> Rollouts:
    """The given responses [B, H], scored, one group per prompt."""
    mask = valid_positions(lengths, task.tree.horizon)
    at = prompts[:, None] * task.tree.states + task.tree.states_of(tokens)
    flat = task.logits.flatten(0, 1)
    return Rollouts(
        prompt_tokens=tuple(prompt_tokens(p, task.tree) for p in prompts.tolist()),
        tokens=tokens,
        lengths=lengths,
        mask=mask,
        group_ids=prompts,
        rewards=masked_sum(task.rewards.flatten(0, 1)[at, tokens], mask, -1),
        truncated=torch.zeros(len(tokens), dtype=torch.bool),
        answers=tuple("0" for _ in prompts),
        prompts=tuple({"prompt": p, "answer": "0"} for p in prompts.tolist()),
        sampler_logprobs=flat.log_softmax(-1)[at, tokens],
        sampling=Sampling(max_tokens=task.tree.horizon),
    )


def every_batch(task: Task, rows: int) -> Iterator[tuple[float, Batch]]:
    """All batches of `rows` responses to the single prompt of a task, with their probabilities."""
    tokens, lengths = task.tree.enumerated
    whole = rollouts_of(task, tokens, lengths, torch.zeros(len(tokens), dtype=torch.int64))
    assert whole.sampler_logprobs is not None
    each = masked_sum(whole.sampler_logprobs, whole.mask, -1).exp().tolist()
    for chosen in itertools.product(range(len(each)), repeat=rows):
        probability = 1.0
        for i in chosen:
            probability *= each[i]
        batch = whole.rows(list(chosen))
        yield probability, Batch(batch, rows, int(batch.lengths.sum()))


def unregistered(stage: Any, function: Callable[..., Any]) -> Bound:
    """A part for one test, unknown to the catalog."""
    inputs, hyperparameters = signature_inputs(function.__name__, function)
    return Bound(Part(function.__name__, stage, "row", "a test", function, inputs, hyperparameters))
