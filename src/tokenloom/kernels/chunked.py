"""Sums over the vocabulary and their gradients in plain PyTorch, one tile of the logit matrix at a time.

Forward, for every row, over vocabulary blocks with a running maximum m (the online log-sum-exp, arXiv 1805.02867):

    total = sum_v exp(z_v - m),   spread = sum_v exp(z_v - m) (z_v - m)
    log_norm = m + log total,     entropy = log total - spread / total                       (nats)

Backward: with p the softmax, every logit's gradient is p_v (a + b log p_v), plus what its row's targets add.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tokenloom.kernels.logit_form import LogitForm
from tokenloom.kernels.products import Scratch, add_product, exp_, matmul
from tokenloom.kernels.tiles import Grid, Places

NEVER = -1e30
"""A log-prob whose exponential is 0 and that can be multiplied by it."""


class Sums(NamedTuple):
    """What a forward over a vocabulary knows: `m`, `total`, `spread` [M], `chosen` [N] logits of the targets.

    `chosen` is 0 for targets outside of the vocabulary; `spread` is meaningful if entropies were asked for;
    `top` are the k largest logits and their tokens [M, k], descending.
    """

    m: Tensor
    total: Tensor
    spread: Tensor
    chosen: Tensor
    top: tuple[Tensor, Tensor] | None


class RowGradients(NamedTuple):
    """Gradient of the loss with respect to a row's logits: p (a + b log p); b is None when no entropy takes part."""

    log_norm: Tensor
    a: Tensor
    b: Tensor | None


class Tile(NamedTuple):
    """Where a tile is, its pairs (see `Places.at`), its factors `hidden` [n, D] and `matrix` [v, D], its bias [v]."""

    row_block: int
    rows: slice
    words: slice
    pairs: tuple[slice, Tensor] | None
    hidden: Tensor
    matrix: Tensor
    bias: Tensor | None


class Chunked:
    """Logits of `hidden` [M, D] over `weight` [V, D], recomputed tile by tile into buffers that all tiles share."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, form: LogitForm, *, chunk: int = 0) -> None:
        self.hidden, self.weight, self.bias, self.form = hidden, weight, bias, form
        self.grid = self.cut(chunk)
        self._scratch = Scratch(hidden.device)

    def cut(self, chunk: int) -> Grid:
        """How the logits are cut into tiles."""
        return Grid.fitting(len(self.hidden), len(self.weight), self.hidden.device, chunk)

    @cached_property
    def rules_out(self) -> bool:
        """Whether the bias makes tokens impossible: their p log p is 0, not the product of 0 and -inf."""
        return self.bias is not None and bool(self.bias.isneginf().any())

    @cached_property
    def factors(self) -> Tensor:
        """Hidden states in the format of the products."""
        return self.hidden.to(self.form.product)

    def sums(self, rows: Tensor, tokens: Tensor, *, need_entropy: bool, top_k: int) -> Sums:
        """The forward; `rows`, `tokens` [N] name the targets' logits."""
        m = self._column(torch.finfo(self.form.math).min)
        total, spread = self._column(0.0), self._column(0.0)
        top = self._no_top(top_k)
        places = Places(self.grid, rows, tokens)
        ordered = torch.zeros(len(rows), dtype=m.dtype, device=m.device)
        state = [torch.split(x, self.grid.height) for x in (m, total, spread)]
        for tile in self.tiles(places):
            x = self.logits(tile)
            if tile.pairs is not None:
                torch.take(x, tile.pairs[1], out=ordered[tile.pairs[0]])
            if top is not None:
                _merge_top(top, tile.rows, x, tile.words.start)
            m_i, total_i, spread_i = (column[tile.row_block] for column in state)
            high = torch.maximum(m_i, x.amax(-1))
            drop = m_i.sub_(high)
            keep = drop.exp()
            x.sub_(high[:, None])
            if need_entropy:
                spread_i.add_(drop.mul_(total_i)).mul_(keep)
                e = exp_(self._like("e", x).copy_(x))
                if self.rules_out:
                    x.clamp_(min=NEVER)
                total_i.mul_(keep).add_(e.sum(-1))
                spread_i.add_(e.mul_(x).sum(-1))
            else:
                total_i.mul_(keep).add_(exp_(x).sum(-1))
            m_i.copy_(high)
        chosen = torch.empty_like(ordered).index_copy_(0, places.order, ordered)
        return Sums(m, total, spread, chosen, top)

    def gradients(
        self,
        of: RowGradients,
        rows: Tensor,
        tokens: Tensor,
        values: Tensor,
        needed: tuple[bool, bool, bool],
        into: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The backward: gradients of hidden [M, D] (in `form.math`), weight and bias (in their own formats).

        `values` [n] are the whole gradients of the products at the distinct pairs `rows`, `tokens` [n], where
        `of` alone does not give them. That of the weight is added to `into`, if there is one, and not returned.
        """
        math, product = self.form.math, self.form.product
        # Every word of weight and bias is written; without rows there is nothing to write.
        new = torch.empty_like if len(self.hidden) else torch.zeros_like
        hidden = torch.zeros(self.hidden.shape, dtype=math, device=self.hidden.device) if needed[0] else None
        weight = (new(self.weight) if into is None else into) if needed[1] else None
        bias = new(self.bias) if self.bias is not None and needed[2] else None
        # A sum over rows that would be rounded at every tile is taken over all rows at once, by the product itself.
        given = (self.weight,) if self.bias is None else (self.weight, self.bias)
        at_once = product != math or any(x.dtype != math for x in given)
        places = Places(self.grid, rows, tokens)
        ordered = values[places.order]
        for tile in self.tiles(places):
            words, here = tile.words, tile.rows
            strip = self.factors if at_once else tile.hidden
            slopes = self._scratch.take("slopes", (len(strip), len(tile.matrix)), product)
            part = slopes[here] if at_once else slopes
            self.slopes(part, tile, of, ordered)
            if hidden is not None:
                add_product(hidden[here], part, tile.matrix, self._scratch)
            if at_once and here.stop < len(self.hidden):
                continue
            first = at_once or here.start == 0
            if weight is not None:
                add_product(weight[words], slopes.t(), strip, self._scratch, overwrite=first and into is None)
            if bias is not None:
                column = slopes.sum(0, dtype=math)
                bias[words] = column if first else bias[words] + column
        return hidden, weight if into is None else None, bias

    # -- one tile ------------------------------------------------------------------------------

    def tiles(self, places: Places) -> Iterator[Tile]:
        """All tiles, vocabulary block by vocabulary block."""
        hidden = torch.split(self.factors, self.grid.height) if len(self.hidden) else ()
        rows = self.grid.row_blocks()
        for j, words in enumerate(self.grid.word_blocks()):
            matrix = self.weight[words].to(self.form.product)
            bias = None if self.bias is None else self.bias[words]
            for i, factor in enumerate(hidden):
                yield Tile(i, rows[i], words, places.at(j, i), factor, matrix, bias)

    def logits(self, tile: Tile) -> Tensor:
        """[n, v] logits in a buffer that the next tile overwrites."""
        x = matmul(tile.hidden, tile.matrix.t(), self._scratch, "tile")
        if x.dtype != self.form.math:
            x = self._like("wide", x).copy_(x)
        return self.form.logits_(x, tile.bias)

    def slopes(self, out: Tensor, tile: Tile, of: RowGradients, values: Tensor) -> None:
        """Write a tile's gradient of the loss with respect to the products into `out` [n, v], in their format.

        `of` is of all rows, `values` are ordered as the tiles' pairs are.
        """
        form, here = self.form, tile.rows
        x = self.logits(tile)
        slope = None if form.softcap is None else form.slope(x, out=self._like("slope", x))
        x.sub_(of.log_norm[here, None])
        if of.b is None:
            exp_(x).mul_(of.a[here, None])
        else:
            p = exp_(self._like("e", x).copy_(x))
            if self.rules_out:
                x.clamp_(min=NEVER)
            x.mul_(of.b[here, None]).add_(of.a[here, None]).mul_(p)
        if slope is not None:
            x.mul_(slope)
        if form.factor != 1.0:
            x.mul_(form.factor)
        if tile.pairs is not None:
            x.put_(tile.pairs[1], values[tile.pairs[0]])
        out.copy_(x)

    # -- scratch -------------------------------------------------------------------------------

    def _like(self, name: str, x: Tensor) -> Tensor:
        """Scratch space in the shape of `x`, in the format of the arithmetic."""
        return self._scratch.take(name, tuple(x.shape), self.form.math)

    def _column(self, value: float) -> Tensor:
        return torch.full((len(self.hidden),), value, dtype=self.form.math, device=self.hidden.device)

    def _no_top(self, k: int) -> tuple[Tensor, Tensor] | None:
        if k == 0:
            return None
        shape, device = (len(self.hidden), k), self.hidden.device
        return (
            torch.full(shape, -torch.inf, dtype=self.form.math, device=device),
            torch.zeros(shape, dtype=torch.int64, device=device),
        )


def _merge_top(top: tuple[Tensor, Tensor], rows: slice, x: Tensor, offset: int) -> None:
    k = top[0].shape[1]
    values, tokens = x.topk(min(k, x.shape[1]), -1)
    values, tokens = torch.cat([top[0][rows], values], -1), torch.cat([top[1][rows], tokens + offset], -1)
    best = values.topk(k, -1)
    top[0][rows], top[1][rows] = best.values, tokens.gather(-1, best.indices)
