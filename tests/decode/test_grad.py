"""GRAD: graphs of texts that a model reads, and the processor."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_llama
from tokenloom.decode import shaper
from tokenloom.decode.grad import TransitionGraph

TEXTS = [[5, 9, 4, 5, 9, 11], [5, 9, 7], [8], [3, 5, 9, 4]]


def dense(graph: TransitionGraph) -> torch.Tensor:
    return graph.after(range(64), 64)


def test_edges_are_the_models_scores_of_what_followed() -> None:
    model = tiny_llama()
    done: list[int] = []
    graph = TransitionGraph.build(model, TEXTS, progress=done.append)
    expected = torch.zeros(64, 64, dtype=torch.float64)
    for text in TEXTS:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([text])).logits[0].double()
        for i, (one, two) in enumerate(pairwise(text)):
            expected[one, two] += max(0.0, float(scores[i, two]))
    torch.testing.assert_close(dense(graph), expected, rtol=1e-5, atol=1e-5)
    assert done == [1, 2, 3, 4]
    assert 0 < len(graph) <= len({pair for text in TEXTS for pair in pairwise(text)})


def test_corpora_add_up_in_any_order_and_are_kept(tmp_path: Path) -> None:
    model = tiny_llama()
    whole = TransitionGraph.build(model, TEXTS)
    parts = [TransitionGraph.build(model, texts) for texts in (TEXTS[2:], TEXTS[:2])]
    torch.testing.assert_close(dense(parts[0] + parts[1]), dense(whole))
    torch.testing.assert_close(dense(TransitionGraph.build(model, TEXTS[::-1])), dense(whole))
    whole.save(tmp_path / "graph.safetensors")
    assert torch.equal(dense(TransitionGraph.load(tmp_path / "graph.safetensors")), dense(whole))
    assert len(TransitionGraph.build(model, [])) == 0


def test_generation_follows_the_graph_and_an_empty_one_changes_nothing(tmp_path: Path) -> None:
    model, ids = tiny_llama(), torch.tensor([[2, 2, 5], [8, 3, 9]])
    given = {"attention_mask": (ids != 2).long(), "do_sample": False, "max_new_tokens": 6}
    plain = model.generate(ids, **given)
    empty = TransitionGraph(torch.zeros(0, 2), torch.zeros(0))
    assert torch.equal(model.generate(ids, logits_processor=[shaper("grad", graph=empty)], **given), plain)
    ring = TransitionGraph(torch.tensor([[i, (i + 1) % 60 + 3] for i in range(3, 63)]), torch.ones(60))
    ring.save(tmp_path / "ring.safetensors")
    always = shaper("grad", graph=str(tmp_path / "ring.safetensors"), lambda_max=1.0, adaptive=False)
    found = model.generate(ids, logits_processor=[always], **given)
    # With all weight on the graph its only successor ties with the model's own favorite.
    rows = always.graph.after(ids[:, -1].tolist(), 64).argmax(-1)
    with torch.no_grad():
        scores = model(input_ids=ids, attention_mask=given["attention_mask"]).logits[:, -1]
    shaped = always(ids, scores)
    torch.testing.assert_close(shaped.gather(1, rows[:, None]), scores.amax(-1, keepdim=True))
    assert found.shape == (2, 9)


def test_a_graph_of_another_tokenizer_is_refused() -> None:
    graph = TransitionGraph(torch.tensor([[3, 70]]), torch.ones(1))
    with pytest.raises(ValueError, match="share of the graph"):
        shaper("grad", graph=graph, lambda_max=2.0)
    with pytest.raises(ValueError, match="token 70 and the model 64"):
        shaper("grad", graph=graph)(torch.tensor([[3]]), torch.zeros(1, 64))
