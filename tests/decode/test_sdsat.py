"""SDSAT with a model: adaptive tokens change nothing, are never written, and learn to draft."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import TINY, tiny_llama
from tokenloom import decode
from tokenloom.decode.run import Run
from tokenloom.decode.sdsat import add_adaptive_tokens, fit, masks
from tokenloom.methods.decoding.sdsat import insert

IDS = torch.tensor([[2, 2, 5, 9, 4], [7, 7, 7, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def test_ordinary_tokens_predict_what_they_did() -> None:
    # With sliding windows and eager attention too.
    for name in ("llama", "gemma3", "gpt2"):
        model = TINY[name]()
        own = add_adaptive_tokens(model, 3)
        row = torch.randint(3, 64, (12,), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            plain, made = insert(row, [], own), insert(row, [2, 7], own)
            scores = []
            for m in (plain, made):
                mask = masks(model, m.visible[None], m.positions[None])
                scores.append(
                    model(input_ids=m.ids[None], position_ids=m.positions[None], attention_mask=mask).logits[0]
                )
            # Sums over as many keys in the same order; the hidden ones weigh exactly nothing.
            torch.testing.assert_close(scores[1][:12], scores[0], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(scores[0], model(input_ids=row[None]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_greedy_is_that_of_the_model_without_adaptive_tokens(name: str) -> None:
    model = TINY[name]()
    own = add_adaptive_tokens(model, 3)
    given = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 12}
    theirs = model.generate(IDS, suppress_tokens=list(own), **given)
    for nodes in (2, 3, None):
        loop = decode.loop("sdsat", adaptive=own, nodes=nodes)
        assert torch.equal(model.generate(IDS, custom_generate=loop, **given), theirs)


def test_the_cache_holds_committed_tokens_alone() -> None:
    model = tiny_llama()
    own = add_adaptive_tokens(model, 2)
    loop = decode.loop("sdsat", adaptive=own, nodes=2)
    lengths: list[list[int]] = []

    class Watched(type(loop)):  # type: ignore[misc]
        def _sizes(self, run: Run, session):  # type: ignore[no-untyped-def]
            accept = session.accept

            def noted(paths: list[list[int]]) -> None:
                accept(paths)
                lengths.append([*session._lengths.tolist(), *(len(r) for r in session.rows)])

            session.accept = noted
            return super()._sizes(run, session)

    loop.__class__ = Watched
    ids = model.generate(IDS[1:], custom_generate=loop, do_sample=True, max_new_tokens=10, eos_token_id=None)
    assert not bool(torch.isin(ids, torch.tensor(own)).any())
    assert lengths
    assert all(committed == held for committed, held in lengths)


def test_training_teaches_adaptive_tokens_to_draft() -> None:
    model = tiny_llama(hidden=32)
    own = add_adaptive_tokens(model, 3)
    before = model.get_input_embeddings().weight.detach().clone()
    count = torch.arange(40).remainder(12).add(20).tolist()
    seen: list[int] = []
    losses = fit(model, [count, count[5:]], own, steps=120, learning_rate=1e-2, progress=lambda s, x: seen.append(s))
    assert seen == list(range(120))
    assert losses[-1] < 0.3 * losses[0]
    assert not torch.equal(model.get_input_embeddings().weight, before)
    loop = decode.loop("sdsat", adaptive=own, nodes=3)
    ids = model.generate(torch.tensor([count[:6]]), custom_generate=loop, do_sample=False, max_new_tokens=17)
    assert ids[0].tolist() == count[:23]
    counts = loop.last_run.counts
    assert counts["accepted"] >= 6
    assert counts["forwards"] < 12


def test_only_adaptive_embeddings_may_be_trained() -> None:
    model = tiny_llama()
    own = add_adaptive_tokens(model, 2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fit(model, [list(range(20, 40))], own, steps=2, learning_rate=1e-2, embeddings_only=True)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    (name,) = changed
    table = dict(model.named_parameters())[name]
    assert torch.equal(table[: own[0]], before[name][: own[0]])
    assert all(p.requires_grad for p in model.parameters())


def test_what_cannot_be_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="one adaptive token at least"):
        add_adaptive_tokens(model, 0)
    with pytest.raises(ValueError, match="needs the ids"):
        decode.loop("sdsat", adaptive=())
    with pytest.raises(ValueError, match="none of the model's 64 tokens"):
        model.generate(IDS[1:], custom_generate=decode.loop("sdsat", adaptive=(64,)), max_new_tokens=2)
    with pytest.raises(ValueError, match="3 tokens or more"):
        fit(model, [[1, 2]], (60,), steps=1)
