"""Contrastive search as a loop equals the search written out with full forwards, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from tests.decode.table_runs import table_run
from tests.tiny_models import TINY, tiny_llama
from tokenloom import decode
from tokenloom.decode.table import TableLM

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9], [7, 7, 7, 9, 9]])
MASK = (IDS != 2).long()


def written_out(model: Any, prompt: list[int], steps: int, alpha: float, k: int, penalty: float) -> list[int]:
    ids = list(prompt)
    process = RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(steps):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        probs, tokens = process(torch.tensor([ids]), out.logits[:, -1])[0].softmax(-1).topk(k)
        before = torch.nn.functional.normalize(out.hidden_states[-1][0], dim=-1)
        scores = []
        for p, token in zip(probs, tokens, strict=True):
            with torch.no_grad():
                after = model(input_ids=torch.tensor([[*ids, int(token)]]), output_hidden_states=True)
            state = torch.nn.functional.normalize(after.hidden_states[-1][0, -1], dim=-1)
            scores.append((1 - alpha) * p - alpha * (before @ state).max())
        ids.append(int(tokens[int(torch.stack(scores).argmax())]))
        if ids[-1] == 1:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral"])
def test_equals_the_search_written_out(name: str) -> None:
    model = TINY[name]()
    penalty = RepetitionPenaltyLogitsProcessor(1.1)
    out = model.generate(IDS, attention_mask=MASK, do_sample=False, max_new_tokens=7, logits_processor=[penalty],
                         custom_generate=decode.loop("contrastive-search", alpha=0.6, k=4))  # fmt: skip
    for row, mask, new in zip(IDS, MASK, out[:, 5:].tolist(), strict=True):
        # The penalty sees the padding in `generate` too, which no row has as a token here but by its id 2.
        expected = written_out(model, row[mask.bool()].tolist(), 7, 0.6, 4, 1.1)
        if 2 not in expected:
            assert new[: len(expected)] == expected


@pytest.mark.parametrize("settings", [{"alpha": 0.0, "k": 5}, {"alpha": 0.9, "k": 1}, {"alpha": 0.0, "k": 999}])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_without_a_penalty_or_a_choice_it_is_greedy(name: str, settings: dict[str, Any]) -> None:
    model = TINY[name]()
    given = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 9}
    ours = model.generate(IDS, custom_generate=decode.loop("contrastive-search", **settings), **given)
    assert torch.equal(ours, model.generate(IDS, **given))


def test_among_equals_the_lowest_id_is_a_candidate() -> None:
    model = tiny_llama(vocab=2000, eos_token_id=None)

    def leveled(_: Any, scores: torch.Tensor) -> torch.Tensor:
        # Coarse scores, as those of a model in bfloat16: many are equal.
        return scores.round()

    given: dict[str, Any] = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 12}
    loop = decode.loop("contrastive-search", alpha=0.0, k=5)
    theirs = model.generate(IDS, logits_processor=[leveled], **given)
    assert torch.equal(model.generate(IDS, custom_generate=loop, logits_processor=[leveled], **given), theirs)


def test_one_forward_per_token_and_what_is_forbidden_stays_so() -> None:
    model = tiny_llama(vocab=8)
    loop = decode.loop("contrastive-search", alpha=1.0, k=8)
    ids = torch.tensor([[5, 4]])
    out = model.generate(ids, do_sample=False, max_new_tokens=6, custom_generate=loop, eos_token_id=1,
                         logits_processor=[MinNewTokensLengthLogitsProcessor(2, 6, 1)])  # fmt: skip
    assert out.shape == (1, 8)
    assert 1 not in out[0].tolist()
    assert loop.last_run is not None
    assert loop.last_run.counts["forwards"] == 6


def test_mistakes_are_named() -> None:
    for settings, match in (({"k": 0}, "k = 0"), ({"alpha": -0.1}, "alpha")):
        with pytest.raises(ValueError, match=match):
            decode.loop("contrastive-search", **settings)
    loop = decode.loop("contrastive-search")
    with pytest.raises(ValueError, match="do_sample=False"):
        tiny_llama().generate(IDS, attention_mask=MASK, do_sample=True, max_new_tokens=2, custom_generate=loop)
    with pytest.raises(ValueError, match="hidden states"):
        loop.rows(table_run(TableLM.random(3), sample=False))
