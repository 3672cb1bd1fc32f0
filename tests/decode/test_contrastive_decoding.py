"""Contrastive decoding under `generate`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from tests.tiny_models import tiny_gpt2, tiny_llama
from tokenloom.decode import shaper
from tokenloom.methods.decoding.contrastive_decoding import contrastive_decoding

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6]])
GIVEN = {"attention_mask": (IDS != 2).long(), "max_new_tokens": 10}


class Uncached(LogitsProcessor):
    """The same with a forward over each whole row."""

    def __init__(self, amateur: object, form: str) -> None:
        self.amateur, self.form = amateur, form

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [row[int((row != 2).nonzero()[0]) :][None] for row in input_ids]
        with torch.no_grad():
            amateur = torch.cat([self.amateur(input_ids=row).logits[:, -1] for row in rows])  # type: ignore[operator]
        return contrastive_decoding(scores, amateur, form=self.form)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["original", "later"])
@pytest.mark.parametrize("beams", [1, 3])
def test_it_equals_two_forwards_per_token(form: str, beams: int) -> None:
    model, amateur = tiny_llama(seed=1), tiny_gpt2(seed=2)
    ours = model.generate(
        IDS, do_sample=False, num_beams=beams, **GIVEN,
        logits_processor=[shaper("contrastive-decoding", amateur=amateur, form=form)],
    )  # fmt: skip
    theirs = model.generate(IDS, do_sample=False, num_beams=beams, logits_processor=[Uncached(amateur, form)], **GIVEN)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, model.generate(IDS, do_sample=False, num_beams=beams, **GIVEN))


def test_beta_zero_is_min_p_and_greedy_stays() -> None:
    model = tiny_llama(seed=1)
    shaped = [shaper("contrastive-decoding", amateur=tiny_gpt2(), form="later", beta=0.0)]
    ours = model.generate(IDS, do_sample=False, logits_processor=shaped, **GIVEN)
    assert torch.equal(ours, model.generate(IDS, do_sample=False, **GIVEN))


def test_an_amateur_is_asked_for_and_must_share_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="needs amateur"):
        shaper("contrastive-decoding")
    with pytest.raises(ValueError, match=r"alpha is a share .* got 2"):
        shaper("contrastive-decoding", amateur=tiny_gpt2(), alpha=2.0)
    shaped = [shaper("contrastive-decoding", amateur=tiny_gpt2(vocab=32))]
    with pytest.raises(ValueError, match="vocabulary of 32 tokens"):
        tiny_llama().generate(IDS % 32, do_sample=False, logits_processor=shaped, **GIVEN)
