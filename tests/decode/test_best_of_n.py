"""Best-of-N as a loop has the exact law of the best of N."""

from __future__ import annotations

import pytest
import torch

from tests.decode.table_runs import close, loop_law, table_run
from tests.tiny_models import tiny_llama
from tokenloom import decode
from tokenloom.decode.best_of_n import BestOfN
from tokenloom.decode.table import TableLM
from tokenloom.draw import law_of
from tokenloom.methods.decoding.best_of_n import best_of_n_law


def reward(prompt_ids: list[int], ids: list[int]) -> float:
    """No two equal but (2,) and (0, 2)."""
    return 4.0 if ids in ([2], [0, 2]) else float(sum(3**i * t for i, t in enumerate(ids)) + len(prompt_ids))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_law_is_exact(n: int) -> None:
    table = TableLM.random(3, seed=n)
    law = table.string_law([0], 2, eos=2)
    strings = list(law)
    expected = best_of_n_law(
        torch.tensor([law[y] for y in strings]).double(), torch.tensor([reward([0], list(y)) for y in strings]), n=n
    )
    found = loop_law(lambda: BestOfN(reward, n=n), table, limit=2, eos=[2])
    close(found, dict(zip(strings, expected.tolist(), strict=True)), 1e-7)


def test_rows_of_a_batch_are_independent() -> None:
    table = TableLM.random(2, seed=4)
    alone = [loop_law(lambda: BestOfN(reward, n=2), table, prompt, limit=1) for prompt in ([0], [1, 1])]
    both = law_of(
        lambda draw: tuple(map(tuple, BestOfN(reward, n=2).rows(table_run(table, [(0,), (1, 1)], limit=1, draw=draw))))
    )
    expected = {(a, b): p * q for a, p in alone[0].items() for b, q in alone[1].items()}
    close(both, expected)  # type: ignore[arg-type]


def test_on_a_model() -> None:
    loop = decode.loop("best-of-n", reward=lambda prompt_ids, ids: -len(ids), n=8)
    ids = torch.tensor([[2, 5, 9], [7, 7, 9]])
    mask = (ids != 2).long()
    out = tiny_llama(vocab=8).generate(torch.where(ids > 7, 6, ids), attention_mask=mask, do_sample=True,
                                       max_new_tokens=20, custom_generate=loop)  # fmt: skip
    assert out.shape[1] < 23
    assert loop.last_run is not None
    assert loop.last_run.counts["rewarded"] == 16
    with pytest.raises(ValueError, match="n = 0"):
        decode.loop("best-of-n", reward=reward, n=0)
    with pytest.raises(ValueError, match="needs reward"):
        decode.loop("best-of-n")
