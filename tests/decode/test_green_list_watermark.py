"""The green-list watermark under `generate`: what it writes, `detect` and transformers' detector find."""

from __future__ import annotations

import pytest
import torch
from transformers import WatermarkDetector, WatermarkingConfig

from tests.tiny_models import tiny_llama
from tokenloom.decode import shaper
from tokenloom.methods.decoding.green_list_watermark import detect

IDS = torch.tensor([[2, 2, 5, 9], [8, 3, 11, 6]])
GIVEN = {"attention_mask": (IDS != 2).long(), "do_sample": True, "max_new_tokens": 60, "eos_token_id": None}


def generate(delta: float, **parameters: object) -> torch.Tensor:
    model = tiny_llama()
    torch.manual_seed(0)
    return model.generate(IDS, logits_processor=[shaper("green-list-watermark", delta=delta, **parameters)], **GIVEN)


@pytest.mark.parametrize("context", [1, 2])
def test_marked_text_is_found_in_every_row(context: int) -> None:
    marked = generate(6.0, context=context)
    for row in marked.tolist():
        # A text without its prompt loses only the first tokens' contexts.
        assert detect(row[4:], 64, context=context).p_value < 1e-6
        assert detect(row[4:], 64, context=context, key=99).p_value > 1e-3
    for row in generate(0.0).tolist():
        assert detect(row[4:], 64).p_value > 1e-3


def test_no_delta_leaves_the_text() -> None:
    found, model = generate(0.0), tiny_llama()
    torch.manual_seed(0)
    assert torch.equal(found, model.generate(IDS, **GIVEN))


def test_transformers_detector_agrees() -> None:
    model = tiny_llama()
    model.config.bos_token_id = -5  # no text of ours begins with one
    detector = WatermarkDetector(model.config, "cpu", WatermarkingConfig(greenlist_ratio=0.25, hashing_key=15485863))
    marked = generate(4.0)[:, 4:]
    theirs = detector(marked, return_dict=True)
    for row, green, z in zip(marked.tolist(), theirs.num_green_tokens, theirs.z_score, strict=True):
        ours = detect(row, 64, distinct=False)
        assert (ours.green, ours.z) == (int(green), pytest.approx(float(z)))


def test_texts_shorter_than_the_context_are_left_alone() -> None:
    scores = torch.randn(2, 64)
    assert torch.equal(shaper("green-list-watermark", context=5)(IDS, scores), scores)


@pytest.mark.parametrize("parameters", [{"delta": -1.0}, {"gamma": 1.0}, {"context": 0}])
def test_what_cannot_be_is_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="green-list-watermark: "):
        shaper("green-list-watermark", **parameters)
