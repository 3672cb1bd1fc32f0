"""The laws of the decoding stages that run by themselves: rules that cut a law off, rules that shape scores.

They speak of parts that need nothing but `probs` (stage truncate) or `scores` (stage shape); what needs more is
tested with its method. A law is waived by a property that the part declares:
"order-dependent": which token has which id matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.catalog import Part
from tokenloom.laws import law

_ROWS, _VOCAB = 6, 40


def _truncates(part: Part) -> bool:
    return part.stage == "truncate" and _required(part) == ["probs"]


def _shapes(part: Part) -> bool:
    return part.stage == "shape" and _required(part) == ["scores"]


def _required(part: Part) -> list[str]:
    return [name for name, needed in part.inputs.items() if needed]


def _scores(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Logits from nearly flat to nearly certain, one row with most tokens impossible, without ties."""
    g = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0.1, 6.0, _ROWS, dtype=torch.float64)[:, None]
    scores = torch.randn(_ROWS, _VOCAB, generator=g, dtype=torch.float64) * sharpness
    scores[2, 5:] = -torch.inf
    return scores.to(dtype)


def _probs(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return _scores(dtype, seed).softmax(-1)


@law(_truncates)
def _keeps_at_least_one_token_of_every_row(part: Part) -> None:
    for dtype in (torch.float64, torch.float32):
        for probs in (_probs(dtype), torch.full((2, 1), 1.0, dtype=dtype), torch.full((1, 7), 1 / 7, dtype=dtype)):
            keep = part.function(probs)
            assert keep.dtype == torch.bool, f"{part.name}: keep must be bool, got {keep.dtype}"
            assert keep.shape == probs.shape, f"{part.name}: shape {tuple(keep.shape)}, expected {tuple(probs.shape)}"
            assert bool(keep.any(-1).all()), f"{part.name}: a row was left without tokens"
            assert bool((probs * keep).sum(-1).gt(0).all()), f"{part.name}: a row was left without mass"


@law(_shapes)
def _scores_keep_their_shape_and_format(part: Part) -> None:
    for dtype in (torch.float64, torch.float32):
        shaped = part.function(_scores(dtype))
        assert shaped.shape == (_ROWS, _VOCAB), f"{part.name}: shape {tuple(shaped.shape)}"
        assert shaped.dtype == dtype, f"{part.name}: dtype {shaped.dtype} for {dtype} scores"
        assert not bool(shaped.isnan().any()), f"{part.name}: scores that are not numbers"


@law(lambda p: _truncates(p) or _shapes(p))
def _rows_do_not_see_each_other(part: Part) -> None:
    given = _probs() if part.stage == "truncate" else _scores()
    together = part.function(given)
    apart = torch.cat([part.function(row[None]) for row in given])
    assert torch.equal(together, apart), f"{part.name}: a row's result depends on its neighbors"


@law(lambda p: (_truncates(p) or _shapes(p)) and "order-dependent" not in p.properties)
def _names_of_tokens_do_not_matter(part: Part) -> None:
    given = _probs() if part.stage == "truncate" else _scores()
    order = torch.randperm(_VOCAB, generator=torch.Generator().manual_seed(1))
    renamed = part.function(given[:, order])
    original = part.function(given)[:, order]
    equal = torch.equal(renamed, original) if part.stage == "truncate" else torch.allclose(renamed, original)
    assert equal, f"{part.name}: other token ids gave another result"


@law(lambda p: _truncates(p) or _shapes(p))
def _what_is_given_stays_as_it_was(part: Part) -> None:
    given = _probs() if part.stage == "truncate" else _scores()
    before = given.clone()
    part.function(given)
    assert torch.equal(given, before), f"{part.name}: wrote into its input"


@law(_truncates)
def _half_precision_rows_are_cut_too(part: Part) -> None:
    keep = part.function(_scores(torch.float32).softmax(-1).to(torch.bfloat16))
    assert bool(keep.any(-1).all()), f"{part.name}: a row in bfloat16 was left without tokens"
