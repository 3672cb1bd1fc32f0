"""CyclicReflex: raise and lower the scores of reflection tokens in waves (arXiv 2506.11077).

After t generated tokens, with c = ((t + shift period) mod period) / period, every reflection token's score gets
delta(t) = 4 A c                 for c <= 1/4
           A - 4 A (c - 1/4)     for 1/4 < c <= 3/4
          -A + 4 A (c - 3/4)     for c > 3/4
while the row thinks and start <= t < stop. The prompt does not count. "constant" adds A all the time; with A = -3 that
is the thought-switching penalty (TIP, arXiv 2501.18585). Limits: A = 0 changes nothing; the mean over a period is 0.
Deviations: none. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.catalog import part


@part("cyclicreflex", stage="shape", scope="row", paper="arXiv:2506.11077")
def cyclicreflex(
    scores: Tensor,
    generated: Tensor,
    thinking: Tensor,
    reflection_ids: Tensor,
    *,
    amplitude: float = 5.0,
    period: float = 1200.0,
    shift: float = 0.0,
    start: int = 0,
    stop: int = 8192,
    schedule: Literal["triangle", "constant"] = "triangle",
) -> Tensor:
    """Scores [B, V] after `generated` [B] tokens; rows not `thinking` [B] keep theirs. `reflection_ids` is [R].

    Raises:
        ValueError: for a period not above 0.
    """
    if schedule == "triangle":
        delta = triangle(generated, amplitude=amplitude, period=period, shift=shift)
    else:
        delta = torch.full(generated.shape, amplitude, dtype=torch.float64, device=generated.device)
    active = thinking & (generated >= start) & (generated < stop)
    delta = torch.where(active, delta, 0.0).to(scores.dtype)
    shaped = scores.clone()
    shaped[:, reflection_ids] += delta[:, None]
    return shaped


def triangle(generated: Tensor, *, amplitude: float, period: float, shift: float = 0.0) -> Tensor:
    """delta, float64, of the shape of `generated`: 0, up to `amplitude`, down to its negative, back to 0.

    Raises:
        ValueError: for a period not above 0.
    """
    if not period > 0:
        raise ValueError(f"cyclicreflex: the period is a number of tokens above 0, got {period}")
    cycle = ((generated.double() + shift * period) % period) / period
    rising, falling = 4 * amplitude * cycle, amplitude - 4 * amplitude * (cycle - 0.25)
    returning = -amplitude + 4 * amplitude * (cycle - 0.75)
    return torch.where(cycle <= 0.25, rising, torch.where(cycle <= 0.75, falling, returning))
