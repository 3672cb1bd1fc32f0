"""Laws of what a part gives, whatever its stage: form, the mask, padding, order, scope, and no surprises."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import Part
from tokenloom.laws import law
from tokenloom.testing.batches import evaluate, random_batch, vocabulary_values
from tokenloom.testing.variations import HOSTILE, differentiable, is_float, pad, poison, same, take, with_gradients

_TOKEN_STAGES = ("advantage", "credit", "weight", "aggregate", "log_ratio", "surrogate", "term")
_LOSS_STAGES = ("log_ratio", "surrogate", "term")


def _gives_tokens(part: Part) -> bool:
    return part.stage in _TOKEN_STAGES


def _gives_tensor(part: Part) -> bool:
    return part.stage in (*_TOKEN_STAGES, "reward", "select", "blend")


@law(_gives_tensor)
def _shape_and_dtype(part: Part) -> None:
    for dtype in (torch.float64, torch.float32):
        rollouts, signals = random_batch(dtype=dtype)
        out = evaluate(part, vocabulary_values(rollouts, signals))
        allowed = (
            {tuple(rollouts.mask.shape)} if _gives_tokens(part) else {tuple(rollouts.mask.shape), (len(rollouts),)}
        )
        assert tuple(out.shape) in allowed, f"{part.name}: shape {tuple(out.shape)}, expected one of {allowed}"
        if part.stage == "select":
            assert out.dtype == torch.bool, f"{part.name}: keep must be bool, got {out.dtype}"
        elif any(is_float(vocabulary_values(rollouts, signals)[n]) for n, need in part.inputs.items() if need):
            assert out.dtype == dtype, f"{part.name}: dtype {out.dtype} for {dtype} inputs"


@law(_gives_tensor)
def _finite_and_zero_off_the_mask(part: Part) -> None:
    rollouts, signals = random_batch(1)
    out = evaluate(part, vocabulary_values(rollouts, signals))
    if out.dtype == torch.bool:
        return
    assert bool(out.isfinite().all()), f"{part.name}: result is not finite"
    if out.ndim == 2:
        assert bool((out[~rollouts.mask] == 0).all()), f"{part.name}: result is not zero off the mask"


@law(_gives_tensor)
def _hostile_padding_never_leaks(part: Part) -> None:
    rollouts, signals = random_batch(2)
    clean = with_gradients(vocabulary_values(rollouts, signals))
    for fill in HOSTILE:
        poisoned = with_gradients(poison(vocabulary_values(rollouts, signals), rollouts.mask, fill))
        out, again = evaluate(part, clean), evaluate(part, poisoned)
        same(out, again, f"{part.name}: {fill} off the mask changed the result")
        if part.stage in _LOSS_STAGES and out.requires_grad:
            torch.autograd.backward(again.sum())
            for name in differentiable():
                grad = poisoned[name].grad if name in part.inputs else None
                if grad is not None:
                    off = grad[~rollouts.mask]
                    assert bool((off == 0).all()), f"{part.name}: gradient of {name} off the mask under {fill}"


@law(_gives_tensor)
def _padding_changes_nothing(part: Part) -> None:
    rollouts, signals = random_batch(3)
    width = rollouts.mask.shape[1]
    values = vocabulary_values(rollouts, signals)
    wide = {k: pad(v, width, 3) for k, v in values.items()}
    out, again = evaluate(part, values), evaluate(part, wide)
    if out.ndim == 2:
        assert bool((again[:, width:] == 0).all()), f"{part.name}: padding received a value"
        again = again[:, :width]
    same(out, again, f"{part.name}: wider padding changed the result")


@law(lambda p: _gives_tensor(p) and not {"draws", "order-dependent"} & p.properties)
def _row_order_changes_nothing(part: Part) -> None:
    rollouts, signals = random_batch(4)
    order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(1))
    values = vocabulary_values(rollouts, signals)
    shuffled = {k: take(v, order, len(rollouts)) for k, v in values.items()}
    same(evaluate(part, values)[order], evaluate(part, shuffled), f"{part.name}: row order changed the result")


@law(lambda p: _gives_tensor(p) and "group_ids" in p.inputs)
def _group_labels_change_nothing(part: Part) -> None:
    rollouts, signals = random_batch(5)
    values = vocabulary_values(rollouts, signals)
    out = evaluate(part, values)
    labels = {int(g): 100 - 3 * i for i, g in enumerate(torch.unique(rollouts.group_ids))}
    values["group_ids"] = torch.tensor([labels[int(g)] for g in rollouts.group_ids])
    same(out, evaluate(part, values), f"{part.name}: relabeling the groups changed the result")


@law(lambda p: _gives_tensor(p) and p.scope != "batch")
def _batch_equals_loop(part: Part) -> None:
    rollouts, signals = random_batch(6)
    values = vocabulary_values(rollouts, signals)
    out = evaluate(part, values)
    blocks = [torch.tensor([i]) for i in range(len(rollouts))]
    if part.scope == "group":
        blocks = [(rollouts.group_ids == g).nonzero().reshape(-1) for g in torch.unique(rollouts.group_ids)]
    for rows in blocks:
        alone = evaluate(part, {k: take(v, rows, len(rollouts)) for k, v in values.items()})
        same(out[rows], alone, f"{part.name}: declared scope {part.scope!r}, but other rows changed the result")


@law(lambda p: _gives_tokens(p) and p.scope == "token")
def _tokens_do_not_see_each_other(part: Part) -> None:
    rollouts, signals = random_batch(7)
    values = vocabulary_values(rollouts, signals)
    out = evaluate(part, values)
    shape = rollouts.mask.shape
    for t in range(shape[1]):
        column = {
            k: v[:, t : t + 1] if isinstance(v, Tensor) and v.shape[:2] == shape else v for k, v in values.items()
        }
        same(out[:, t : t + 1], evaluate(part, column), f"{part.name}: scope 'token', but other tokens matter")


@law(_gives_tensor)
def _inputs_stay_untouched(part: Part) -> None:
    rollouts, signals = random_batch(8)
    values = vocabulary_values(rollouts, signals)
    before = {k: v.clone() for k, v in values.items() if isinstance(v, Tensor)}
    evaluate(part, values)
    for name, value in before.items():
        assert torch.equal(value, values[name]), f"{part.name}: changed its input {name!r} in place"


@law(_gives_tensor)
def _same_inputs_same_result(part: Part) -> None:
    rollouts, signals = random_batch(9)
    first, second = (evaluate(part, vocabulary_values(rollouts, signals)) for _ in range(2))
    assert torch.equal(first, second), f"{part.name}: two calls with equal inputs differ"


@law(_gives_tensor)
def _nothing_sampled_gives_nothing(part: Part) -> None:
    rollouts, signals = random_batch(10)
    empty = rollouts.replace(mask=torch.zeros_like(rollouts.mask), lengths=torch.zeros_like(rollouts.lengths))
    out = evaluate(part, vocabulary_values(empty, signals))
    if out.dtype != torch.bool:
        assert bool(out.isfinite().all()), f"{part.name}: an all-masked batch gives non-finite values"
        if out.ndim == 2:
            assert bool((out == 0).all()), f"{part.name}: an all-masked batch gives non-zero values"
