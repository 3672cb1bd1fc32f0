"""Mapping functions over chunks of rows under recomputation, and running registered chunk signals so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokenloom.signals import ChunkSignal


def map_chunks(function: Callable[..., list[Tensor]], inputs: Sequence[Tensor], chunk_rows: int) -> list[Tensor]:
    """Apply `function` to chunks of `chunk_rows` rows of all `inputs` and join each of its results.

    With gradients on, what `function` computes inside is not kept but recomputed in the backward.
    It is called once, on zero rows, when there are none.
    """
    n = inputs[0].shape[0]
    pieces: list[list[Tensor]] = []
    for start in range(0, max(n, 1), chunk_rows):
        cut = [x[start : start + chunk_rows] for x in inputs]
        if torch.is_grad_enabled():
            pieces.append(checkpoint(function, *cut, use_reentrant=False))
        else:
            pieces.append(function(*cut))
    return [torch.cat(column) for column in zip(*pieces, strict=True)]


def run_chunk_signals(
    signals: Sequence[ChunkSignal],
    hidden: Tensor,
    targets: Tensor,
    *,
    logits: Callable[[Tensor], Tensor],
    ref_hidden: Tensor | None,
    ref_logits: Callable[[Tensor], Tensor] | None,
    given: Mapping[str, Tensor],
    chunk_rows: int,
) -> dict[str, Tensor]:
    """Every signal's values [N] or [N, K] over `hidden` [N, D] and `targets` [N].

    Logits are computed once a chunk, whatever the number of signals. `logits` and `ref_logits` turn
    hidden rows into [n, V]. The reference carries no gradient. `given` holds the signals [N] or [N, K] that
    some take as inputs.

    Raises:
        ValueError: when a signal returns something that has not one entry per token.
    """
    inputs = {name for s in signals for name in s.inputs}

    held = [n for n in given if n in inputs]

    def rows(hidden: Tensor, targets: Tensor, *rest: Tensor) -> list[Tensor]:
        values = {"hidden": hidden, "targets": targets} | dict(zip(held, rest, strict=False))
        if "logits" in inputs:
            values["logits"] = logits(hidden)
        if ref_hidden is not None and ref_logits is not None:
            with torch.no_grad():
                values["ref_logits"] = ref_logits(rest[-1])
        return [_checked(s, s.function(*(values[name] for name in s.inputs)), targets) for s in signals]

    reference = () if ref_hidden is None else (ref_hidden,)
    results = map_chunks(rows, (hidden, targets, *(given[n] for n in held), *reference), chunk_rows)
    return {s.name: value for s, value in zip(signals, results, strict=True)}


def _checked(signal: ChunkSignal, value: Tensor, targets: Tensor) -> Tensor:
    n = targets.shape[0]
    if value.ndim not in (1, 2) or value.shape[0] != n:
        raise ValueError(
            f"chunk signal {signal.name!r} returned shape {tuple(value.shape)} for {n} tokens; "
            "it must return [N] or [N, K]: reduce over the vocabulary inside the function"
        )
    return value
