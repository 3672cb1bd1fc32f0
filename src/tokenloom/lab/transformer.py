"""A tiny random Llama as a policy over a tree, for methods that read hidden states or attention.

The engine's own `Policy` gives its signals, so that a method sees here what it sees in training. Its table of logits
is enumerated level by level with the key/value cache: [P, S, V], differentiable when asked. The gradient of J with
respect to the weights is the table's exact gradient pulled back through that enumeration.

The model first learns to imitate the task's initial policy, on responses drawn from it, so that the families mean the
same as for tables; it begins near it, not at it. Needs the `train` extra.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.lab.critic import Critic
from tokenloom.lab.optimizer import ScaleFree
from tokenloom.lab.task import Task, prompt_tokens
from tokenloom.lab.tree import Tree
from tokenloom.policy import ModelConfig, Policy
from tokenloom.signals import Signals

LARGEST = 4096
"""Complete responses of a tree that a transformer may enumerate at every step."""

STEP_LENGTH = 0.15
"""How far a batch moves all weights: far enough to learn within the budget, not so far that prompts are lost."""

_IMITATION_STEPS, _IMITATION_ROWS, _IMITATION_RATE = 60, 64, 1e-2


class TransformerPolicy:
    """`policy` over `tree` with P prompts; the reference of KL terms is the model as it was given, and stays it."""

    def __init__(self, tree: Tree, prompts: int, policy: Policy, *, critic: Critic) -> None:
        if tree.responses > LARGEST:
            raise ValueError(
                f"{tree.responses} responses are too many for a transformer (at most {LARGEST}): "
                "this family runs on tables only"
            )
        self.tree, self.prompts, self.policy, self.critic = tree, prompts, policy, critic
        policy.reference.head()

    @classmethod
    def imitating(cls, task: Task, *, critic: Critic, seed: int) -> Self:
        """A model that has learned the task's initial policy; the same seed gives the same model."""
        model = copy.deepcopy(_imitated(_Known(task), seed))
        return cls(task.tree, task.prompts, Policy(model, config=ModelConfig(self_test=False)), critic=critic)

    @property
    def parameters(self) -> list[Tensor]:
        """All weights of the model."""
        return [p for _, p in self.policy.trainable_parameters()]

    def table(self) -> Tensor:
        """The logits of every state, [P, S, V] float64, without gradient."""
        with torch.no_grad():
            return _enumerate(self.policy.causal, self.tree, self.prompts).double()

    def pull_back(self, gradient: Tensor) -> Tensor:
        """[D]: `gradient` [P, S, V] with respect to the table, as one with respect to all weights."""
        table = _enumerate(self.policy.causal, self.tree, self.prompts)
        found = torch.autograd.grad(table, self.parameters, gradient.to(table.dtype), materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in found]).double()

    def signals(
        self, rollouts: Rollouts, needs: Sequence[str], *, grad: bool = False, given: dict[str, Tensor] | None = None
    ) -> Signals:
        """The engine's signals as float64, values from the critic.

        Raises:
            ValueError: for a signal that is not registered.
        """
        valued = [n for n in needs if n in ("values", "old_values")]
        found = self.policy.signals(rollouts, [n for n in needs if n not in valued], grad=grad, given=given)
        wide = {n: v.double() if v.is_floating_point() else v for n, v in found.named().items()}
        if valued:
            values = self.critic.at(self.tree, rollouts)
            wide |= {n: values.detach() if n == "old_values" or not grad else values for n in valued}
        return Signals().replace(**wide)

    def moved(self, spread: float, generator: torch.Generator) -> Self:
        """A copy with noise on all weights, scaled so that its logits differ by about `spread`."""
        other = self.copy()
        before = self.table()
        noise = [torch.randn(p.shape, generator=generator) * p.detach().std(correction=0) for p in other.parameters]
        # Logits are nearly linear in so small a change: each round corrects the one before.
        size, done = 0.02, 0.0
        with torch.no_grad():
            for _ in range(5):
                for parameter, direction in zip(other.parameters, noise, strict=True):
                    parameter.add_(direction, alpha=size - done)
                done, change = size, (other.table() - before).std()
                size = size * spread / float(change)
        return other

    def copy(self) -> Self:
        """The policy as it is now; critic and reference are shared."""
        policy = Policy(copy.deepcopy(self.policy.causal), config=self.policy.config)
        policy.reference = self.policy.reference
        return type(self)(self.tree, self.prompts, policy, critic=self.critic)

    def optimizer(self) -> ScaleFree:
        """A new optimizer of the weights."""
        return ScaleFree(self.parameters, STEP_LENGTH)


def _enumerate(model: Any, tree: Tree, prompts: int) -> Tensor:
    """[P, S, V]: one forward for each level of the tree, children continuing their parent's cache."""
    from transformers import DynamicCache

    tokens = torch.stack([prompt_tokens(p, tree) for p in range(prompts)])
    cache, levels = DynamicCache(), []
    onward = torch.arange(tree.branching)
    # The newer name warns under the older one.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for depth in range(tree.horizon):
        if depth:
            rows = prompts * tree.branching**depth
            tokens = onward.repeat(rows // tree.branching)[:, None]
            cache.batch_repeat_interleave(tree.branching)
        logits = model(tokens, use_cache=True, **{name: cache}).logits[:, -1]
        levels.append(logits.unflatten(0, (prompts, -1)))
    return torch.cat(levels, 1)


class _Known:
    """A task as a key of a cache: equal when it begins with the same policy."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __eq__(self, other: object) -> bool:
        mine = self.task
        return (
            isinstance(other, _Known) and mine.tree == other.task.tree and torch.equal(mine.logits, other.task.logits)
        )

    def __hash__(self) -> int:
        return hash((self.task.tree, float(self.task.logits.sum())))


@lru_cache(maxsize=2)
def _imitated(known: _Known, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tokenloom.lab.collect import Sampler

    task = known.task
    tree = task.tree
    config = LlamaConfig(
        vocab_size=tree.vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(task, task.logits, generator)
    laws = task.logits.softmax(-1).flatten(0, 1)
    each = _IMITATION_ROWS // task.prompts
    prompts = torch.arange(task.prompts).repeat_interleave(each)
    adam = torch.optim.Adam(model.parameters(), lr=_IMITATION_RATE)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.1, _IMITATION_STEPS)
    for _ in range(_IMITATION_STEPS):
        drawn = sampler.draw(prompts)
        inputs = torch.cat([torch.stack(drawn.prompt_tokens), drawn.tokens[:, :-1]], 1)
        logits = model(inputs).logits[:, -tree.horizon :]
        target = laws[prompts[:, None] * tree.states + tree.states_of(drawn.tokens)].float()
        loss = -(target * logits.log_softmax(-1)).sum(-1)[drawn.mask].mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay.step()
    return model
