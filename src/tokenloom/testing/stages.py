"""Laws of one stage or a few: what its results mean, over and above the laws of all results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenloom.catalog import Part
from tokenloom.laws import law
from tokenloom.testing.batches import evaluate, random_batch, vocabulary_values
from tokenloom.testing.variations import HOSTILE, pad, poison, same, take, with_gradients


@law(lambda p: p.stage in ("weight", "aggregate"))
def _never_negative(part: Part) -> None:
    rollouts, signals = random_batch(11)
    assert bool((evaluate(part, vocabulary_values(rollouts, signals)) >= 0).all()), f"{part.name}: negative result"


@law(lambda p: p.stage == "blend")
def _shares_lie_between_zero_and_one(part: Part) -> None:
    rollouts, signals = random_batch(21)
    out = evaluate(part, vocabulary_values(rollouts, signals))
    assert bool(((out >= 0) & (out <= 1)).all()), f"{part.name}: a share outside [0, 1]"


@law(lambda p: p.stage in ("advantage", "credit", "weight", "aggregate", "blend"))
def _carries_no_gradient(part: Part) -> None:
    rollouts, signals = random_batch(12)
    out = evaluate(part, with_gradients(vocabulary_values(rollouts, signals)))
    assert not out.requires_grad, f"{part.name}: stage {part.stage!r} must be detached from the policy"


@law(lambda p: p.stage == "advantage")
def _unscorable_rows_get_nothing(part: Part) -> None:
    rollouts, signals = random_batch(13)
    assert rollouts.rewards is not None
    rewards = rollouts.rewards.clone()
    rewards[2] = float("nan")
    out = evaluate(part, vocabulary_values(rollouts.replace(rewards=rewards), signals))
    assert bool(out.isfinite().all()), f"{part.name}: a NaN reward leaks"
    assert bool((out[2] == 0).all()), f"{part.name}: a row without a reward gets credit"


@law(lambda p: p.stage == "advantage" and p.scope == "group")
def _constant_groups_get_exactly_zero(part: Part) -> None:
    rollouts, signals = random_batch(14, dtype=torch.float32)
    # The mean of three float32 copies of 0.9 is not 0.9, so a rule that trusts rounding shows here.
    constant = rollouts.replace(rewards=torch.full((len(rollouts),), 0.9))
    out = evaluate(part, vocabulary_values(constant, signals))
    assert bool((out == 0).all()), f"{part.name}: equal rewards give {out.abs().max():.3g} instead of exactly 0"


@law(lambda p: p.stage == "updates")
def _every_epoch_visits_every_kept_row_once(part: Part) -> None:
    rollouts, signals = random_batch(18)
    values = vocabulary_values(rollouts, signals)
    values["keep"] = torch.arange(len(rollouts)) != 3
    visits = torch.cat(evaluate(part, values)).bincount(minlength=len(rollouts))
    epochs = int(visits.max())
    assert epochs > 0, f"{part.name}: no row is visited"
    assert torch.equal(visits, epochs * values["keep"].long()), (
        f"{part.name}: visits by row {visits.tolist()}, kept {values['keep'].tolist()}"
    )


@law(lambda p: p.stage == "bounds")
def _limits_enclose_one(part: Part) -> None:
    rollouts, signals = random_batch(19)
    lo, hi, cap = (torch.as_tensor(x) for x in evaluate(part, vocabulary_values(rollouts, signals)))
    assert bool((lo <= 1).all() and (hi >= 1).all() and (cap >= hi).all()), f"{part.name}: lo <= 1 <= hi <= cap fails"


@law(lambda p: p.stage == "branch")
def _branches_are_counts_of_sampled_tokens(part: Part) -> None:
    rollouts, signals = random_batch(23)
    values = vocabulary_values(rollouts, signals)
    out = evaluate(part, values)
    assert out.shape == rollouts.mask.shape, f"{part.name}: shape {tuple(out.shape)}"
    assert out.dtype == torch.int64, f"{part.name}: counts are int64, got {out.dtype}"
    assert bool((out >= 0).all() and (out[~rollouts.mask] == 0).all()), f"{part.name}: a count off the mask or below 0"
    assert bool((out > 0).any()), f"{part.name}: nothing branches"
    poisoned = evaluate(part, poison(values, rollouts.mask, float("nan")))
    assert torch.equal(out, poisoned), f"{part.name}: NaN off the mask changed the counts"


@law(lambda p: p.stage == "metric")
def _numbers_by_name_that_padding_and_order_leave_alone(part: Part) -> None:
    rollouts, signals = random_batch(22)
    values = vocabulary_values(rollouts, signals)
    found = _numbers(part, values)
    assert found, f"{part.name}: no numbers"
    order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(2))
    width = rollouts.mask.shape[1]
    changed = {
        "row order": {k: take(v, order, len(rollouts)) for k, v in values.items()},
        "padding": {k: pad(v, width, 3) for k, v in values.items()},
    } | {str(fill): poison(values, rollouts.mask, fill) for fill in HOSTILE}
    for what, other in changed.items():
        for name, number in _numbers(part, other).items():
            same(number, found[name], f"{part.name}: {what} changed {name!r}")
    empty = rollouts.replace(mask=torch.zeros_like(rollouts.mask), lengths=torch.zeros_like(rollouts.lengths))
    _numbers(part, vocabulary_values(empty, signals))


def _numbers(part: Part, values: dict[str, Any]) -> dict[str, Tensor]:
    return {k: torch.as_tensor(float(v), dtype=torch.float64) for k, v in evaluate(part, values).items()}


@law(lambda p: p.stage == "sampling")
def _logits_keep_their_shape_and_rows(part: Part) -> None:
    rollouts, signals = random_batch(20)
    values = vocabulary_values(rollouts, signals)
    out = evaluate(part, values)
    assert out.shape == values["logits"].shape, f"{part.name}: shape {tuple(out.shape)}"
    alone = torch.cat([evaluate(part, values | {"logits": row[None]}) for row in values["logits"]])
    same(out, alone, f"{part.name}: other rows change a row's logits")
