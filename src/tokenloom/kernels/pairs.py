"""From gradients of log-probs and entropies to gradients of logits, for the rows that have any.

With g_t the gradients of a row's log-probs, h that of its entropy H and p its softmax, the loss's gradient with
respect to logit v is

[v among the t] g_v + p_v (a + b log p_v),        a = -sum_t g_t - h H,        b = -h
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenloom.kernels.chunked import RowGradients
from tokenloom.kernels.logit_form import LogitForm


class Pairs(NamedTuple):
    """Log-probs [n] of `tokens` [n] at `rows` [n], and the gradients of the loss with respect to them."""

    rows: Tensor
    tokens: Tensor
    logprobs: Tensor
    grads: Tensor

    def joined(self, other: Pairs) -> Pairs:
        """Both sets of pairs."""
        return Pairs(*(torch.cat(both) for both in zip(self, other, strict=True)))

    def distinct(self, vocabulary: int) -> Pairs:
        """Each (row, token) once; gradients of repeated pairs are added up."""
        key, first = torch.unique(self.rows * vocabulary + self.tokens, return_inverse=True)
        logprobs = self.logprobs.new_empty(len(key)).index_copy_(0, first, self.logprobs)
        grads = self.grads.new_zeros(len(key)).index_add_(0, first, self.grads)
        return Pairs(key // vocabulary, key % vocabulary, logprobs, grads)

    def of_products(self, of: RowGradients, form: LogitForm) -> Tensor:
        """The whole gradients [n] at these (distinct) pairs, on to the products of hidden states and vocabulary."""
        a = of.a[self.rows]
        # g + a p without cancellation for p near 1, where g is close to -a.
        found = (self.grads + a) + a * torch.expm1(self.logprobs)
        if of.b is not None:
            found = found - of.b[self.rows] * torch.special.entr(self.logprobs.exp())
        if form.softcap is not None:
            found = found * form.slope(self.logprobs + of.log_norm[self.rows])
        return found * form.factor


def live_rows(
    pairs: Pairs, of_entropy: Tensor | None, log_norm: Tensor, entropies: Tensor, vocabulary: int
) -> tuple[Tensor, RowGradients, Pairs]:
    """Which rows [m] have a gradient, their gradients, and the distinct pairs with one, counted among these rows.

    Tokens that the clip or the mask silenced need no logits again: a row of which nothing is live is left out.
    `of_entropy`, `log_norm` and `entropies` are [M]; `of_entropy` is None when no entropy takes part.
    """
    kept = pairs.grads.nonzero()[:, 0]
    pairs = Pairs(*(x[kept] for x in pairs))
    live = torch.zeros_like(log_norm, dtype=torch.bool).index_fill_(0, pairs.rows, True)
    a = -torch.zeros_like(log_norm).index_add_(0, pairs.rows, pairs.grads)
    if of_entropy is not None:
        live |= of_entropy != 0
        a -= of_entropy * entropies
    index = live.nonzero()[:, 0]
    of = RowGradients(log_norm[index], a[index], None if of_entropy is None else -of_entropy[index])
    place = (torch.cumsum(live, 0) - 1)[pairs.rows]
    return index, of, pairs._replace(rows=place).distinct(vocabulary)
