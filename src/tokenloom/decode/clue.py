"""CLUE on a model: hidden-state changes over a trace's thinking, centroids of past traces, verdicts and votes.

clue = Clue.fit(*labeled_traces)               # deltas [n, L, D] and which were correct [n]
deltas, whole = think_deltas(model, prompts, completions, start=think_id, end=end_of_think_id)
best = clue.choose(answers, deltas)            # index of the winner
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.hidden_states import states_at
from tokenloom.decode.probe import load_tensors, save_tensors
from tokenloom.methods.decoding.clue import centroids, closeness, clue
from tokenloom.methods.decoding.self_consistency import Answers, majority_of_top_m


class Clue:
    """The centroids of correct and incorrect traces of one model, each [L, D]."""

    def __init__(self, positive: Tensor, negative: Tensor) -> None:
        self.positive, self.negative = positive, negative

    @classmethod
    def fit(cls, deltas: Tensor, correct: Tensor) -> Clue:
        """From `deltas` [n, L, D] of past traces and which were `correct` [n].

        Raises:
            ValueError: when all or none were.
        """
        return cls(*centroids(deltas, correct))

    def scores(self, deltas: Tensor) -> Tensor:
        """[N] of `deltas` [N, L, D]: above 0 is judged correct."""
        return clue(deltas, self.positive, self.negative)

    def choose(self, answers: Answers, deltas: Tensor, *, m: int = 16) -> int:
        """Index of the candidate whose answer is the majority among the `m` nearest to the correct centroid."""
        return majority_of_top_m(answers, closeness(deltas, self.positive), m=m)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        save_tensors({"positive": self.positive, "negative": self.negative}, path)

    @classmethod
    def load(cls, path: str | Path) -> Clue:
        """Read a file of `save`.

        Raises:
            ValueError: when it holds no centroids.
        """
        tensors = load_tensors(path)
        if set(tensors) != {"positive", "negative"}:
            raise ValueError(f"{str(path)!r} holds {sorted(tensors)}, not the centroids of CLUE")
        return cls(tensors["positive"], tensors["negative"])


def think_deltas(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    start: int | None = None,
    end: int | None = None,
    batch: int = 8,
) -> tuple[Tensor, Tensor]:
    """Deltas [N, L, D] from the `start` token of thinking to its `end` token, and whether both were there [N].

    Without such tokens (None) thinking is the whole completion. A trace that lacks a token that was asked for begins
    with the completion, or ends with its last token: drop those, or let them count.

    Raises:
        ValueError: for an empty completion.
    """
    places, whole = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        begins, ends = thinking_span(prompt, completion, start, end)
        places.append([len(prompt) if begins is None else begins, _last(prompt, completion) if ends is None else ends])
        whole.append((start is None or begins is not None) and (end is None or ends is not None))
    texts = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    found = torch.stack(states_at(model, texts, places, batch=batch))
    return found[:, 1] - found[:, 0], torch.tensor(whole)


def thinking_span(
    prompt: Sequence[int], completion: Sequence[int], start: int | None, end: int | None
) -> tuple[int | None, int | None]:
    """Where in prompt and completion together thinking starts and ends, None where its token is missing.

    The start is the first in the completion, or the last in the prompt (templates may open it) unless an end follows it
    there; the end is the first behind it in the completion.

    Raises:
        ValueError: for an empty completion.
    """
    if len(completion) == 0:
        raise ValueError("clue needs completions of at least one token")
    begins = ends = None
    if start is not None and start in completion:
        begins = len(prompt) + list(completion).index(start)
    elif start is not None and start in prompt:
        begins = len(prompt) - 1 - list(reversed(prompt)).index(start)
        # What an earlier turn of the prompt thought is not what is judged.
        begins = None if end in prompt[begins:] else begins
    first = 0 if begins is None else max(begins - len(prompt), 0)
    if end is not None and end in completion[first:]:
        ends = len(prompt) + list(completion).index(end, first)
    return begins, ends


def _last(prompt: Sequence[int], completion: Sequence[int]) -> int:
    return len(prompt) + len(completion) - 1
