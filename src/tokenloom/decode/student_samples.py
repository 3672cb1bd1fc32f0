"""What a student learns from: the teacher's samples, with the last hidden states at which it drew them, on disk.

Samples come in parts of a few dozen rows, each a safetensors file written whole; a part's prompts and seed follow from
its number alone, so that sampling goes on where it stopped. Every tenth part answers held-out prompts.

Letters: N sampled tokens of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenloom.batch import Sampling
from tokenloom.decode.hidden_states import states_at
from tokenloom.rollout import generate

if TYPE_CHECKING:
    from tokenloom.decode.student import Settings

ROWS = 32
_EVERY = 10
_STRIDE = 1_000_003  # of seeds, so that neighboring seeds share no part's

Report = Callable[[str, int, int, int, float | None], None]


@dataclass(frozen=True)
class Sampled:
    """A prompt, a response of N tokens to it, and the teacher's states [N, D], float32, that its tokens came from."""

    prompt: list[int]
    response: list[int]
    states: Tensor

    @property
    def begin(self) -> int:
        """Where the first token of the response is predicted."""
        return len(self.prompt) - 1


@dataclass
class Samples:
    """Rows to learn from, and rows whose prompts nobody learned from."""

    training: list[Sampled] = field(default_factory=list)
    heldout: list[Sampled] = field(default_factory=list)

    @property
    def training_tokens(self) -> int:
        """Tokens sampled to learn from."""
        return sum(len(row.response) for row in self.training)

    @property
    def tokens(self) -> int:
        """All that were sampled."""
        return self.training_tokens + sum(len(row.response) for row in self.heldout)


def collect(
    policy: Any, prompts: Sequence[Sequence[int]], folder: Path, settings: Settings, *, report: Report
) -> Samples:
    """At least `settings.tokens` sampled tokens, of which about a tenth answers the held-out tenth of the prompts.

    Raises:
        ValueError: for fewer than two different prompts.
    """
    learned, heldout = split([list(p) for p in prompts], settings.seed)
    samples, number, fresh = Samples(), 0, 0
    while samples.tokens < settings.tokens or not samples.training:
        path = folder / f"samples-{number:05d}.safetensors"
        held = number % _EVERY == 0
        if not path.is_file():
            turn = number // _EVERY if held else number - number // _EVERY - 1
            mine = _cycled(heldout if held else learned, turn * ROWS)

            def more(tokens: int, before: int = samples.tokens, new: int = fresh) -> None:
                report("sampling", min(before + tokens, settings.tokens), settings.tokens, new + tokens, None)

            rows = _sample(policy, mine, settings, number, more)
            _save(rows, path)
            fresh += sum(len(row.response) for row in rows)
        (samples.heldout if held else samples.training).extend(_load(path))
        number += 1
        report("sampling", min(samples.tokens, settings.tokens), settings.tokens, fresh, None)
    return samples


def split(prompts: Sequence[list[int]], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """The different prompts in a random order: those to learn from, and a tenth (one at least) that is held out.

    Raises:
        ValueError: for fewer than two.
    """
    distinct = [list(p) for p in dict.fromkeys(tuple(p) for p in prompts)]
    if len(distinct) < 2:
        raise ValueError(f"distill needs two different prompts at least, one to hold out; got {len(distinct)}")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [distinct[i] for i in order]
    cut = max(1, round(len(shuffled) / _EVERY))
    return shuffled[cut:], shuffled[:cut]


def _cycled(prompts: Sequence[list[int]], begin: int) -> list[list[int]]:
    return [prompts[(begin + i) % len(prompts)] for i in range(ROWS)]


def _sample(
    policy: Any, prompts: Sequence[list[int]], settings: Settings, number: int, report: Callable[[int], None]
) -> list[Sampled]:
    sampling = Sampling(1.0, max_tokens=settings.max_tokens, seed=settings.seed * _STRIDE + number)
    rollouts = generate(
        policy, [torch.tensor(p) for p in prompts], sampling, copies=1, progress=lambda _d, _r, tokens: report(tokens)
    )
    responses = [rollouts.response(i).tolist() for i in range(len(rollouts))]
    texts = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    places = [list(range(len(p) - 1, len(t) - 1)) for p, t in zip(prompts, texts, strict=True)]
    with policy.autocast():
        found = states_at(policy.model, texts, places, layers=[-1])
    return [Sampled(p, r, f[:, 0]) for p, r, f in zip(prompts, responses, found, strict=True)]


def _save(rows: Sequence[Sampled], path: Path) -> None:
    from safetensors.torch import save_file

    new = path.with_suffix(".new")
    tensors = {
        "prompts": torch.tensor([t for row in rows for t in row.prompt]),
        "prompt_lengths": torch.tensor([len(row.prompt) for row in rows]),
        "responses": torch.tensor([t for row in rows for t in row.response]),
        "lengths": torch.tensor([len(row.response) for row in rows]),
        "states": torch.cat([row.states for row in rows]).contiguous(),
    }
    save_file(tensors, new)
    new.replace(path)


def _load(path: Path) -> list[Sampled]:
    from safetensors.torch import load_file

    held = load_file(path)
    prompts = torch.split(held["prompts"], held["prompt_lengths"].tolist())
    responses, states = (torch.split(held[n], held["lengths"].tolist()) for n in ("responses", "states"))
    rows = zip(prompts, responses, states, strict=True)
    return [Sampled(p.tolist(), r.tolist(), s) for p, r, s in rows]
