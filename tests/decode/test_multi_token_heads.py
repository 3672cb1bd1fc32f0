"""Heads that predict tokens ahead: untrained ones change nothing, trained ones draft, files hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import TINY, tiny_gpt2, tiny_llama
from tokenloom import decode
from tokenloom.decode.multi_token_heads import MultiTokenHeads, fit

IDS = torch.tensor([[2, 2, 5, 9, 4], [7, 7, 7, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "cohere", "gpt2"])
def test_greedy_is_generates_greedy(name: str) -> None:
    model = TINY[name]()
    given = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 12}
    theirs = model.generate(IDS, **given)
    for nodes in (5, None):
        loop = decode.loop("multi-token-heads", heads=MultiTokenHeads(16, 3), nodes=nodes)
        assert torch.equal(model.generate(IDS, custom_generate=loop, **given), theirs)
    assert not model.base_model._forward_hooks


def test_untrained_heads_say_what_the_model_says() -> None:
    hidden = torch.randn(5, 16)
    assert torch.equal(MultiTokenHeads(16, 2)(hidden), hidden.expand(2, 5, 16))


@pytest.mark.parametrize("model", [tiny_llama(hidden=32), tiny_gpt2(n_embd=32)], ids=["llama", "gpt2"])
def test_trained_heads_draft(model: Any) -> None:
    count = torch.arange(60).remainder(12).add(20).tolist()
    # A model that counts, so that its hidden states know where it is.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        out = model(input_ids=torch.tensor([count]), labels=torch.tensor([count]))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen: list[int] = []
    heads, losses = fit(model, [count, count[3:]], count=3, steps=80, learning_rate=1e-2,
                        progress=lambda step, loss: seen.append(step))  # fmt: skip
    assert len(seen) == 80
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
    for sample in (False, True):
        loop = decode.loop("multi-token-heads", heads=heads, nodes=3)
        ids = model.generate(torch.tensor([count[:8]]), custom_generate=loop, do_sample=sample, temperature=0.1,
                             max_new_tokens=21, eos_token_id=None)  # fmt: skip
        assert ids[0].tolist() == count[:29]
        assert loop.last_run.counts["forwards"] < 12


def test_files_hold_the_heads(tmp_path: Path) -> None:
    heads = MultiTokenHeads(8, 2)
    torch.nn.init.normal_(heads.weight)
    heads.save(tmp_path / "heads.safetensors")
    again = MultiTokenHeads.load(tmp_path / "heads.safetensors")
    assert torch.equal(again.weight, heads.weight)
    assert torch.equal(again.bias, heads.bias)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        MultiTokenHeads(8, 0)
    loop = decode.loop("multi-token-heads", heads=MultiTokenHeads(8, 2))
    with pytest.raises(ValueError, match="hidden states of size 8 and the model's have 16"):
        tiny_llama().generate(IDS[1:], custom_generate=loop, max_new_tokens=2)
    with pytest.raises(ValueError, match="6 tokens or more"):
        fit(tiny_llama(), [[1, 2, 3]])
