"""The laws that every part obeys, ready to run on your own: `tokenloom.testing.check(my_part)`.

A law is waived only by a property that the part declares (`properties={...}` of `@part`) or by its
stage and scope, never by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tokenloom import decoding_laws as decoding_laws  # registers its laws
from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts, Sampling
from tokenloom.catalog import TRAINING_STAGES, Part, get_part, parts
from tokenloom.composition import Blend, Bound, Term
from tokenloom.context import Context
from tokenloom.laws import Law, law, laws_for
from tokenloom.masked import valid_positions
from tokenloom.planning import plan_context
from tokenloom.signals import CHUNK_SIGNALS, Signals, signal_example, signal_names

HOSTILE = (float("nan"), float("inf"), float("-inf"))
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
"""float64 as the architecture says; float32: sums of about 100 terms of size up to 10 at 6e-8 each."""


_GRADIENTS = ("logprobs", "entropies", "values", "log_ratio", "ratio")


def pairs() -> Iterator[tuple[Part, Law]]:
    """Every (part, law) pair of the library's own catalog."""
    for part in parts().values():
        if part.family != "user":
            yield from ((part, each) for each in laws_for(part))


def check(part: str | Callable[..., Any]) -> list[str]:
    """Run every law on a part (a decorated function, a name or an import path); returns the names of the laws run.

    Raises:
        AssertionError: naming the part, the law and what differed.
        ValueError: when it is not a part.
    """
    found = get_part(part) if isinstance(part, str) else getattr(part, "__part__", None)
    if not isinstance(found, Part):
        raise ValueError(f"{part!r} is not a part: decorate the function with @part(...)")
    found_laws = laws_for(found)
    for each in found_laws:
        each.check(found)
    return [each.name for each in found_laws]


# -- batches ----------------------------------------------------------------------------------------


def random_batch(
    seed: int = 0, *, rows: int = 9, width: int = 6, dtype: torch.dtype = torch.float64, spread: float = 0.5
) -> tuple[Rollouts, Signals]:
    """A batch with everything in it: ragged lengths, scattered groups of several sizes, one of them constant, tool
    tokens, an empty row; log-ratios within ±3 `spread`."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=dtype)

    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    lengths[rows // 2] = 0
    lengths[0] = width
    mask = valid_positions(lengths, width) & (torch.rand(rows, width, generator=g) > 0.15)
    mask[:, 0] = lengths > 0
    group_ids = torch.tensor([7, 2, 7, 2, 40, 7, 2, 3, 3])[torch.arange(rows) % 9]
    rewards = torch.randint(0, 3, (rows,), generator=g).to(dtype) / 2
    rewards[group_ids == 3] = 0.1
    rollouts = Rollouts(
        prompt_tokens=tuple(torch.arange(3) for _ in range(rows)),
        tokens=torch.randint(0, 9, (rows, width), generator=g),
        lengths=lengths,
        mask=mask,
        group_ids=group_ids,
        rewards=rewards,
        truncated=torch.rand(rows, generator=g) < 0.3,
        answers=tuple(str(i % 3) for i in range(rows)),
        prompts=tuple({"difficulty": int(i)} for i in group_ids),
        sampler_logprobs=-2 * uniform(rows, width),
        sampling=Sampling(max_tokens=width + 2),
        policy_version=torch.zeros(rows, dtype=torch.int64),
        extras={
            "reference_rewards": torch.randint(0, 3, (rows,), generator=g).to(dtype) / 2,
            "answer_mask": mask & (torch.arange(width) >= lengths[:, None] - 2),
        },
    )
    logprobs = -2 * uniform(rows, width) - 0.05
    noise = torch.randn(rows, width, generator=g, dtype=dtype).clamp(-3, 3)
    signals = Signals(
        logprobs=logprobs,
        old_logprobs=logprobs - spread * noise,
        ref_logprobs=logprobs + 0.3 * torch.randn(rows, width, generator=g, dtype=dtype),
        entropies=2 * uniform(rows, width),
        values=uniform(rows, width),
        old_values=uniform(rows, width),
        extras={name: signal_example(name, rows, width, g).to(dtype) for name in signal_names()},
    )
    return rollouts, signals


def vocabulary_values(rollouts: Rollouts, signals: Signals, *, seed: int = 0) -> dict[str, Any]:
    """Every vocabulary name with a value that fits the batch."""
    ctx = plan_context(rollouts, signals, 3, 10, None)
    g = torch.Generator().manual_seed(seed)
    assert signals.logprobs is not None
    assert signals.old_logprobs is not None
    noise = torch.randn(rollouts.mask.shape, generator=g, dtype=signals.logprobs.dtype)
    log_ratio = signals.logprobs - signals.old_logprobs
    values = dict(ctx.values) | signals.named()
    if signals.values is not None:
        values["values"] = signals.values
    values |= {
        "advantages": noise,
        "returns": noise.roll(1, 0),
        "blend_advantages": noise.roll(2, 0),
        "normalized_entropies": noise.clamp(-1, 1),
        "blend": torch.full_like(noise, 0.25),
        "weights": noise.abs(),
        "keep": torch.ones(len(rollouts), dtype=torch.bool),
        "log_ratio": log_ratio,
        "ratio": log_ratio.exp(),
        "lo": 0.8,
        "hi": 1.2,
        "cap": 3.0,
        "sampler_logprobs": rollouts.sampler_logprobs,
        "logits": torch.randn(len(rollouts), 11, generator=g),
        "generator": torch.Generator().manual_seed(seed),
        "state": None,
    }
    return values


def evaluate(part: Part, values: dict[str, Any]) -> Any:
    """Call a part with the values its signature names; the result without state, or by the stage's name for a dict."""
    arguments = {n: values.get(n) for n in part.inputs}
    if "generator" in arguments:
        arguments["generator"] = torch.Generator().manual_seed(5)
    result = part.function(**arguments)
    if "state" in part.inputs and part.stage != "sampling":
        result = result[0]
    return result[_RESULTS[part.stage]] if isinstance(result, dict) and part.stage != "metric" else result


_RESULTS = {
    "reward": "rewards",
    "advantage": "advantages",
    "select": "keep",
    "credit": "advantages",
    "weight": "weights",
    "updates": "rows",
    "blend": "blend",
}

# -- laws of results --------------------------------------------------------------------------------

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
        elif any(_is_float_tensor(vocabulary_values(rollouts, signals)[n]) for n, need in part.inputs.items() if need):
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
    clean, poisoned = (_with_gradients(vocabulary_values(rollouts, signals)) for _ in range(2))
    for fill in HOSTILE:
        poisoned = _with_gradients(_poison(vocabulary_values(rollouts, signals), rollouts.mask, fill))
        out, again = evaluate(part, clean), evaluate(part, poisoned)
        same(out, again, f"{part.name}: {fill} off the mask changed the result")
        if part.stage in _LOSS_STAGES and out.requires_grad:
            torch.autograd.backward(again.sum())
            for name in (*_GRADIENTS, *CHUNK_SIGNALS):
                grad = poisoned[name].grad if name in part.inputs else None
                if grad is not None:
                    off = grad[~rollouts.mask]
                    assert bool((off == 0).all()), f"{part.name}: gradient of {name} off the mask under {fill}"


@law(_gives_tensor)
def _padding_changes_nothing(part: Part) -> None:
    rollouts, signals = random_batch(3)
    width = rollouts.mask.shape[1]
    values = vocabulary_values(rollouts, signals)
    wide = {k: _pad(v, width, 3) for k, v in values.items()}
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
    shuffled = {k: _take(v, order, len(rollouts)) for k, v in values.items()}
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
        alone = evaluate(part, {k: _take(v, rows, len(rollouts)) for k, v in values.items()})
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
    out = evaluate(part, _with_gradients(vocabulary_values(rollouts, signals)))
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


# -- laws of surrogates -----------------------------------------------------------------------------


@law(lambda p: p.stage == "surrogate")
def _closed_form_equals_autograd(part: Part) -> None:
    assert part.multiplier is not None, f"{part.name}: a surrogate states its multiplier in closed form"
    ctx, leaf, advantages = _grid()
    bound = Bound(part)
    (gradient,) = torch.autograd.grad(ctx.call(bound).sum(), leaf)
    closed = ctx.multiplier(bound)
    assert closed is not None
    same(gradient, closed * advantages, f"{part.name}: closed form and autograd differ")


@law(lambda p: p.stage == "surrogate")
def _on_policy_gradient_is_the_advantage(part: Part) -> None:
    rollouts, signals = random_batch(15)
    assert signals.logprobs is not None
    leaf = signals.logprobs.clone().requires_grad_()
    values = vocabulary_values(rollouts, signals)
    advantages = values["advantages"]
    log_ratio = leaf - signals.logprobs
    values |= {"logprobs": leaf, "log_ratio": log_ratio, "ratio": log_ratio.exp()}
    (gradient,) = torch.autograd.grad(evaluate(part, values).sum(), leaf)
    expected = torch.where(rollouts.mask, advantages, torch.zeros_like(advantages))
    same(gradient, expected, f"{part.name}: at ratio 1 the gradient must be A")


def _grid() -> tuple[Context, Tensor, Tensor]:
    """Ratios just inside and outside every limit, and far away, for positive, negative and zero advantages."""
    lo, hi, cap = 0.8, 1.28, 3.0
    edges = [e * s for e in (lo, 1.0, hi, cap) for s in (1 - 1e-4, 1 + 1e-4)] + [0.01, 0.5, 2.0, 8.0, 50.0]
    ratio = torch.tensor(edges, dtype=torch.float64).repeat(3, 1)
    advantages = torch.tensor([[1.7], [-0.6], [0.0]], dtype=torch.float64).expand(ratio.shape)
    old = torch.full_like(ratio, -1.3)
    leaf = (old + ratio.log()).requires_grad_()
    mask = torch.ones_like(ratio, dtype=torch.bool)
    values = {"logprobs": leaf, "old_logprobs": old, "log_ratio": leaf - old, "advantages": advantages}
    values |= {n: torch.full_like(old, 0.4) for n in ("entropies", "values", "old_values", "ref_logprobs", "weights")}
    g = torch.Generator().manual_seed(0)
    values |= {n: signal_example(n, old.shape[0], old.shape[1], g) for n in signal_names()}
    return Context(values | {"lo": lo, "hi": hi, "cap": cap}, mask), leaf, advantages


# -- laws of compositions ---------------------------------------------------------------------------


def host(part: Part) -> Algorithm:
    """A plain algorithm with the part in its stage, for laws that speak of whole losses."""
    handed = {n for p in parts().values() for n in p.gives} & part.inputs.keys()
    advantage = next((p.name for p in parts().values() if handed and handed <= p.gives), "grpo")
    base = Algorithm.compose(advantage=advantage, surrogate="ppo-clip", aggregate="token-mean")
    bound = Bound(part)
    if part.stage == "term":
        return base.override(terms=[Term(bound, 0.3)])
    if part.stage == "blend":
        return base.override(blend=Blend(bound, base.override(advantage="reinforce").advantage))
    single = part.stage in ("advantage", "aggregate", "log_ratio", "bounds", "surrogate", "updates")
    return base.override(**{part.stage: bound if single else [bound]})


def _in_the_loss(part: Part) -> bool:
    return part.stage in TRAINING_STAGES and part.stage not in ("sampling", "metric", "updates", "branch")


@law(_in_the_loss)
def _any_split_gives_the_same_gradient(part: Part) -> None:
    rollouts, signals = random_batch(16)
    algorithm = host(part)
    plan = algorithm.plan(rollouts, signals, one_update=True)
    update = algorithm.refresh(plan.updates[0], signals.rows(plan.updates[0].rows))
    whole = _gradient(algorithm, signals, [update])
    for size in (1, 2, 5):
        order = torch.randperm(len(update), generator=torch.Generator().manual_seed(size))
        split = _gradient(algorithm, signals, [update[rows] for rows in torch.split(order, size)])
        same(whole, split, f"{part.name}: micro-batches of {size} give another gradient")


@law(lambda p: _in_the_loss(p) and not {"draws", "order-dependent"} & p.properties)
def _gathered_ranks_give_the_same_gradient(part: Part) -> None:
    rollouts, signals = random_batch(17)
    algorithm = host(part)
    order = torch.tensor([0, 3, 4, 8, 1, 2, 5, 6, 7])
    ranks = [rollouts.rows(order[:4]), rollouts.rows(order[4:])]
    together = algorithm.coefficients(rollouts, signals)
    gathered = algorithm.coefficients(Rollouts.concat(ranks), signals.rows(order))
    for name, value in together.items():
        same(value[order], gathered[name], f"{part.name}: a batch gathered from two ranks differs in {name}")


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
    poisoned = evaluate(part, _poison(values, rollouts.mask, float("nan")))
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
        "row order": {k: _take(v, order, len(rollouts)) for k, v in values.items()},
        "padding": {k: _pad(v, width, 3) for k, v in values.items()},
    } | {str(fill): _poison(values, rollouts.mask, fill) for fill in HOSTILE}
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


# -- helpers ----------------------------------------------------------------------------------------


def same(a: Tensor, b: Tensor, message: str) -> None:
    """Assert equality up to the tolerance of the dtype; infinities must agree exactly.

    Raises:
        AssertionError: with the largest difference.
    """
    assert a.shape == b.shape, f"{message}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    if a.dtype == torch.bool:
        assert torch.equal(a, b), message
        return
    assert a.dtype == b.dtype, f"{message}: dtypes {a.dtype} and {b.dtype}"
    tolerance = TOLERANCE.get(a.dtype, 0.0)
    if not torch.allclose(a, b, rtol=tolerance, atol=tolerance):
        raise AssertionError(f"{message}: largest difference {(a - b).abs().max():.3g}")


def _gradient(algorithm: Algorithm, signals: Signals, pieces: list[Any]) -> Tensor:
    leaves = {n: v.clone().requires_grad_() for n, v in signals.named().items() if n in algorithm.loss_needs}
    alive = signals.replace(**leaves)
    for piece in pieces:
        loss, _ = algorithm.loss(alive.rows(piece.rows), piece)
        if loss.requires_grad:
            torch.autograd.backward(loss)
    grads = [torch.zeros_like(v) if v.grad is None else v.grad for _, v in sorted(leaves.items())]
    return torch.cat([g.reshape(-1) for g in grads])


def _with_gradients(values: dict[str, Any]) -> dict[str, Any]:
    return values | {n: values[n].detach().clone().requires_grad_() for n in (*_GRADIENTS, *CHUNK_SIGNALS)}


def _poison(values: dict[str, Any], mask: Tensor, fill: float) -> dict[str, Any]:
    def poisoned(v: Any) -> Any:
        if not (_is_float_tensor(v) and v.shape[:2] == mask.shape):
            return v
        inside = mask if v.ndim == 2 else mask[..., None]
        return torch.where(inside, v, torch.full((), fill, dtype=v.dtype))

    return {k: poisoned(v) for k, v in values.items()}


def _is_float_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _pad(value: Any, width: int, by: int) -> Any:
    wide = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == width
    return torch.nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (0, by)) if wide else value


def _take(value: Any, rows: Tensor, number: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == number:
        return value[rows]
    if isinstance(value, tuple) and len(value) == number:
        return tuple(value[i] for i in rows.tolist())
    return value
