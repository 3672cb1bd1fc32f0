"""Every loop of the decoding family answers on the command line, its objects given as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cli.calling import call
from cli.tiny_run import make_tiny_model
from tokenloom.decode.r2r import Router, save_router
from tokenloom.decode.rmod import ValueHeads

RULES = """
words = ["0", "1+"]
def score(texts):
    return [len(text) / 10 for text in texts]
def last(text):
    return text[-1:]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("loops")
    model: Any = AutoModelForCausalLM.from_pretrained(make_tiny_model(made))
    (made / "rules.py").write_text(RULES, encoding="utf-8")
    ValueHeads(16, 2).save(made / "values.safetensors")
    save_file({"vector": torch.ones(16)}, made / "vector.safetensors")
    save_file({"directions": torch.ones(2, 16)}, made / "directions.safetensors")
    router = Router(model.get_input_embeddings().weight, top=8, width=16, blocks=1)
    save_router(router, made / "router.safetensors", threshold=0.5)
    return made


@pytest.mark.parametrize(
    ("method", "temperature"),
    [
        ("antislop:phrases=rules.py:words", 1),
        ("beam-search:beams=3", 0),
        ("best-of-n:reward=rules.py:score,n=3", 1),
        ("cards:reward=rules.py:score,target=2", 1),
        ("cipher", 1),
        ("cntp:n_max=3,cap=4", 0.6),
        ("contrastive-search", 0),
        ("opera:beams=2", 0),
        ("r2r:large=tiny-model,router=router.safetensors", 1),
        ("rmod:values=values.safetensors,block=3", 1),
        ("self-consistency:n=3", 1),
        ("set-cover-pruning:answer=rules.py:last,n=4,every=2", 1),
        ("skipdecode:least=2,over=4", 1),
        ("smc:reward=rules.py:score,particles=3", 1),
        ("soft-thinking:end=1", 1),
        ("split-steering:vector=vector.safetensors,layer=1", 1),
        ("tree-bon:aligned=tiny-model,n=4,children=2,layers=2", 1),
        ("uid-decoding:regularizer=square", 0),
        ("vista:directions=directions.safetensors", 1),
    ],
)
def test_a_loop_answers(folder: Path, method: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    prompts, out = folder / "prompts.txt", folder / "out.jsonl"
    prompts.write_text("1\n12+3\n", encoding="utf-8")
    result = call("generate", "tiny-model", "--prompts", prompts, "--sampler", method, "--temperature", temperature,
                  "--seed", 1, "--max-tokens", 6, "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == ["1", "12+3"]
    assert all(1 <= line["tokens"] <= 6 and line["logprob"] <= 0 for line in lines)
