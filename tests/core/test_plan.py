"""`Update` slices, `Metrics` add up."""

from __future__ import annotations

import pytest
import torch

from tokenloom import Algorithm, Metrics
from tokenloom.plan import Update
from tokenloom.testing import random_batch


def made() -> Update:
    return Update(
        rows=torch.tensor([4, 7, 9]),
        tensors={"mask": torch.ones(3, 2, dtype=torch.bool), "x": torch.arange(3.0)},
        constants={"step": 3},
        live=torch.tensor([[True, False], [False, False], [True, True]]),
    )


def test_slices_cut_everything_alike() -> None:
    whole = made()
    cut = whole[[2, 0]]
    assert cut.rows.tolist() == [9, 4]
    assert cut.tensors["x"].tolist() == [2, 0]
    assert cut.live.tolist() == [[True, True], [True, False]]
    assert cut.constants == {"step": 3}
    assert (len(whole), len(cut), len(whole[[]])) == (3, 2, 0)
    assert whole.whole
    assert not cut.whole


def test_live_rows_are_positions_within_the_update() -> None:
    assert made().live_rows.tolist() == [0, 2]
    assert made()[[1]].live_rows.tolist() == []


def test_metrics_are_means_and_losses_are_sums() -> None:
    m = Metrics()
    m.add("ratio/mean", 3.0, 2)
    m.add("ratio/mean", torch.tensor(5.0), torch.tensor(2))
    m.add("loss", 1.5)
    m.add("loss/policy", 1.0)
    m.add("loss/policy", -3.0)
    m.add("nothing", 0.0, 0)
    assert m.result() == {"loss": 1.5, "loss/policy": -2.0, "ratio/mean": 2.0}


def test_merging_equals_adding_everything_in_one_place() -> None:
    a, b = Metrics(), Metrics()
    a.add("x", 1.0, 1)
    b.add("x", 5.0, 3)
    b.add("y", 2.0, 1)
    assert a.merge([b, Metrics()]).result() == {"x": 1.5, "y": 2.0}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_metrics_of_micro_batches_merge_into_those_of_the_whole(size: int) -> None:
    rollouts, signals = random_batch(3)
    algorithm = Algorithm.from_recipe("grpo")
    update = algorithm.plan(rollouts, signals).updates[0]
    loss, whole = algorithm.loss(signals.rows(update.rows), update)
    merged, total = Metrics(), torch.zeros((), dtype=loss.dtype)
    for rows in torch.arange(len(update)).split(size):
        piece = update[rows]
        part, metrics = algorithm.loss(signals.rows(piece.rows), piece)
        merged.merge([metrics])
        total += part
    torch.testing.assert_close(total, loss)
    assert merged.result() == pytest.approx(whole.result())
    assert whole.result()["loss"] == pytest.approx(float(loss))
