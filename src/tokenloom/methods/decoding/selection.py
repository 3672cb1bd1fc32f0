"""What rules that go by the order of tokens share: the sets that a sort of the vocabulary gives, in less time.

`largest`: a row's k largest values stand in those k blocks of it that have the largest maxima.
`last_kept`: in an order of tokens by `keys`, those are kept that have more than `bar` of the mass from themselves on to
the end. Masses are added up by the leading bits of the keys first, of which there are few; then only the tokens that
share these bits with the last one kept need sorting.

Letters: B rows, V vocabulary, k values.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 64
_SORTED = 4096
"""Vocabularies up to this size are sorted, and all on devices other than the CPU, where waiting costs more."""
_BITS = 0x7FFF


def largest(values: Tensor, k: int) -> Tensor:
    """The k <= V largest values [B, k] of each row of `values` [B, V], in descending order; nan is above all."""
    count = values.shape[1] // _BLOCK
    if 4 * k > count:
        return values.topk(k).values
    # Blocks are interleaved, so that their maxima are one maximum of long vectors.
    blocks = values[:, : count * _BLOCK].reshape(len(values), _BLOCK, count)
    best = blocks.amax(1).topk(k).indices
    found = blocks.gather(2, best[:, None].expand(-1, _BLOCK, -1)).flatten(1)
    rest = values[:, count * _BLOCK :]
    return (torch.cat((found, rest), 1) if rest.shape[1] else found).topk(k).values


def keep_largest(values: Tensor, found: Tensor, count: Tensor) -> Tensor:
    """Keep [B, V] of the `count` [B, 1] largest of `values` [B, V], equals in the order of their ids.

    `found` [B, k] are the k largest; count is below k, or k is V.
    """
    k = found.shape[1]
    least = found.gather(-1, count - 1)
    tied = (found.gather(-1, count.clamp(max=k - 1)) == least) & (count < k)
    if not bool(tied.any()):
        return keep_down_to(values, least)
    kept = ((found == least) & (torch.arange(k, device=found.device) < count)).sum(-1, keepdim=True)
    return keep_down_to(values, least, (values == least).sum(-1, keepdim=True) - kept)


def keep_down_to(values: Tensor, least: Tensor, without: Tensor | None = None) -> Tensor:
    """Keep [B, V] of `values` [B, V] from `least` [B, 1] up, without the last `without` [B, 1] that equal it.

    A row of nan keeps its first token.
    """
    keep = values >= least
    keep[:, :1] |= least.isnan()
    if without is not None:
        for row in without[:, 0].nonzero()[:, 0].tolist():
            equal = (values[row] == least[row]).nonzero()[:, 0]
            keep[row, equal[-int(without[row]) :]] = False
    return keep


def last_kept(keys: Tensor, masses: Tensor, bar: float, *, descending: bool) -> tuple[Tensor, Tensor]:
    """The key [B, 1] of the last token kept, and how many [B, 1] of the tokens with this very key are not.

    `keys` [B, V] >= 0 in float32 or float64, `masses` [B, V]. The first token is kept in any case.
    """
    keys, masses = keys.detach(), masses.detach()
    if not len(keys) or keys.shape[1] <= _SORTED or keys.device.type != "cpu":
        return _by_sorting(keys, masses, 0.0, bar, descending=descending)
    rows = [_by_leading_bits(k, m, bar, descending=descending) for k, m in zip(keys, masses, strict=True)]
    return torch.cat([least for least, _ in rows]), torch.cat([without for _, without in rows])


def _by_leading_bits(keys: Tensor, masses: Tensor, bar: float, *, descending: bool) -> tuple[Tensor, Tensor]:
    """As `last_kept`, for one row [V]."""
    # The bits of floating-point numbers above 0 have the order of the numbers; nan may have a sign.
    integers, width = (torch.int32, 32) if keys.dtype == torch.float32 else (torch.int64, 64)
    leading = (keys.view(integers) >> (width - 16)).bitwise_and_(_BITS)
    if not descending:
        leading = _BITS - leading
    behind = torch.bincount(leading, weights=masses.double()).cumsum(0)
    at = min(int((behind.to(keys.dtype) <= bar).sum()), len(behind) - 1)
    alike = (leading == at).nonzero()[:, 0]
    below = float(behind[at - 1]) if at else 0.0
    return _by_sorting(keys[alike][None], masses[alike][None].double(), below, bar, descending=descending)


def _by_sorting(keys: Tensor, masses: Tensor, below: float, bar: float, *, descending: bool) -> tuple[Tensor, Tensor]:
    """As `last_kept`, with the mass `below` behind the last of the tokens."""
    inward, order = keys.sort(descending=not descending)
    # Summed up from the end: the small masses come first and none is lost in rounding.
    passed = (below + masses.gather(-1, order).cumsum(-1)).to(keys.dtype) > bar
    passed[:, -1] = True
    at = passed.shape[1] - passed.sum(-1, keepdim=True)
    least = inward.gather(-1, at)
    place = torch.arange(passed.shape[1], device=keys.device)
    return least, ((inward == least) & (place < at)).sum(-1, keepdim=True)
