"""The optimizer against PyTorch's own, its schedules by hand, its state, and what it frees when."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from tokenloom.train.config import TrainConfig
from tokenloom.train.optim import Optimizer
from tokenloom.train.optim_moments import has_fused_kernel

SHAPES = ((3, 2), (5,), ())


def parameters(seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    return [(f"p.{i}", nn.Parameter(torch.randn(shape, generator=generator))) for i, shape in enumerate(SHAPES)]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * 10 ** (1 - step % 3) for shape in SHAPES]


def put(params: list[nn.Parameter], grads: list[torch.Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()


SETTINGS: dict[str, Any] = {
    "steps": 8, "learning_rate": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.03, "adam_eps": 1e-6,
    "warmup_steps": 2, "schedule": "cosine", "final_fraction": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("limit", [None, 1.0])
def test_it_is_adamw_with_clipping(limit: float | None) -> None:
    config = TrainConfig(**SETTINGS, max_grad_norm=limit)
    ours = parameters()
    optimizer = Optimizer(ours, config)
    theirs = [p for _, p in parameters()]
    reference = torch.optim.AdamW(theirs, lr=1.0, betas=config.betas, eps=1e-6, weight_decay=0.03, foreach=False)
    for step in range(8):
        put([p for _, p in ours], gradients(step))
        put(theirs, gradients(step))
        norm = optimizer.step(step)
        total = math.sqrt(sum(float((g**2).sum()) for g in gradients(step)))
        assert norm == pytest.approx(total, rel=1e-6)
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(theirs, limit)
        reference.param_groups[0]["lr"] = optimizer.learning_rate(step)
        reference.step()
        for (_, a), b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert a.grad is None


def test_it_is_the_fused_adamw_bit_for_bit() -> None:
    """One parameter after the other is what PyTorch does with all at once."""
    config = TrainConfig(**SETTINGS)
    ours = parameters()
    optimizer = Optimizer(ours, config)
    theirs = [p for _, p in parameters()]
    whole = torch.optim.AdamW(theirs, lr=1.0, betas=config.betas, eps=1e-6, weight_decay=0.03, fused=True)
    for step in range(8):
        put([p for _, p in ours], gradients(step))
        put(theirs, gradients(step))
        optimizer.step(step)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        whole.param_groups[0]["lr"] = optimizer.learning_rate(step)
        whole.step()
        assert all(torch.equal(a, b) for (_, a), b in zip(ours, theirs, strict=True))
    state = optimizer.state()
    for (name, _), parameter in zip(ours, theirs, strict=True):
        for kind, value in whole.state[parameter].items():
            assert torch.equal(state[f"{kind}/{name}"], value)


def test_each_gradient_is_freed_before_the_next_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = parameters()
    optimizer = Optimizer(ours, TrainConfig(**SETTINGS))
    put([p for _, p in ours], gradients(0))
    seen = {name: weakref.ref(p.grad) for name, p in ours}
    update, alive = optimizer.moments.update, []

    def watched(name: str, gradient: torch.Tensor, rate: float) -> None:
        alive.append([n for n, gone in seen.items() if gone() is not None])
        update(name, gradient, rate)

    monkeypatch.setattr(optimizer.moments, "update", watched)
    optimizer.step(0)
    assert alive == [["p.0", "p.1", "p.2"], ["p.1", "p.2"], ["p.2"]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_no_number_changes_nothing(bad: float) -> None:
    ours = parameters()
    optimizer = Optimizer(ours, TrainConfig(**SETTINGS))
    put([p for _, p in ours], gradients(0))
    optimizer.step(0)
    before, state = [p.detach().clone() for _, p in ours], {k: v.clone() for k, v in optimizer.state().items()}
    grads = gradients(1)
    grads[1][2] = bad
    put([p for _, p in ours], grads)
    assert optimizer.step(1) is None
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, ours, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state().items())
    assert all(p.grad is None for _, p in ours)


def test_without_gradients_nothing_changes() -> None:
    ours = parameters()
    before = [p.detach().clone() for _, p in ours]
    assert Optimizer(ours, TrainConfig(**SETTINGS)).step(0) == 0.0
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, ours, strict=True))


@pytest.mark.parametrize(
    ("schedule", "warmup", "final", "rates"),
    [
        ("constant", 0, 0.0, [1, 1, 1, 1, 1]),
        ("constant", 3, 0.0, [0.25, 0.5, 0.75, 1, 1]),
        ("linear", 0, 0.0, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 2, 0.5, [1 / 3, 2 / 3, 1, 0.75, 0.5]),
        ("cosine", 0, 0.0, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
        ("cosine", 2, 0.2, [1 / 3, 2 / 3, 1, 0.6, 0.2]),
        ("linear", 4, 0.0, [0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_schedules(schedule: str, warmup: int, final: float, rates: list[float]) -> None:
    config = TrainConfig(
        steps=5,
        learning_rate=2.0,
        schedule=schedule,
        warmup_steps=warmup,
        final_fraction=final,  # type: ignore[arg-type]  # parametrized text
    )
    optimizer = Optimizer(parameters(), config)
    assert [optimizer.learning_rate(s) for s in range(5)] == pytest.approx([2 * r for r in rates], abs=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_its_state_comes_back(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        without_the_fused_kernel(monkeypatch)
    assert has_fused_kernel([p for _, p in parameters()]) is fused
    config = TrainConfig(**SETTINGS)
    ours, copy = parameters(), parameters()
    first = Optimizer(ours, config)
    for step in range(3):
        put([p for _, p in ours], gradients(step))
        first.step(step)
    second = Optimizer(copy, config)
    with torch.no_grad():
        for (_, a), (_, b) in zip(ours, copy, strict=True):
            b.copy_(a)
    state = {k: v.clone() for k, v in first.state().items()}
    second.load(state)
    for step in range(3, 6):
        for optimizer, params in ((first, ours), (second, copy)):
            put([p for _, p in params], gradients(step))
            optimizer.step(step)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, copy, strict=True))
    # The loaded tensors are the caller's own, untouched.
    assert all(torch.equal(v, state[k]) for k, v in state.items())
    assert {k: v.shape for k, v in second.state().items()} == {k: v.shape for k, v in first.state().items()}


def without_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that has none, where PyTorch refuses to make the optimizer."""
    made = torch.optim.AdamW

    def refuses(*args: Any, fused: bool | None = None, **rest: Any) -> torch.optim.AdamW:
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        return made(*args, fused=fused, **rest)

    monkeypatch.setattr(torch.optim, "AdamW", refuses)


def test_it_does_without_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(**SETTINGS)
    ours, plain = parameters(), parameters()
    with_kernel = Optimizer(ours, config)
    without_the_fused_kernel(monkeypatch)
    without = Optimizer(plain, config)
    for step in range(3):
        for optimizer, params in ((with_kernel, ours), (without, plain)):
            put([p for _, p in params], gradients(step))
            optimizer.step(step)
    for (_, a), (_, b) in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_state_of_other_parameters_is_refused() -> None:
    optimizer = Optimizer(parameters(), TrainConfig())
    with pytest.raises(ValueError, match="of other parameters"):
        optimizer.load({"exp_avg/q": torch.zeros(1)})
    whole = {k: v for k, v in optimizer.state().items() if k.endswith("/p.0")}
    for broken in ({"exp_avg/p.0": whole["exp_avg/p.0"]}, whole | {"exp_avg_sq/p.0": torch.zeros(2, 3)}):
        with pytest.raises(ValueError, match=r"'p\.0' does not fit: it was saved for another model"):
            optimizer.load(broken)
