"""The figures of merit, from what many independent batches of one policy gave. `docs/lab.md` defines each.

Every estimate of a square is corrected for its own noise: |mean g|^2 exceeds |E g|^2 by tr Cov(g) / m on average, so
with a few batches the naive cosine of a noisy, unbiased method would look biased.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.lab.intervals import Estimate, finite, jackknife


@dataclass(frozen=True)
class Direction:
    """m gradient estimates [m, D] against the true gradient [D], and the tokens sampled for each [m]."""

    estimates: Tensor
    truth: Tensor
    tokens: Tensor

    def figures(self) -> dict[str, Estimate]:
        """`cosine`, `bias`, `noise`, `snr` and `scale`; `bias` is squared and may be negative by its noise."""
        gram, dots = self.estimates @ self.estimates.T, self.estimates @ self.truth
        length = float(self.truth @ self.truth)
        squares = gram.diagonal()

        def moments(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """|E g|^2, tr Cov(g) and <E g, truth>, each unbiased."""
            count = 1 / (w * w).sum(-1)
            mean = ((w @ gram) * w).sum(-1)
            spread = (w @ squares - mean) * count / (count - 1)
            return mean - spread / count, spread, w @ dots

        def cosine(w: Tensor) -> Tensor:
            signal, _, along = moments(w)
            return along / (length * _positive(signal)).sqrt()

        def bias(w: Tensor) -> Tensor:
            signal, _, along = moments(w)
            return signal * length / along**2 - 1

        def noise(w: Tensor) -> Tensor:
            _, spread, along = moments(w)
            return (w @ self.tokens) * spread * length / along**2

        def snr(w: Tensor) -> Tensor:
            signal, spread, _ = moments(w)
            return signal / ((w @ self.tokens) * spread)

        count = len(dots)
        scale = jackknife(lambda w: w @ dots / length, count)
        rounding = 1e-9 * float(squares.mean() / length) ** 0.5
        if not abs(scale.value) > max(scale.half, rounding):
            # Nothing along the true gradient stands out of the noise: what is measured in units of it has no meaning.
            nothing = Estimate(math.inf, math.nan)
            return {"cosine": Estimate(0.0, math.nan), "bias": nothing, "noise": nothing,
                    "snr": Estimate(0.0, math.nan), "scale": scale}  # fmt: skip
        found = {"cosine": cosine, "bias": bias, "noise": noise, "snr": snr}
        return {name: jackknife(statistic, count) for name, statistic in found.items()} | {"scale": scale}


class Credit:
    """What tokens were given, against what they deserve: sums over sampled tokens, batch by batch."""

    def __init__(self, cells: int) -> None:
        self._sums: list[Tensor] = []
        self._cells = torch.zeros(4, cells, dtype=torch.float64)

    def add(self, given: Tensor, deserved: Tensor, cell: Tensor) -> None:
        """The sampled tokens [N] of a batch: credit given, exact advantage, number of the (prompt, state, token)."""
        one = torch.ones_like(given)
        self._sums.append(torch.stack([one, given, given**2, deserved, deserved**2, given * deserved]).sum(-1))
        self._cells.index_add_(1, cell, torch.stack([one, given, given**2, deserved]))

    def figures(self) -> dict[str, Estimate]:
        """`correlation` and `error` token by token, with intervals, and `mean_correlation`, without."""
        sums = torch.stack(self._sums)

        def means(w: Tensor) -> list[Tensor]:
            total = w @ sums
            return [total[:, i] / total[:, 0] for i in range(1, 6)]

        def correlation(w: Tensor) -> Tensor:
            c, cc, a, aa, ca = means(w)
            return (ca - c * a) / (_positive(cc - c * c) * (aa - a * a)).sqrt()

        def error(w: Tensor) -> Tensor:
            _, cc, _, aa, ca = means(w)
            return (1 - ca.clamp(min=0) ** 2 / (_positive(cc) * aa)).clamp(min=0).sqrt()

        found = {name: jackknife(f, len(sums)) for name, f in (("correlation", correlation), ("error", error))}
        return found | {"mean_correlation": Estimate(self._mean_correlation(), math.nan)}

    def _mean_correlation(self) -> float:
        """Correlation of E[credit | state, token] with the advantage, over what was visited at least twice.

        The square of a mean is estimated without bias from the products of different visits.
        """
        n, total, squares, deserved = self._cells[:, self._cells[0] > 1]
        weight = n / n.sum()
        mean, truth = total / n, deserved / n
        square = weight @ ((total**2 - squares) / (n * (n - 1)))
        variance = square - (weight @ mean) ** 2
        covariance = weight @ (mean * truth) - (weight @ mean) * (weight @ truth)
        spread = weight @ truth**2 - (weight @ truth) ** 2
        return float(covariance / (_positive(variance) * spread).sqrt())


def as_json(figures: dict[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """Every estimate as {value, half}."""
    return {name: {"value": finite(e.value), "half": finite(e.half)} for name, e in figures.items()}


def _positive(x: Tensor) -> Tensor:
    """NaN instead of what cannot be a square: the batches were too few to tell the signal from noise."""
    return torch.where(x > 0, x, math.nan)
