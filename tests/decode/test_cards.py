"""CARDS as a loop: plain sampling and rejection sampling as limits, segments, the limit of tries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.decode.table_runs import close, loop_law, table_run
from tests.tiny_models import tiny_llama
from tokenloom import decode
from tokenloom.decode.cards import Cards
from tokenloom.decode.table import TableLM
from tokenloom.draw import RandomDraw
from tokenloom.methods.decoding.best_of_n import best_of_n_law


def reward(prompt_ids: list[int], ids: list[int]) -> float:
    return 0.7 * ids.count(1) + 0.4 * len(ids) - 0.9 * (ids[:1] == [0])


@pytest.mark.parametrize("settings", [{"target": 0.0}, {"beta": 1e13, "target": 50.0, "max_tries": 2}])
@pytest.mark.parametrize("entropy", [0.0, 0.6, 9.0])
def test_what_is_always_accepted_is_plain_sampling(settings: Any, entropy: float) -> None:
    def make() -> Cards:
        return Cards(lambda prompt_ids, ids: 9.0, min_segment=1, max_segment=2, entropy_threshold=entropy, **settings)

    table = TableLM.random(2, seed=3)
    limit = 3 if settings["target"] == 0 else 2
    close(loop_law(make, table, limit=limit, eos=[1]), table.string_law([0], limit, eos=1), 1e-8)


@pytest.mark.parametrize("tries", [1, 2, 3])
def test_whole_answers_are_rejection_sampling(tries: int) -> None:
    """After `tries` rejections the best seen: both parts of the law in closed form."""
    table = TableLM.random(2, seed=7)
    law = table.string_law([0], 2, eos=1)
    strings = list(law)
    p = torch.tensor([law[y] for y in strings], dtype=torch.float64)
    r = torch.tensor([reward([0], list(y)) for y in strings], dtype=torch.float64)
    target, beta = 1.0, 0.5
    a = ((r - target) / beta).exp().clamp(max=1)
    refused = float((p * (1 - a)).sum())
    expected = p * a * sum(refused**i for i in range(tries))
    expected += refused**tries * best_of_n_law(p * (1 - a) / refused, r, n=tries)

    def make() -> Cards:
        return Cards(
            reward, target=target, alpha=1.0, beta=beta, min_segment=9, max_segment=9, entropy_threshold=math.inf,
            max_tries=tries,
        )  # fmt: skip

    found = loop_law(make, table, limit=2, eos=[1])
    close(found, dict(zip(strings, expected.tolist(), strict=True)))
    # What is accepted alone has the law p exp((r - target) / beta), cut at the target, up to its constant.
    accepted = p * a * sum(refused**i for i in range(tries))
    torch.testing.assert_close(accepted / accepted.sum(), p * a / (p * a).sum(), rtol=0, atol=1e-12)


def test_segments_end_by_entropy_by_length_and_by_the_budget() -> None:
    even = TableLM(4, lambda prefix: [0.25] * 4 if len(prefix) % 3 == 0 else [0.97, 0.01, 0.01, 0.01])
    for settings, expected in (
        ({"entropy_threshold": 1.0, "min_segment": 1}, [0, 2, 5, 8, 10]),  # lengths 3, 6, 9 with the prompt's token
        ({"entropy_threshold": 1.0}, [0, 5, 10]),  # four tokens at least: 2 comes too early, 8 has only 3
        ({"entropy_threshold": 2.0, "max_segment": 4}, [0, 4, 8, 10]),
        ({"entropy_threshold": 0.0}, [0, 4, 8, 10]),
    ):
        seen: list[int] = []

        def note(prompt_ids: list[int], ids: list[int], seen: list[int] = seen) -> float:
            seen.append(len(ids))
            return 100.0

        Cards(note, **settings).rows(table_run(even, limit=10))  # type: ignore[arg-type]
        assert seen == expected


def test_rejected_segments_go_back_to_where_they_began() -> None:
    """On a model, with rows that are refused at different times: accepted prefixes stay, the limit holds."""
    model = tiny_llama()
    ids = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
    prefixes: list[tuple[int, ...]] = []

    def even(prompt_ids: list[int], ids: list[int]) -> float:
        prefixes.append(tuple(ids))
        return -float(sum(t % 2 for t in ids))

    loop = decode.loop("cards", reward=even, target=0.0, accept="hard", min_segment=2, max_segment=3, max_tries=200,
                       entropy_threshold=3.9)  # fmt: skip
    loop.draw = RandomDraw(torch.Generator().manual_seed(0))
    out = model.generate(ids, attention_mask=(ids != 2).long(), do_sample=True, max_new_tokens=8, eos_token_id=None,
                         custom_generate=loop)  # fmt: skip
    assert (out[:, 5:] % 2 == 0).all()
    assert loop.last_run is not None
    assert loop.last_run.counts["rejected"] > 10
    assert all(not any(t % 2 for t in p[:-3]) for p in prefixes)


def test_greedy_is_greedy_and_mistakes_are_named() -> None:
    model, ids = tiny_llama(), torch.tensor([[5, 9]])
    given = {"do_sample": False, "max_new_tokens": 9}
    loop = decode.loop("cards", reward=lambda prompt_ids, ids: -1e9)
    assert torch.equal(model.generate(ids, custom_generate=loop, **given), model.generate(ids, **given))
    for settings, match in (
        ({"min_segment": 9, "max_segment": 8}, "min_segment <= max_segment"),
        ({"max_tries": 0}, "max_tries"),
        ({"accept": "maybe"}, "one of soft, hard"),
        ({"beta": 0.0}, "beta"),
        ({"alpha": 2.0}, "alpha"),
    ):
        with pytest.raises(ValueError, match=match):
            decode.loop("cards", reward=reward, **settings)
