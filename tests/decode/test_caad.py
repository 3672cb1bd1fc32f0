"""CAAD: stores of contexts and scores, and the processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_gemma2, tiny_llama
from tokenloom.decode import shaper
from tokenloom.decode.caad import ContextStore

EXAMPLES = [([5, 9, 4], [7, 11]), ([8], [3, 6, 12])]
# Sums of 16 to 64 terms of size up to 10 in another order, float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma2])
def test_a_store_holds_hidden_states_and_scores_before_each_answer_token(build: object) -> None:
    model = build()  # type: ignore[operator]
    store = ContextStore.build(model, EXAMPLES)
    prefixes = [[5, 9, 4], [5, 9, 4, 7], [8], [8, 3], [8, 3, 6]]
    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor([p]), output_hidden_states=True) for p in prefixes]
    torch.testing.assert_close(store.keys, torch.stack([o.hidden_states[-1][0, -1] for o in outputs]), **CLOSE)
    torch.testing.assert_close(store.values, torch.stack([o.logits[0, -1] for o in outputs]), **CLOSE)


def test_gold_tokens_reach_the_highest_score() -> None:
    store, plain = (ContextStore.build(tiny_llama(), EXAMPLES, gold=gold) for gold in (True, False))
    gold = torch.tensor([7, 11, 3, 6, 12])
    assert torch.equal(store.values[torch.arange(5), gold], plain.values.amax(-1))
    assert int((store.values != plain.values).sum()) <= 5


def test_known_contexts_decide_and_padding_changes_nothing() -> None:
    model = tiny_llama()
    store = ContextStore.build(model, EXAMPLES)
    store.values = torch.nn.functional.one_hot(torch.tensor([7, 11, 3, 6, 12]), 64).float()
    ids = torch.tensor([[5, 9, 4], [2, 2, 8]])
    strong = shaper("caad", model=model, store=store, alpha=1e6, top_n=1)
    out = model.generate(
        ids, attention_mask=(ids != 2).long(), do_sample=False, max_new_tokens=2, logits_processor=[strong]
    )
    assert out[:, 3:].tolist() == [[7, 11], [3, 6]]


def test_an_embedding_of_ones_own_sees_the_texts(tmp_path: Path) -> None:
    model, seen = tiny_llama(), []

    def embed(texts: list[list[int]]) -> torch.Tensor:
        seen.extend(texts)
        return torch.tensor([[float(sum(t)), 1.0] for t in texts])

    store = ContextStore.build(model, EXAMPLES, embed=embed)
    assert seen == [[5, 9, 4], [5, 9, 4, 7], [8], [8, 3], [8, 3, 6]]
    store.save(tmp_path / "store.safetensors")
    seen.clear()
    processor = shaper("caad", model=model, store=str(tmp_path / "store.safetensors"), embed=embed)
    scores = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    found = processor(torch.tensor([[2, 5, 9], [8, 3, 6]]), scores)
    assert seen == [[5, 9], [8, 3, 6]]
    assert not torch.equal(found, scores)
    assert len(processor.store) == 5


def test_what_cannot_be_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="at least one example"):
        ContextStore.build(model, [([1], [])])
    store = ContextStore(torch.zeros(1, 16), torch.zeros(1, 32))
    with pytest.raises(ValueError, match="top_n must be 1 or more"):
        shaper("caad", model=model, store=store, top_n=0)
    with pytest.raises(ValueError, match="scores of 32 tokens and the model has 64"):
        shaper("caad", model=model, store=store)(torch.tensor([[3]]), torch.zeros(1, 64))
