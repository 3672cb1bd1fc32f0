"""`tokenloom unslop` end to end on a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.calling import call
from cli.tiny_run import make_tiny_model
from tokenloom.decode.ftpo import balanced, read_pairs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("unslop"))


@pytest.fixture(scope="module")
def prompts(model: Path) -> Path:
    file = model.parent / "prompts.txt"
    file.write_text("".join(f"{i % 4}+{i // 4}\n" for i in range(12)), encoding="utf-8")
    return file


def test_what_is_banned_becomes_unlikely(model: Path, prompts: Path, tmp_path: Path) -> None:
    bans, out = tmp_path / "bans.txt", tmp_path / "model"
    bans.write_text("2\n\n 3 \n", encoding="utf-8")
    given = ("--prompts", prompts, "--max-tokens", 12, "--learning-rate", 0.01, "--epochs", 10, "--lora-rank", 8,
             "--balance", 0.5)  # fmt: skip
    result = call("unslop", model, "--ban", "1", "--ban-file", bans, "--samples", 3, *given, "--out", out)
    assert result.exit_code == 0, result.output
    pairs = read_pairs(out / "pairs.jsonl")
    used = balanced(pairs, strength=0.5)
    assert 20 < len(used) < len(pairs)
    held = used[-(len(used) // 10) :]
    assert f"{len(pairs):,}, {len(used):,} used, {len(held):,} of them held out" in result.stdout
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    assert {tokenizer.decode([p.rejected]) for p in pairs} <= {"1", "2", "3"}
    shares = []
    for folder in (model, out):
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            laws = [loaded(input_ids=torch.tensor([p.context])).logits[0, -1].softmax(-1) for p in held]
        shares.append(sum(float(law[p.rejected]) for law, p in zip(laws, held, strict=True)) / len(held))
    assert shares[1] < 0.5 * shares[0]
    assert f"{shares[1]:.1%} of the probability, {shares[0]:.1%} before" in result.stdout
    again = call("unslop", model, "--pairs", out / "pairs.jsonl", *given, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert again.stdout.splitlines()[1:-1] == result.stdout.splitlines()[1:-1]
    taken = call("unslop", model, "--ban", "1", "--out", out)
    assert taken.exit_code == 2
    assert "holds something already" in taken.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing is banned"),
        (["--ban-file", "none.txt"], "there is no file none.txt"),
        (["--pairs", "none.jsonl"], "there is no file none.jsonl"),
        (["--ban", "hello there", "--prompts", "{prompts}", "--max-tokens", "2"], "never went back"),
    ],
)
def test_mistakes_are_named(model: Path, prompts: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = call("unslop", model, "--out", tmp_path / "x", *(a.format(prompts=prompts) for a in arguments))
    assert result.exit_code in (1, 2)
    assert message in result.stderr.replace("\n", " ")
    assert not (tmp_path / "x").exists()


def test_an_interruption_says_how_to_use_what_was_sampled(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "model"
    asked = ("unslop", model, "--prompts", prompts, "--ban", "1", "--max-tokens", 12, "--samples", 3, "--out", out)
    with monkeypatch.context() as patched:
        patched.setattr("tokenloom.decode.ftpo.fit_ftpo", stop)
        result = call(*asked)
    assert result.exit_code == 130
    assert f"--pairs {out / 'pairs.jsonl'}" in result.stderr
    went_on = call("unslop", model, "--pairs", out / "pairs.jsonl", "--lora-rank", 8, "--out", out)
    assert went_on.exit_code == 0, went_on.output
    prompts.with_name("file").write_text("x", encoding="utf-8")
    assert (
        "is a file; name a new folder" in call("unslop", model, "--ban", "1", "--out", prompts.with_name("file")).stderr
    )
