"""Runs of loops over tables of probabilities, and the exact law of what they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokenloom.decode.run import Loop, Run
from tokenloom.decode.table import TableLM
from tokenloom.draw import Draw, RandomDraw, law_of

Strings = dict[tuple[int, ...], float]


def table_run(
    table: TableLM,
    prompts: Sequence[Sequence[int]] = ((0,),),
    *,
    limit: int = 3,
    eos: Sequence[int] = (),
    sample: bool = True,
    draw: Draw | None = None,
    processors: Sequence[Any] = (),
) -> Run:
    """What a loop would be handed by `generate`; prompts padded on the left with 0."""
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[*([0] * (longest - len(p))), *p] for p in prompts])
    return Run(
        model=table,
        input_ids=ids,
        prompts=[list(p) for p in prompts],
        limit=limit,
        eos=frozenset(eos),
        pad=0,
        sample=sample,
        draw=draw or RandomDraw(torch.Generator().manual_seed(0)),
        processors=processors,
    )


def loop_law(make: Callable[[], Loop], table: TableLM, prompt: Sequence[int] = (0,), **settings: Any) -> Strings:
    """The exact law of what a loop gives for one prompt."""
    return law_of(lambda draw: tuple(make().rows(table_run(table, [prompt], draw=draw, **settings))[0]))


def close(found: Strings, expected: Strings, tolerance: float = 1e-9) -> None:
    """Equal laws."""
    for key in found.keys() | expected.keys():
        assert abs(found.get(key, 0.0) - expected.get(key, 0.0)) < tolerance, (key, found.get(key), expected.get(key))
