"""Optimizer states of fewer bits: their formats, their rounding, and that runs with them learn and resume."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenloom.train import checkpoint, optim, optim_int8, optim_moments
from tokenloom.train.config import States, TrainConfig
from tokenloom.train.optim import Optimizer
from tokenloom.train.optim_moments import AdamMoments
from tokenloom.train.session import Session
from train.setups import Tiny, same_results, train

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (the extra `lowmem`)"
)
LOW = ["bfloat16", pytest.param("int8", marks=needs_bitsandbytes)]
ALL = ["float32", *LOW]


def settings(states: States = "bfloat16", **rest: Any) -> TrainConfig:
    return TrainConfig(optimizer_states=states, max_grad_norm=None, **{"steps": 100, "learning_rate": 0.01} | rest)


def one(values: Tensor, config: TrainConfig) -> tuple[nn.Parameter, Optimizer]:
    parameter = nn.Parameter(values.clone())
    return parameter, Optimizer([("w", parameter)], config)


def drive(parameter: nn.Parameter, optimizer: Optimizer, gradients: list[Tensor], start: int = 0) -> None:
    for step, gradient in enumerate(gradients, start):
        parameter.grad = gradient.clone()
        optimizer.step(step)


# -- formats ---------------------------------------------------------------------------------


def test_formats_of_the_moments() -> None:
    weights, gradient = torch.ones(64, 80), torch.ones(64, 80)
    for states, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for format_ in (torch.float32, torch.bfloat16):
            parameter, optimizer = one(weights.to(format_), settings(states))
            drive(parameter, optimizer, [gradient.to(format_)])
            state = optimizer.state()
            assert {k: v.dtype for k, v in state.items()} == {
                "exp_avg/w": dtype,
                "exp_avg_sq/w": dtype,
                "step/w": torch.float32,
            }
            assert parameter.dtype == format_
            assert bool((parameter < 1).all())


@needs_bitsandbytes
def test_int8_keeps_a_byte_of_each_moment() -> None:
    parameter, optimizer = one(torch.ones(64, 80), settings("int8"))
    drive(parameter, optimizer, [torch.ones(64, 80)])
    state = optimizer.state()
    assert {k: (v.dtype, v.numel()) for k, v in state.items()} == {
        "step.0/w": (torch.int64, 1),
        "state1.0/w": (torch.uint8, 5120),
        "state2.0/w": (torch.uint8, 5120),
        "absmax1.0/w": (torch.float32, 20),  # one for 256 numbers
        "absmax2.0/w": (torch.float32, 20),
    }
    # The first step of AdamW is the learning rate in the direction of the gradient; 8 bits lose at most 1 in 127 of it.
    torch.testing.assert_close(parameter.detach(), torch.full((64, 80), 0.99), rtol=0, atol=0.01 / 127)


@needs_bitsandbytes
def test_int8_does_not_depend_on_its_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(96, 128, generator=generator)
    gradients = [torch.randn(96, 128, generator=generator) for _ in range(4)]
    whole = one(weights, settings("int8"))
    drive(*whole, gradients)
    monkeypatch.setattr(optim_int8, "_SLICE", 4096)
    sliced = one(weights, settings("int8"))
    before = sliced[0]._version
    drive(*sliced, gradients)
    assert torch.equal(whole[0], sliced[0])
    # What compares versions to see whether weights have changed, sees it.
    assert sliced[0]._version > before


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'tokenloom\[lowmem\]', or use bfloat16"):
        one(torch.ones(2), settings("int8"))


def test_a_missing_library_is_named_before_anything_is_loaded(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("tokenloom.train.session.load_task", lambda _: pytest.fail("the task was loaded"))
    recipe = tiny.recipe(train={"optimizer_states": "int8"})
    with pytest.raises(ValueError, match=r"tokenloom\[lowmem\]"), Session(recipe, tmp_path / "run", []):
        pass
    assert not (tmp_path / "run").exists()


# -- stochastic rounding ---------------------------------------------------------------------


def neighbors(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers below and above positive x [n], as float32; both are x where x is one."""
    bits = x.view(torch.int32)
    below = bits - bits % 2**16
    above = torch.where(below == bits, bits, below + 2**16)
    return below.view(torch.float32), above.view(torch.float32)


def test_rounding_is_to_a_neighbor_and_right_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first moments after one step from zero are (1 - beta1) times the gradient, rounded once."""
    monkeypatch.setattr(optim_moments, "_SLICE", 64)  # 300 numbers in five slices
    exact = torch.linspace(0.5, 2.0, 300) * 1.1
    below, above = neighbors(exact)
    total, runs = torch.zeros(300, dtype=torch.float64), 400
    for seed in range(runs):
        moments = AdamMoments(
            {"w": nn.Parameter(torch.zeros(300))}, settings(seed=seed, betas=(0.0, 0.5)), torch.bfloat16
        )
        moments.update("w", exact.clone(), 0.01)
        got = moments.state()["exp_avg/w"].float()
        assert bool(((got == below) | (got == above)).all())
        total += got
    # A mean of `runs` draws between neighbors `gap` apart has a deviation of at most gap / 2 / sqrt(runs); five of them
    # are exceeded by one in 300 numbers with a probability below 2e-4. Rounding to the nearest is off by up to gap / 2.
    gap = (above - below).double()
    assert bool(((total / runs - exact.double()).abs() <= 5 * gap / 2 / runs**0.5).all())


def test_zeros_and_numbers_of_the_format_stay() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-130, -(2.0**100)])
    moments = AdamMoments({"w": nn.Parameter(torch.zeros(6))}, settings(betas=(0.0, 0.5)), torch.bfloat16)
    moments.update("w", exact.clone(), 0.01)
    assert torch.equal(moments.state()["exp_avg/w"].float(), exact)


def test_the_second_moment_fades(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients it falls by 0.999 a step, which rounding to the nearest would undo every time."""
    size, steps = 4096, 1000
    monkeypatch.setattr(optim_moments, "_SLICE", size)  # less noise to draw
    parameter, optimizer = one(torch.zeros(size), settings(steps=steps + 1, betas=(0.9, 0.999)))
    drive(parameter, optimizer, [torch.ones(size)])
    start = optimizer.state()["exp_avg_sq/w"].float().mean()
    drive(parameter, optimizer, [torch.zeros(size)] * steps, 1)
    # Neighbors are at most 2^-7 apart (relative), so a rounding deviates by at most 2^-8; a thousand of them by 0.12,
    # the mean of 4096 numbers by 0.002.
    assert float(optimizer.state()["exp_avg_sq/w"].float().mean() / start) == pytest.approx(0.999**steps, rel=0.01)
    nearest = torch.tensor(float(start)).bfloat16()
    assert (nearest * 0.999).bfloat16() == nearest


# -- learning and resuming -------------------------------------------------------------------


def loss_after(states: States) -> float:
    """Mean square error of a linear model fitted to noisy targets by small batches; 3.0 at the start."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(80, 64, generator=generator) * 0.2
    model = nn.Linear(80, 64, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = Optimizer([("w", model.weight)], settings(states, steps=300, learning_rate=0.02, schedule="linear"))
    for step in range(300):
        x = torch.randn(32, 80, generator=generator)
        y = x @ truth + torch.randn(32, 64, generator=generator) * 0.1
        (model(x) - y).square().mean().backward()
        optimizer.step(step)
    return float((model.weight.T - truth).detach().square().sum(0).mean())


@pytest.mark.parametrize("states", LOW)
def test_it_learns_as_with_float32(states: States) -> None:
    wanted = loss_after("float32")
    assert wanted < 0.01
    assert loss_after(states) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("states", LOW)
def test_a_state_goes_on_bit_by_bit(states: States, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(70, 64, generator=generator)
    gradients = [torch.randn(70, 64, generator=generator) for _ in range(6)]
    parameter, optimizer = one(weights, settings(states))
    drive(parameter, optimizer, gradients[:3])
    saved = checkpoint.Checkpoint(3, {}, optimizer.state(), {}, {})
    checkpoint.save(tmp_path, saved, keep=1)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    again, second = one(parameter.detach(), settings(states))
    second.load(found.optimizer)
    for mine, theirs in ((parameter, optimizer), (again, second)):
        drive(mine, theirs, gradients[3:], 3)
    assert torch.equal(parameter, again)
    assert all(torch.equal(v, second.state()[k]) for k, v in optimizer.state().items())


@pytest.mark.parametrize("found", ALL)
@pytest.mark.parametrize("wanted", ALL)
def test_the_state_of_another_format_is_refused(found: States, wanted: States) -> None:
    parameter, optimizer = one(torch.ones(4096), settings(found))
    drive(parameter, optimizer, [torch.ones(4096)])
    _, other = one(torch.ones(4096), settings(wanted))
    if found == wanted:
        other.load(optimizer.state())
        return
    with pytest.raises(ValueError, match=rf"saved in {found}, the recipe says .* {wanted}; go on with .*={found}"):
        other.load(optimizer.state())


@pytest.mark.parametrize("states", LOW)
def test_a_resumed_run_is_the_run(states: States, tiny: Tiny, tmp_path: Path) -> None:
    training = {"optimizer_states": states, "eval": {"samples": 0, "problems": 1}}
    recipe = tiny.recipe(train=training)
    train(recipe, tmp_path / "whole")
    with Session(recipe, tmp_path / "cut", []) as session:
        trainer = session.trainer
        trainer.before = trainer._evaluate(0, None)
        trainer._samples(trainer.before, 0)
        trainer.step(0)
        trainer.done = 1
        trainer.save_checkpoint()
    with pytest.raises(ValueError, match=f"saved in {states}, the recipe says"):
        train(tiny.recipe(train={"optimizer_states": "float32"}), tmp_path / "cut", resume=True, force=True)
    train(recipe, tmp_path / "cut", resume=True)
    same_results(tmp_path / "whole", tmp_path / "cut")
