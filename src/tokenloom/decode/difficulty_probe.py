"""The value of a question before anything is generated, learned from rollouts, and samples by difficulty.

probe = fit_value(model, prompts, completions, rewards)            # temporal differences over all states
hard = difficulty(probe, model, prompts)                           # [N] in [0, 1]
model.generate(**inputs, do_sample=True,
               custom_generate=decode.loop("difficulty-probe", probe=probe, tokenizer=tokenizer, n_max=16))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.candidates import SelfConsistency
from tokenloom.decode.hidden_states import states, states_at
from tokenloom.decode.minimize import Progress, minimize
from tokenloom.decode.probe import Probe
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Run
from tokenloom.methods.decoding.difficulty_probe import samples_for, td_loss


def fit_value(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    rewards: Sequence[float] | Tensor,
    *,
    hidden: Sequence[int] = (256, 64),
    monte_carlo: bool = False,
    epochs: int = 20,
    batch: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Probe:
    """A probe V(s) on the last layer's state of the last token, from rollouts (ids) and final `rewards` [N] in [0, 1].

    Raises:
        ValueError: for rewards outside [0, 1], or rollouts of different numbers.
    """
    texts = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    places = [list(range(len(p) - 1, len(t))) for p, t in zip(prompts, texts, strict=True)]
    found = [f[:, 0] for f in states_at(model, texts, places, layers=[-1])]
    return fit_states(
        found,
        rewards,
        hidden=hidden,
        monte_carlo=monte_carlo,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
        progress=progress,
    )


def fit_states(
    trajectories: Sequence[Tensor],
    rewards: Sequence[float] | Tensor,
    *,
    hidden: Sequence[int] = (256, 64),
    monte_carlo: bool = False,
    epochs: int = 20,
    batch: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Probe:
    """The same from states [S_i, D] of each rollout, the question's first.

    Raises:
        ValueError: as `fit_value`.
    """
    targets = torch.as_tensor(rewards, dtype=torch.float32)
    if targets.shape != (len(trajectories),) or bool(((targets < 0) | (targets > 1)).any()):
        raise ValueError(f"difficulty-probe needs one reward in [0, 1] for each of {len(trajectories)} rollouts")
    everything = torch.cat(list(trajectories))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = Probe(everything.shape[1], hidden=hidden)
    probe.standardize(everything)
    probe.net.to(everything)

    def loss(rows: list[int]) -> Tensor:
        some = [trajectories[i] for i in rows]
        given = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        lengths = torch.tensor([len(s) for s in some])
        mask = torch.arange(given.shape[1]) < lengths[:, None]
        return td_loss(probe(given), targets[rows], mask, monte_carlo=monte_carlo)

    minimize(
        probe.parameters(),
        len(trajectories),
        loss,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
        progress=progress,
    )
    return probe


def difficulty(probe: Probe, model: Any, prompts: Sequence[Sequence[int]], *, batch: int = 16) -> Tensor:
    """1 - V(s_0) [N] of prompts (ids): one forward each, nothing is generated."""
    with torch.no_grad():
        return 1 - probe(states(model, prompts, batch=batch))


@decoder("difficulty-probe", kind="loop")
class DifficultyProbe(SelfConsistency):
    """Self-consistency with `n_min` to `n_max` samples, more for questions that a value probe finds harder.

    `probe` is a `Probe` or the path of its file; `pattern` as for self-consistency.
    """

    def __init__(self, probe: Any, tokenizer: Any, *, n_min: int = 1, n_max: int = 16, pattern: str = "") -> None:
        """Raises ValueError unless 1 <= n_min <= n_max."""
        super().__init__(tokenizer, n=n_max, pattern=pattern)
        self.probe = probe if isinstance(probe, Probe) else Probe.load(probe)
        self.n_min = n_min
        samples_for(torch.zeros(1), n_min=n_min, n_max=n_max)

    def copies(self, run: Run) -> list[int]:
        """See `SelfConsistency`."""
        hard = difficulty(self.probe, run.model, run.prompts)
        return [int(n) for n in samples_for(hard, n_min=self.n_min, n_max=self.n)]
