"""Pruned self-consistency: a plain vote without pruning, fewer tokens with it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from tests.decode.table_runs import Strings, close, loop_law
from tests.tiny_models import tiny_llama
from tokenloom import decode
from tokenloom.decode.set_cover_pruning import SetCoverPruning
from tokenloom.decode.table import TableLM
from tokenloom.draw import RandomDraw
from tokenloom.methods.decoding.self_consistency import majority


def last(ids: list[int]) -> int | None:
    return None if ids[-1] == 0 else ids[-1]


def test_without_pruning_it_is_self_consistency() -> None:
    table = TableLM.random(3, seed=1)
    law = table.string_law([0], 2, eos=2)
    expected: Strings = {}
    for voters in itertools.product(law, repeat=3):
        won = voters[majority([last(list(y)) for y in voters])]
        expected[won] = expected.get(won, 0.0) + math.prod(law[y] for y in voters)
    close(loop_law(lambda: SetCoverPruning(last, n=3, every=99), table, limit=2, eos=[2]), expected)


def test_the_law_with_pruning() -> None:
    table = TableLM.random(3, seed=2)
    p = table.probs([0]).tolist()
    expected: Strings = {}
    for a, b in itertools.product(range(3), repeat=2):
        # Two that differ are both needed; of two that go on alike the first; what has ended is kept.
        kept = [a] if a == b != 2 else [a, b]
        ways = [[(2,)] if t == 2 else [(t, u) for u in range(3)] for t in kept]
        for pool in itertools.product(*ways):
            mass = p[a] * p[b]
            for y in pool:
                mass *= float(table.probs((0, y[0]))[y[1]]) if len(y) == 2 else 1.0
            won = pool[majority([last(list(y)) for y in pool])]
            expected[won] = expected.get(won, 0.0) + mass
    found = loop_law(lambda: SetCoverPruning(last, n=2, every=1, coverage=1.0), table, limit=2, eos=[2])
    close(found, expected)


def test_pruning_saves_tokens_on_a_model() -> None:
    model = tiny_llama(vocab=16)
    ids = torch.tensor([[5, 9, 4], [7, 7, 9]])
    used = []
    for coverage in (1.0, 0.3):
        loop = decode.loop("set-cover-pruning", n=8, every=4, coverage=coverage)
        loop.draw = RandomDraw(torch.Generator().manual_seed(0))
        out = model.generate(ids, do_sample=True, max_new_tokens=16, eos_token_id=None, custom_generate=loop)
        assert out.shape == (2, 19)
        assert loop.last_run is not None
        used.append(loop.last_run.counts)
    assert used[1]["pruned"] > used[0]["pruned"]
    assert used[1]["candidates"] < used[0]["candidates"]


def test_answers_from_text() -> None:
    class Letters:
        def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
            return "".join("ab."[i] for i in ids)

    table = TableLM(3, lambda prefix: [0.5, 0.5, 0.0])
    law = loop_law(lambda: SetCoverPruning(lambda text: text[-1], Letters(), n=1), table, limit=1)
    close(law, {(0,): 0.5, (1,): 0.5})
    for settings in ({"n": 0}, {"every": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            SetCoverPruning(**settings)
    with pytest.raises(ValueError, match="share in"):
        decode.loop("set-cover-pruning", coverage=2.0)
