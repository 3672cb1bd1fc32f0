"""TreeBoN as a loop: best-of-N as limits, no bias without a preference, rewards as recomputed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.decode.table_runs import close, loop_law
from tests.tiny_models import tiny_llama
from tokenloom import decode
from tokenloom.decode import tree_bon
from tokenloom.decode.run import Run
from tokenloom.decode.segment_search import Hypothesis
from tokenloom.decode.table import TableLM
from tokenloom.decode.tree_bon import TreeBoN
from tokenloom.draw import RandomDraw
from tokenloom.methods.decoding.best_of_n import best_of_n_law
from tokenloom.methods.decoding.tree_bon import implicit_reward

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])


def reward(prompt_ids: list[int], ids: list[int]) -> float:
    return float(sum(3**i * t for i, t in enumerate(ids)))


@pytest.mark.parametrize("settings", [{"layers": 1, "children": 2}, {"layers": 2, "children": 1}])
def test_one_layer_or_one_child_is_best_of_n(settings: dict[str, int]) -> None:
    table, other = TableLM.random(3, seed=1), TableLM.random(3, seed=2)
    law = table.string_law([0], 2, eos=2)
    p = torch.tensor(list(law.values()), dtype=torch.float64)
    expected = best_of_n_law(p, torch.tensor([reward([0], list(y)) for y in law]), n=2)
    found = loop_law(lambda: TreeBoN(other, reward, n=2, **settings), table, limit=2, eos=[2])
    close(found, dict(zip(law, expected.tolist(), strict=True)))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_without_a_preference_the_law_is_the_models(layers: int) -> None:
    table = TableLM.random(2, seed=5)
    found = loop_law(lambda: TreeBoN(table, n=2, children=2, layers=layers), table, limit=3, eos=[1])
    close(found, table.string_law([0], 3, eos=1))


def test_the_tree_by_hand() -> None:
    """Two roots of one token, the better one branches in two; the reward takes a leaf."""
    table, aligned = TableLM.random(3, seed=8), TableLM.random(3, seed=9)
    gain = (aligned.probs([0]).log() - table.probs([0]).log()).tolist()
    p = table.probs([0]).tolist()
    expected: dict[tuple[int, ...], float] = {}
    for a in range(3):
        for b in range(3):
            parent = b if gain[b] > gain[a] else a
            if parent == 2:  # ended
                expected[(2,)] = expected.get((2,), 0.0) + p[a] * p[b]
                continue
            q = table.probs([0, parent]).tolist()
            for c in range(3):
                for d in range(3):
                    leaf = (parent, max(c, d))
                    expected[leaf] = expected.get(leaf, 0.0) + p[a] * p[b] * q[c] * q[d]
    found = loop_law(lambda: TreeBoN(aligned, reward, n=2, children=2, layers=2), table, limit=2, eos=[2])
    close(found, expected)


@pytest.mark.parametrize("chunk", [2, 32])
def test_rewards_are_the_weighted_log_ratios_of_the_two_models(chunk: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(tree_bon, "_CHUNK", chunk)
    model, aligned = tiny_llama(vocab=16), tiny_llama(vocab=16, seed=1)
    checked = []

    class Checked(TreeBoN):
        def answer(self, run: Run, pool: list[Hypothesis]) -> Hypothesis:
            for h in pool:
                ids = torch.tensor([[*run.prompts[h.row], *h.tokens]])
                taken = []
                for m in (aligned, model):
                    with torch.no_grad():
                        laws = m(input_ids=ids).logits[0, -len(h.tokens) - 1 : -1].log_softmax(-1)
                    taken.append(laws.gather(1, ids[0, -len(h.tokens) :, None])[:, 0])
                assert h.score == pytest.approx(float(implicit_reward(*taken)), abs=2e-4)
                checked.append(len(h.tokens))
            best = super().answer(run, pool)
            assert best.score == max(h.score for h in pool)
            return best

    loop = Checked(aligned, n=8, children=2, layers=3)
    loop.draw = RandomDraw(torch.Generator().manual_seed(0))
    ids = IDS.clamp(max=15)
    model.generate(ids, attention_mask=(ids != 2).long(), do_sample=True, max_new_tokens=10, custom_generate=loop)
    assert len(checked) >= 12
    assert min(checked) < 10 == max(checked)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="multiple of"):
        decode.loop("tree-bon", aligned=tiny_llama(), n=6, children=4)
    with pytest.raises(ValueError, match="layers = 0"):
        decode.loop("tree-bon", aligned=tiny_llama(), layers=0)
    with pytest.raises(ValueError, match="needs aligned"):
        decode.loop("tree-bon")
    loop = decode.loop("tree-bon", aligned=tiny_llama(vocab=40), n=2, children=2)
    with pytest.raises(ValueError, match="same tokenizer"):
        tiny_llama().generate(torch.tensor([[5]]), do_sample=True, max_new_tokens=4, custom_generate=loop)
