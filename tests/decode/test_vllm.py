"""The adapter for vLLM: requests, and, where vLLM is installed, an engine.

`python -m bench.setup_vllm`, then
`PYTHONPATH=src:. VLLM_USE_V2_MODEL_RUNNER=0 .venv-vllm/bin/python -m pytest --no-cov tests/decode/test_vllm.py` in an
environment of vLLM's to which `pip install pytest` has been added.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import tiny_llama
from tokenloom.decode import shaper
from tokenloom.decode.vllm import check, request_processor

LOGITS = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 3


class Tokenizer:
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return {"wait": [20], " wait": [21], "</think>": [30]}.get(text, [40, 41])


def test_a_request_gets_its_shapers_in_order() -> None:
    process = request_processor({"temperature": {"temperature": 3.0}, "top-h": {"alpha": 0.6}})
    rows = LOGITS[None]
    expected = shaper("top-h", alpha=0.6)(rows, shaper("temperature", temperature=3.0)(rows, rows))
    assert torch.equal(process([1, 2], [3], LOGITS), expected[0])
    assert torch.equal(request_processor({"min-p": None})([1], [], LOGITS), shaper("min-p")(rows, rows)[0])


def test_shapers_see_prompt_and_output() -> None:
    marked = request_processor({"green-list-watermark": {"context": 2}})
    ids = torch.tensor([[7, 8, 9]])
    expected = shaper("green-list-watermark", context=2)(ids, LOGITS[None])[0]
    assert torch.equal(marked([7, 8], [9], LOGITS), expected)
    assert torch.equal(marked([7, 8, 9], [], LOGITS), expected)
    waves = request_processor({"cyclicreflex": {"words": "wait", "period": 8.0, "amplitude": 4.0}}, Tokenizer())
    assert float((waves([30, 5], [6, 6], LOGITS) - LOGITS)[20]) == pytest.approx(4.0)
    assert torch.equal(waves([5], [30, 6], LOGITS), LOGITS)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("top-h", "maps shapers to parameters"),
        ({"top-hat": {}}, "did you mean 'top-h'"),
        ({"top-h": {"beta": 1}}, "unknown parameter 'beta'"),
        ({"contrastive-decoding": {}}, "needs amateur, which vLLM's requests cannot"),
        ({"basis-aware-truncation": {}}, "needs model"),
    ],
)
def test_what_cannot_be_is_refused(chosen: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(chosen)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; see the module")
def test_an_engine_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import LLM, SamplingParams

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    model = tiny_llama(head_dim=32)
    model.save_pretrained(tmp_path)
    llm = LLM(
        str(tmp_path), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=64,
        gpu_memory_utilization=0.05,  # of the machine's memory: another process may hold the rest
        logits_processors=["tokenloom.decode.vllm:TokenloomProcessor"],
    )  # fmt: skip
    prompt = {"prompt_token_ids": [5, 9, 4]}
    common = {"max_tokens": 8, "temperature": 1.0, "detokenize": False, "ignore_eos": True}
    one = SamplingParams(**common, extra_args={"tokenloom": {"top-k": {"k": 1}}})
    greedy = model.generate(torch.tensor([[5, 9, 4]]), do_sample=False, max_new_tokens=8, eos_token_id=None)[0, 3:]
    found = llm.generate([prompt, prompt], [one, SamplingParams(**common)])
    assert list(found[0].outputs[0].token_ids) == greedy.tolist()
    # vLLM hands our ValueError on in a class of its own, whose bases differ between versions.
    with pytest.raises(Exception, match="did you mean 'top-k'"):
        llm.generate([prompt], SamplingParams(**common, extra_args={"tokenloom": {"top-kk": {}}}))
