"""Held-out accuracy: greedy, sampled, and pass@k, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenloom.batch import Sampling
from tokenloom.tasks import Item
from tokenloom.train.data import derive
from tokenloom.train.respond import Report, Responder, Responses


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in [0, 1] over `problems`; `sampled` is None without samples.

    `correct` holds, per problem, how many of `samples` responses were right; `greedy_answers` the greedy
    responses with what was parsed out of them, for showing.
    """

    problems: int
    samples: int
    greedy: float
    sampled: float | None
    correct: list[int] = field(default_factory=list)
    greedy_answers: list[dict[str, Any]] = field(default_factory=list)

    def record(self, step: int) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        out: dict[str, Any] = {"step": step, "kind": "eval", "greedy": self.greedy}
        if self.sampled is not None:
            out |= {"sampled": self.sampled, "samples": self.samples}
        return out | {"problems": self.problems}


def evaluate(
    responder: Responder,
    items: Sequence[Item],
    *,
    max_tokens: int,
    samples: int = 0,
    temperature: float = 1.0,
    stop: tuple[str, ...] = (),
    seed: int = 0,
    report: Report | None = None,
) -> Evaluation:
    """Answer every item once greedily and `samples` times at `temperature`, and score the answers.

    Raises:
        ValueError: without items.
    """
    if not items:
        raise ValueError("there are no problems to evaluate on")

    def run(temperature: float, copies: int, purpose: str) -> Responses:
        generator = torch.Generator().manual_seed(derive(seed, "evaluate", purpose))
        sampling = Sampling(temperature=temperature, max_tokens=max_tokens, stop=stop)
        return responder.respond(items, sampling, copies=copies, generator=generator, report=report)

    first = run(0.0, 1, "greedy")
    rollouts = first.rollouts
    rewards = rollouts.rewards if rollouts.rewards is not None else torch.zeros(len(items))
    answers = rollouts.answers or (None,) * len(items)
    shown = [
        {"prompt": i.text, "expected": i.answer, "response": t, "answer": a, "reward": float(r), "correct": c}
        for i, t, a, r, c in zip(items, first.texts, answers, rewards, first.correct, strict=True)
    ]
    greedy = sum(first.correct) / len(items)
    if not samples:
        return Evaluation(len(items), 0, greedy, None, [], shown)
    hits = run(temperature, samples, "sampled").correct
    counts = [sum(hits[i * samples : (i + 1) * samples]) for i in range(len(items))]
    return Evaluation(len(items), samples, greedy, sum(hits) / len(hits), counts, shown)


def pass_at_k(correct: Sequence[int], samples: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k responses is right (arXiv:2107.03374, eq. 1).

    `correct` [problems] counts right responses among `samples`.

    Raises:
        ValueError: unless 1 <= k <= samples.

    >>> round(pass_at_k([1], 2, 1), 3)
    0.5
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@k needs 1 <= k <= samples, got k={k} with {samples} samples")
    return sum(1 - math.comb(samples - c, k) / math.comb(samples, k) for c in correct) / len(correct)


def wilson(fraction: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a proportion (95 % by default)."""
    middle = (fraction + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(fraction * (1 - fraction) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a mean over problems (samples of one problem are not independent)."""
    data = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(data), (draws, len(data)), generator=torch.Generator().manual_seed(seed))
    means = data[picks].mean(-1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
