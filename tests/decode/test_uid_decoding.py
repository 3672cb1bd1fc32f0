"""UID decoding: the exact maximum with enough beams, greedy and most probable strings as limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.decode.table_runs import table_run
from tests.tiny_models import TINY
from tokenloom import decode
from tokenloom.decode.table import TableLM
from tokenloom.decode.uid_decoding import UidDecoding
from tokenloom.methods.decoding.uid_decoding import objective

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
GIVEN: dict[str, Any] = {"attention_mask": (IDS != 2).long(), "do_sample": False, "max_new_tokens": 8}


@pytest.mark.parametrize("regularizer", ["greedy", "variance", "local-variance", "max", "square"])
@pytest.mark.parametrize("normalized", [0.0, 1.0])
def test_enough_beams_find_the_exact_maximum(regularizer: Any, normalized: float) -> None:
    for seed in range(4):
        table, lam = TableLM.random(3, seed=seed), 0.8

        def value(y: tuple[int, ...], table: TableLM = table, lam: float = lam) -> float:
            laws = [table.probs((0, *y[:i])).log() for i in range(len(y))]
            u = torch.stack([-law[t] for law, t in zip(laws, y, strict=True)])
            least = torch.stack([-law.max() for law in laws])
            return float(objective(u, least, regularizer=regularizer, lam=lam)) / len(y) ** normalized

        law = table.string_law([0], 3, eos=1)
        best = max(law, key=value)
        loop = UidDecoding(regularizer=regularizer, lam=lam, beams=27, length_penalty=normalized)
        assert tuple(loop.rows(table_run(table, limit=3, eos=[1], sample=False))[0]) == best
        assert loop.scores[0] == pytest.approx(value(best), abs=1e-9)


def test_a_regularizer_that_falls_again_is_waited_for() -> None:
    """Two texts end at once, better than the running one, which is the best once a second token evens it out."""
    steps = {1: [0.34, 0.36, 0.30], 2: [0.4, 0.3, 0.3]}
    table = TableLM(3, lambda prefix: steps[len(prefix)])
    found = []
    for early_stopping in (False, "never", True):
        loop = UidDecoding(regularizer="local-variance", lam=5.0, beams=2, early_stopping=early_stopping)  # type: ignore[arg-type]
        found += loop.rows(table_run(table, limit=2, eos=[0, 1], sample=False))
        one, two, then = (-math.log(p) for p in (0.36, 0.30, 0.40))
        evened = -two - then - 5 * (two**2 + (then - two) ** 2) / 2
        assert loop.scores[0] == pytest.approx(-one - 5 * one**2 if early_stopping is True else evened, abs=1e-9)
    assert found == [[2, 0], [2, 0], [1]]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_heavy_greedy_regularizer_is_greedy_search(name: str) -> None:
    model = TINY[name]()
    loop = decode.loop("uid-decoding", regularizer="greedy", lam=1e6, beams=3)
    assert torch.equal(model.generate(IDS, custom_generate=loop, **GIVEN), model.generate(IDS, **GIVEN))


def test_no_regularizer_is_beam_search() -> None:
    model = TINY["llama"]()
    plain = decode.loop("beam-search", beams=3, length_penalty=0.0, early_stopping="never", returned=2)
    for regularizer in ("variance", "max"):
        loop = decode.loop("uid-decoding", regularizer=regularizer, lam=0.0, beams=3, returned=2)
        assert torch.equal(
            model.generate(IDS, custom_generate=loop, **GIVEN), model.generate(IDS, custom_generate=plain, **GIVEN)
        )
        assert loop.scores == pytest.approx(plain.scores, abs=1e-4)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="one of greedy, variance"):
        decode.loop("uid-decoding", regularizer="entropy")
    for lam in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="uneven"):
            decode.loop("uid-decoding", lam=lam)
    with pytest.raises(ValueError, match="uid-decoding: needs 1 <= returned"):
        decode.loop("uid-decoding", beams=0)
