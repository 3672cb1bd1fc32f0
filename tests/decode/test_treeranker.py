"""TreeRanker on models: the greedy completion leads, forwards are few, and the context's tokens are the model's."""

from __future__ import annotations

import pytest
import torch

from tests.decode.tokenizers_at_hand import byte_level
from tests.tiny_models import tiny_gpt2, tiny_llama
from tokenloom.decode.table import TableLM
from tokenloom.decode.treeranker import TreeRanker

COMPLETIONS = [(2, 0), (1, 1, 0), (1, 2, 2), (0, 0), (1, 1, 2), (3, 0)]


def greedy_leaf(model: TableLM, context: tuple[int, ...], completions: list[tuple[int, ...]]) -> tuple[int, ...]:
    path: tuple[int, ...] = ()
    while path not in completions:
        following = sorted({c[len(path)] for c in completions if c[: len(path)] == path})
        law = model.probs((*context, *path))
        path = (*path, max(following, key=lambda t: (float(law[t]), -t)))
    return path


@pytest.mark.parametrize("seed", range(8))
def test_the_greedy_leaf_leads_and_first_tokens_order_the_rest(seed: int) -> None:
    model = TableLM.random(4, seed)
    ranker = TreeRanker(model, None)
    order = ranker.rank_ids([3], COMPLETIONS)
    assert sorted(order) == list(range(len(COMPLETIONS)))
    leaf = greedy_leaf(model, (3,), COMPLETIONS)
    assert COMPLETIONS[order[0]] == leaf
    assert ranker.calls <= max(map(len, COMPLETIONS))
    law = model.probs([3])
    off = [float(law[COMPLETIONS[i][0]]) for i in order if COMPLETIONS[i][0] != leaf[0]]
    assert off == sorted(off, reverse=True)
    # One more that is not on the way changes nothing between the others.
    irrelevant = next(t for t in range(4) if t != leaf[0])
    more = TreeRanker(model, None).rank_ids([3], [*COMPLETIONS, (irrelevant, 3)])
    assert [i for i in more if i < len(COMPLETIONS)] == order


def test_chains_without_a_choice_need_no_forward() -> None:
    model = TableLM.random(4, 0)
    ranker = TreeRanker(model, None)
    assert ranker.rank_ids([3], [(1, 2, 3)]) == [0]
    assert ranker.calls == 0
    law = model.probs([3, 1, 2, 3])
    assert ranker.rank_ids([3], [(1, 2, 3, 0), (1, 2, 3, 1)]) == ([0, 1] if law[0] > law[1] else [1, 0])
    assert ranker.calls == 1


def test_a_completion_may_end_inside_another() -> None:
    model = TableLM(3, lambda prefix: (0.5, 0.2, 0.3) if len(prefix) == 2 else (0.1, 0.8, 0.1))
    # After (1,), token 2 has 0.3 and all others together 0.7.
    assert TreeRanker(model, None).rank_ids([0], [(1, 2), (1,)]) == [1, 0]
    ranker = TreeRanker(model, None)
    ranker._delimiters = [1]  # 0.2 of them is an end
    assert ranker.rank_ids([0], [(1, 2), (1,)]) == [0, 1]


@pytest.mark.parametrize("model", [tiny_llama(), tiny_gpt2()])
def test_models_and_tables_agree(model: torch.nn.Module) -> None:
    def law(prefix: tuple[int, ...]) -> list[float]:
        with torch.no_grad():
            return model(torch.tensor([prefix])).logits[0, -1].double().softmax(-1).tolist()

    table = TableLM(64, law)
    completions = [(5, 6), (5, 7, 8), (5, 7, 9), (10,), (5,), (11, 12), (5, 7, 9, 4)]
    assert TreeRanker(model, None).rank_ids([3, 9], completions) == TreeRanker(table, None).rank_ids(
        [3, 9], completions
    )


def test_texts_are_tokenized_behind_their_context() -> None:
    tokenizer = byte_level()
    model = tiny_llama(vocab=len(tokenizer))
    ranker = TreeRanker(model, tokenizer, delimiters=["\n", " "])
    context = "so the ans"
    texts = ["wer is", "wer and", "xyz"]
    # The context's last tokens are not those of "answer": the walk begins before them.
    assert (
        tokenizer(context)["input_ids"]
        != tokenizer(context + "wer")["input_ids"][: len(tokenizer(context)["input_ids"])]
    )
    whole = [tuple(tokenizer(context + t)["input_ids"]) for t in texts]
    kept = next(i for i in range(99) if len({w[i] for w in [*whole, tuple(tokenizer(context)["input_ids"])]}) > 1)
    expected = TreeRanker(model, tokenizer, delimiters=["\n", " "]).rank_ids(whole[0][:kept], [w[kept:] for w in whole])
    assert ranker.rank(context, texts) == expected


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="at least one completion"):
        TreeRanker(None, byte_level()).rank("a", [])
    with pytest.raises(ValueError, match="delimiter is a text of at least one token"):
        TreeRanker(None, byte_level(), delimiters=[")", ""])
    with pytest.raises(ValueError, match="add a line"):
        TreeRanker(None, byte_level()).rank("", ["a", "b"])
