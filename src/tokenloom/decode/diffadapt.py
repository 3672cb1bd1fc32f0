"""DiffAdapt on a model: the proxy run's numbers, the probe, and decoding by strategy.

probe = fit(model, prompts, accuracies, entropies)                 # three classes
model.generate(**inputs, do_sample=True,
               custom_generate=decode.loop("diffadapt", probe=probe, tokenizer=tokenizer))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper

from tokenloom.decode.hidden_states import evaluating, states
from tokenloom.decode.minimize import Progress
from tokenloom.decode.plain import Plain
from tokenloom.decode.probe import Probe
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.methods.decoding.diffadapt import difficulty_labels, route
from tokenloom.rollout.forward import base_model


@dataclass(frozen=True)
class Strategy:
    """What is added to the prompt, the temperature, and the share of the token limit."""

    suffix: str = ""
    temperature: float = 1.0
    share: float = 1.0


STRATEGIES = (
    Strategy("\nAnswer directly and briefly.\n", 0.5, 0.4),
    Strategy("", 0.8, 1.0),
    Strategy("\nFocus on the key steps.\n", 0.4, 0.5),
)
"""For easy, normal and hard questions; the paper's numbers as far as they are known."""


def fit(
    model: Any,
    prompts: Sequence[Sequence[int]],
    accuracy: Tensor,
    entropy: Tensor,
    *,
    hidden: Sequence[int] = (),
    low: float = 0.4,
    high: float = 0.8,
    quantile: float = 0.5,
    steps: int = 300,
    seed: int = 0,
    progress: Progress | None = None,
) -> Probe:
    """A probe of three classes on the prompts' last states, from the proxy run's `accuracy` and `entropy` [Q].

    Raises:
        ValueError: as `difficulty_labels` and `Probe.fit`.
    """
    labels = difficulty_labels(accuracy, entropy, low=low, high=high, quantile=quantile)
    return Probe.fit(
        states(model, prompts), labels, hidden=hidden, classes=3, steps=steps, seed=seed, progress=progress
    )


def mean_entropies(model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Tensor:
    """The mean entropy [N] (nats) of the model's law at each generated token, temperature 1.

    Raises:
        ValueError: for an empty completion.
    """
    found = []
    with torch.no_grad(), evaluating(base_model(model)):
        for prompt, completion in zip(prompts, completions, strict=True):
            if len(completion) == 0:
                raise ValueError("diffadapt needs completions of at least one token")
            ids = torch.tensor([[*prompt, *completion]], device=next(base_model(model).parameters()).device)
            logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            found.append(-torch.special.xlogy(logprobs.exp(), logprobs.exp()).sum(-1).mean().cpu())
    return torch.stack(found)


@decoder("diffadapt", kind="loop")
class DiffAdapt(Loop):
    """Decode each prompt by the strategy of the class that a probe puts it in: suffix, temperature, token limit.

    `probe` is a `Probe` or the path of its file. The suffix goes before the last `tail` tokens of the prompt, which
    are those that a chat template puts behind the question. `strategies`: three, for easy, normal and hard.
    """

    unmasked = "changes the prompts"

    def __init__(self, probe: Any, tokenizer: Any, strategies: Any = STRATEGIES, *, tail: int = 0) -> None:
        """Raises ValueError unless there are three strategies with temperature > 0 and 0 < share <= 1."""
        if len(strategies) != 3 or any(s.temperature <= 0 or not 0 < s.share <= 1 for s in strategies):
            raise ValueError("diffadapt needs three strategies with temperature > 0 and a share in (0, 1]")
        if tail < 0:
            raise ValueError(f"diffadapt needs tail >= 0, got {tail}")
        self.probe = probe if isinstance(probe, Probe) else Probe.load(probe)
        self._tokenizer, self._strategies, self._tail = tokenizer, list(strategies), tail

    def classes(self, model: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
        """The class of each prompt."""
        return [int(c) for c in route(self.probe(states(model, prompts)))]

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        found = self.classes(run.model, run.prompts)
        generated: list[list[int]] = [[] for _ in run.prompts]
        for number, strategy in enumerate(self._strategies):
            rows = [r for r, c in enumerate(found) if c == number]
            run.counts[("easy", "normal", "hard")[number]] = float(len(rows))
            if rows:
                for row, new in zip(rows, Plain().rows(self._part(run, rows, strategy)), strict=True):
                    generated[row] = new
        return generated

    def _part(self, run: Run, rows: list[int], strategy: Strategy) -> Run:
        suffix = self._tokenizer.encode(strategy.suffix, add_special_tokens=False) if strategy.suffix else []
        ids = run.input_ids[rows]
        cut = ids.shape[1] - self._tail
        added = torch.tensor([suffix] * len(rows), dtype=torch.int64, device=ids.device).view(len(rows), len(suffix))
        prompts = [_inserted(run.prompts[r], suffix, self._tail) for r in rows]
        return dataclasses.replace(
            run,
            input_ids=torch.cat((ids[:, :cut], added, ids[:, cut:]), 1),
            prompts=prompts,
            limit=max(1, int(strategy.share * run.limit)),
            # First, as generate has it: top-p and its like cut the law at this temperature.
            processors=[TemperatureLogitsWarper(float(strategy.temperature)), *run.processors],
            streamer=run.streamer if rows == [0] else None,
        )


def _inserted(prompt: Sequence[int], suffix: Sequence[int], tail: int) -> list[int]:
    cut = max(len(prompt) - tail, 0)
    return [*prompt[:cut], *suffix, *prompt[cut:]]
