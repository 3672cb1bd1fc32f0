"""Cost curves: measured, made monotone, following rounds; the size with the most tokens a second."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import tiny_llama
from tokenloom.decode.cost import CostCurve, best_sizes, curve_for
from tokenloom.decode.session import open_session


def test_times_lie_between_what_was_measured() -> None:
    curve = CostCurve({0: 1.0, 3: 1.3, 7: 1.2, 15: 2.0})
    assert curve.forward(0) == 1.0
    # 3 nodes cannot take more than 7 do.
    assert curve.forward(3) == pytest.approx(1.2)
    assert curve.forward(11) == pytest.approx(1.6)
    assert curve.forward(31) == pytest.approx(3.6)
    assert CostCurve({0: 2.0}).seconds(3) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="measure 0 nodes"):
        CostCurve({1: 1.0})


def test_estimates_follow_the_rounds() -> None:
    curve = CostCurve({0: 1.0, 7: 1.2})
    assert not curve.knows(7)
    for _ in range(60):
        curve.note(7, 1.5)
    assert curve.knows(7)
    assert curve.seconds(7) == pytest.approx(1.5, abs=1e-2)
    # What a round takes besides its forward is expected of other sizes too, but not of a step without drafts.
    assert curve.seconds(3) == pytest.approx(curve.forward(3) + 0.3, abs=1e-2)
    assert curve.seconds(0) == 1.0


def test_a_smaller_batch_takes_what_as_many_tokens_took() -> None:
    curve = CostCurve({0: 1.0, 4: 1.5, 28: 4.5}, rows=4).for_fewer(1)
    # 4 tokens of one row are what a step of four rows takes, 8 what four rows with 4 nodes take.
    assert curve.forward(0) == curve.forward(3) == 1.0
    assert curve.forward(7) == pytest.approx(1.5)
    assert curve.forward(31) == pytest.approx(4.5)


def test_an_estimate_that_was_too_long_for_large_trees_does_not_end_below_zero() -> None:
    curve = CostCurve({0: 0.020, 1: 0.021, 3: 0.022, 6: 0.024, 63: 0.060})
    for nodes, times in ((63, 30), (2, 60)):
        for _ in range(times):
            curve.note(nodes, 0.020 + 0.00024 * nodes)
    assert 0.015 < curve.seconds(2) < 0.03
    assert best_sizes([[float(n) for n in range(65)]], curve.seconds, 64, ragged=True)[0] > 30


def test_accidents_count_little() -> None:
    curve = CostCurve({0: 1.0, 7: 1.2})
    curve.note(0, 100.0)
    assert curve.seconds(0) == pytest.approx(1.1)
    # Nothing is quicker by accident.
    curve.note(0, 0.6)
    assert curve.seconds(0) == pytest.approx(0.95)


def best_size(sums: list[list[float]], seconds: dict[int, float], most: int) -> int:
    """Where every row pays for the largest tree."""
    return max(best_sizes(sums, seconds.__getitem__, most, ragged=False))


def test_the_best_size_brings_the_most_tokens_a_second() -> None:
    seconds = {n: 1 + 0.05 * n for n in range(100)}
    assert best_size([[0.0, 0.9, 1.7, 2.3, 2.4]], seconds, 80) == 3
    assert best_size([[0.0, 0.04]], seconds, 80) == 0
    assert best_size([[0.0]], seconds, 80) == 0
    assert best_size([[float(n) for n in range(81)]], seconds, 12) == 12
    # Only one of four rows has drafts, and all pay for the nodes.
    four = {4 * n: seconds for n, seconds in seconds.items()}
    assert best_size([[0.0, 0.6, 1.2], [0.0], [0.0], [0.0]], four, 80) == 2
    # Of so little more the half may be an error of the estimates.
    assert best_size([[0.0, 0.4, 0.8], [0.0], [0.0], [0.0]], four, 80) == 0
    assert best_size([[0.0, 0.1, 0.15], [0.0], [0.0], [0.0]], four, 80) == 0


def test_rows_get_sizes_of_their_own() -> None:
    seconds = {n: 1 + 0.05 * n for n in range(100)}
    # A node is worth its place when it comes true more often than 0.05 x (rows + S) / (1 + 0.05 N).
    sums = [[0.0, 0.9, 1.7, 2.3, 2.35], [0.0, 0.1], [0.0], [0.0, 0.8, 0.9]]
    assert best_sizes(sums, seconds.__getitem__, 80, ragged=True) == [3, 0, 0, 1]
    assert best_sizes([[0.0, 0.1], [0.0, 0.1]], seconds.__getitem__, 80, ragged=True) == [0, 0]
    # As each tree is read along with nodes of its own, it has to bring more.
    assert best_sizes(sums, seconds.__getitem__, 80, ragged=True, read=lambda n: n and n + 20) == [0, 0, 0, 0]
    assert max(best_sizes([[float(n) for n in range(60)]], seconds.__getitem__, 12, ragged=True)) == 12


def test_a_model_is_measured_once_for_a_batch_size() -> None:
    model = tiny_llama()
    device = torch.device("cpu")
    with open_session(model, [[3, 4], [5, 6, 7], [8]]) as session:
        session.start()
        rows = [list(r) for r in session.rows]
        curve = curve_for(model, session, device)
        assert session.rows == rows
        assert curve_for(model, session, device) is curve
        scores = session.step(torch.tensor([9, 9, 9]))
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([[8, 9]])).logits[0, -1]
        torch.testing.assert_close(scores[2], wanted, rtol=1e-4, atol=1e-4)
        session.branch([0])
        assert curve_for(model, session, device) is not curve
