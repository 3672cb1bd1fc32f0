"""CNTP as a loop: its exact law, plain sampling and greedy as limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.decode.table_runs import Strings, close, loop_law
from tests.tiny_models import TINY
from tokenloom import decode
from tokenloom.decode.cntp import Cntp
from tokenloom.decode.table import TableLM
from tokenloom.methods.decoding.cntp import trials

MARK, END = 1, 2


@pytest.mark.parametrize("eos", [(), (END,)])
def test_without_uncertainty_it_is_plain_sampling(eos: tuple[int, ...]) -> None:
    table = TableLM.random(3, seed=1)
    found = loop_law(lambda: Cntp(marks=[MARK], h_lo=math.inf), table, limit=3, eos=eos)
    close(found, table.string_law([0], 3, eos=eos[0] if eos else None))


def expected_law(table: TableLM, done: tuple[int, ...], limit: int, cap: int | None, **settings: float) -> Strings:
    """By recursion over segments, each the best of independent trials."""
    if len(done) == limit or (done and done[-1] == END):
        return {done: 1.0}
    law = table.probs((0, *done))
    n = int(trials(torch.special.entr(law).sum()[None], **settings)[0])  # type: ignore[arg-type]
    longest = 1 if n == 1 else min(limit - len(done), cap or limit)
    trial_law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(longest):
        grown: dict[tuple[int, ...], float] = {}
        for s, p in trial_law.items():
            if s and s[-1] in (MARK, END):
                grown[s] = p
                continue
            for t, q in enumerate(table.probs((0, *done, *s)).tolist()):
                grown[(*s, t)] = p * q
        trial_law = grown

    def mean(s: tuple[int, ...]) -> float:
        prefixes = [(0, *done, *s[:i]) for i in range(len(s))]
        return sum(math.log(float(table.probs(x)[t])) for x, t in zip(prefixes, s, strict=True)) / len(s)

    total: Strings = {}
    for choice in itertools.product(trial_law, repeat=n):
        mass = math.prod(trial_law[s] for s in choice)
        best = max(choice, key=mean)
        for y, p in expected_law(table, (*done, *best), limit, cap, **settings).items():
            total[y] = total.get(y, 0.0) + mass * p
    return total


@pytest.mark.parametrize("cap", [None, 2])
def test_the_law_is_that_of_the_surest_of_several_trials(cap: int | None) -> None:
    table = TableLM.random(3, seed=5)
    settings = {"n_min": 1, "n_max": 2, "h_lo": 0.1, "h_hi": 0.85}
    found = loop_law(lambda: Cntp(marks=[MARK], cap=cap, **settings), table, limit=3, eos=[END])  # type: ignore[arg-type]
    close(found, expected_law(table, (), 3, cap, **settings))
    counts = {int(trials(torch.special.entr(table.probs([0, *s])).sum()[None], **settings)[0])  # type: ignore[arg-type]
              for s in ((), (0,), (1,), (0, 0), (1, 0), (0, 1), (1, 1))}  # fmt: skip
    assert counts == {1, 2}


class Signs:
    """Every fifth id is a mark with a space before it; 7 is a word with a mark in its middle."""

    def decode(self, ids: list[int]) -> str:
        return "a.b" if ids[0] == 7 else " ." if ids[0] % 5 == 0 else "word"


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_greedy_trials_are_greedy(name: str) -> None:
    model = TINY[name]()
    ids = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
    given = {"attention_mask": (ids != 2).long(), "do_sample": False, "max_new_tokens": 12}
    loop = decode.loop("cntp", tokenizer=Signs(), n_min=4)
    assert torch.equal(model.generate(ids, custom_generate=loop, **given), model.generate(ids, **given))


def test_marks_and_samples_on_a_model() -> None:
    loop = decode.loop("cntp", tokenizer=Signs(), n_min=3, cap=4)
    assert isinstance(loop, Cntp)
    assert [loop._ends(t) for t in (5, 7, 8, 10)] == [True, False, False, True]
    out = TINY["llama"]().generate(torch.tensor([[5, 9]]), do_sample=True, max_new_tokens=12, custom_generate=loop)
    assert out.shape[1] <= 14
    assert loop.last_run is not None
    assert loop.last_run.counts["trials"] >= 9
    with pytest.raises(ValueError, match="give tokenizer"):
        decode.loop("cntp")
    with pytest.raises(ValueError, match="cap = 0"):
        decode.loop("cntp", tokenizer=Signs(), cap=0)
    with pytest.raises(ValueError, match="n_min <= n_max"):
        decode.loop("cntp", tokenizer=Signs(), n_min=11)
