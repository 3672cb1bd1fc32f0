"""Training on pairs by the FTPO loss, and what a model is worth on them before and after."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.ftpo.pairs import Pair
from tokenloom.decode.hidden_states import evaluating, padded
from tokenloom.decode.minimize import Progress, minimize
from tokenloom.methods.decoding.antislop import ftpo_loss
from tokenloom.policy.own_logits import own_logits, run_trunk, trunk_of
from tokenloom.rollout.forward import base_model

# Steps whose wins are averaged before training may end: single batches are noisy.
_RECENT = 8


@dataclass(frozen=True)
class FtpoQuality:
    """Means over pairs. `moved` is the root mean square change of the logits of all other tokens."""

    rejected: float
    """Probability of the rejected token."""
    wins: float
    """Share of the chosen tokens that are likelier than the rejected one."""
    moved: float


@dataclass(frozen=True)
class Trained:
    """The loss of every step, and what the model was worth before and after."""

    losses: list[float]
    before: FtpoQuality
    after: FtpoQuality


def fit_ftpo(
    model: Any, pairs: Sequence[Pair], held_out: Sequence[Pair] = (), *,
    learning_rate: float = 3e-5, epochs: int = 1, batch: int = 16, wins: float = 0.85, seed: int = 0,
    progress: Progress | None = None, **objective: Any,
) -> Trained:  # fmt: skip
    """Train a causal LM, or only its adapters where PEFT wraps it, in place on pairs by `ftpo_loss` (`objective`).

    Training ends early once the share of chosen tokens that beat the rejected one, averaged over the last steps,
    reaches `wins`; above 1 it never does. What the model is worth is measured on `held_out`, or else on `pairs`.

    Raises:
        ValueError: without pairs, for ids beyond the vocabulary, or when nothing can be trained.
    """
    base = base_model(model)
    trained = _trained(model, base)
    _check(base, [*pairs, *held_out])
    losses: list[float] = []
    recent: deque[float] = deque(maxlen=_RECENT)
    measured = held_out or pairs
    with evaluating(base):
        reference = _states(base, pairs, batch)
        reference_measured = _states(base, measured, batch) if held_out else reference
        before = _quality(base, measured, reference_measured, batch)

        def loss(rows: list[int]) -> Tensor:
            some = [pairs[i] for i in rows]
            rejected, chosen, mask = _targets(some, reference.device)
            logits = _logits(base, _last(base, some))
            with torch.no_grad():
                ref_logits = _logits(base, reference[rows])
                recent.append(_wins(logits, rejected, chosen, mask))
            return ftpo_loss(logits, ref_logits, rejected, chosen, mask, **objective)

        def noted(done: int, steps: int, value: float) -> None:
            losses.append(value)
            if progress is not None:
                progress(done, steps, value)

        minimize(
            trained, len(pairs), loss, epochs=epochs, batch=batch, learning_rate=learning_rate, seed=seed,
            progress=noted, enough=lambda: len(recent) == _RECENT and sum(recent) / _RECENT >= wins,
        )  # fmt: skip
        after = _quality(base, measured, reference_measured, batch)
    return Trained(losses, before, after)


def _trained(model: Any, base: Any) -> list[torch.nn.Parameter]:
    """What may change: not the ends that the reference's logits come from."""
    ends = [m for m in (base.get_input_embeddings(), base.get_output_embeddings()) if m is not None]
    kept = {id(p) for m in ends for p in m.parameters()}
    found = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    if not found:
        raise ValueError("ftpo: no parameter of the model can be trained; all are frozen (requires_grad is False)")
    return found


def _check(base: Any, pairs: Sequence[Pair]) -> None:
    if not pairs:
        raise ValueError("ftpo: there are no pairs; the sampler never went back, so ban more or sample more")
    size = base.get_input_embeddings().num_embeddings
    if (largest := max(max(*p.context, p.rejected, *p.chosen) for p in pairs)) >= size:
        raise ValueError(f"ftpo: a pair has id {largest} and the model {size} tokens; pairs belong to one tokenizer")


def _last(base: Any, pairs: Sequence[Pair]) -> Tensor:
    """The last hidden states [B, D] behind the contexts."""
    device = next(base.parameters()).device
    # Padded behind, where causal attention does not look.
    ids, mask = padded([p.context for p in pairs], device)
    return run_trunk(trunk_of(base), ids)[torch.arange(len(ids), device=device), mask.sum(-1) - 1]


def _states(base: Any, pairs: Sequence[Pair], batch: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([_last(base, pairs[i : i + batch]) for i in range(0, len(pairs), batch)])


def _logits(base: Any, states: Tensor) -> Tensor:
    logits = own_logits(base, states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _targets(pairs: Sequence[Pair], device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Rejected [B] ids, chosen [B, C] ids and their mask."""
    chosen, mask = padded([p.chosen for p in pairs], device)
    return torch.tensor([p.rejected for p in pairs], device=device), chosen, mask


def _wins(logits: Tensor, rejected: Tensor, chosen: Tensor, mask: Tensor) -> float:
    won = (logits.gather(-1, chosen) > logits.gather(-1, rejected[:, None])) & mask
    return float((won.sum(-1) / mask.sum(-1)).mean())


def _quality(base: Any, pairs: Sequence[Pair], reference: Tensor, batch: int) -> FtpoQuality:
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for begin in range(0, len(pairs), batch):
            some = pairs[begin : begin + batch]
            rejected, chosen, mask = _targets(some, reference.device)
            logits = _logits(base, _last(base, some))
            moved = (logits - _logits(base, reference[begin : begin + batch])).square()
            own = torch.where(mask, chosen, rejected[:, None])
            others = torch.ones_like(moved).scatter(-1, own, 0.0).scatter(-1, rejected[:, None], 0.0)
            probability = logits.softmax(-1).gather(-1, rejected[:, None])
            found = (
                float(probability.sum()),
                _wins(logits, rejected, chosen, mask) * len(some),
                float(((moved * others).sum(-1) / others.sum(-1).clamp(min=1)).sum()),
            )
            sums += torch.tensor(found, dtype=torch.float64)
    rejected_mean, wins, square = (sums / len(pairs)).tolist()
    return FtpoQuality(rejected_mean, wins, square**0.5)
