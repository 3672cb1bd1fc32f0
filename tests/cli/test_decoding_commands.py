"""Decoding methods on the command line, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.tiny_run import make_tiny_model
from tokenloom.cli.app import app


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "240"}).invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("decoding"))


def test_a_method_by_name_answers_and_says_what_it_left(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = call("generate", model, "1+1", "--sampler", "plain", "--top-k", 3, "-n", 2, "--seed", 1,
                  "--max-tokens", 5, "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "3.0 words left to choose from" in result.stderr
    lines = [json.loads(x) for x in out.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 2
    assert all(1 <= x["tokens"] <= 5 and x["logprob"] <= 0 for x in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "plane"], "did you mean"),
        (["--sampler", "plain:width=3"], "unknown parameter 'width'"),
        (["--sampler", "plain", "--stop", "x"], "--stop goes with neither"),
        (["--draft", "plain", "--sampler", "plain"], "name one"),
    ],
)
def test_mistakes_are_named(model: Path, arguments: list[str], message: str) -> None:
    result = call("generate", model, "1+1", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")


def test_samplers_side_by_side(model: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = call("compare-samplers", model, "plain", "plain+plain", "--prompt", "<b>1+1</b>", "--out", page)
    assert result.exit_code == 2
    result = call(
        "compare-samplers", model, "plain", "--prompt", "<b>1+1</b>", "-n", 2, "--max-tokens", 8, "--out", page
    )
    assert result.exit_code == 0, result.output
    assert "distinct 2-grams" in result.stdout
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;1+1&lt;/b&gt;" in text
    assert "<b>1+1</b>" not in text
    assert text.count("<small>") == 2
    twice = call("compare-samplers", model, "plain", "plain", "--prompt", "x")
    assert twice.exit_code == 2
    assert "named twice" in twice.stderr


@pytest.mark.parametrize("watermark", ["distortion-free-watermark:key=42", "green-list-watermark:key=7,delta=8"])
def test_a_watermark_written_is_found_and_another_key_is_not(model: Path, tmp_path: Path, watermark: str) -> None:
    out = tmp_path / "out.jsonl"
    result = call(
        "generate", model, "1+1", "--sampler", watermark, "--seed", 1, "-n", 32, "--max-tokens", 80, "--out", out
    )
    assert result.exit_code == 0, result.output
    # The longest of many: a few dozen tokens tell a key that a handful would not.
    text = max((json.loads(x)["response"] for x in out.read_text(encoding="utf-8").splitlines()), key=len)
    out.write_text(json.dumps({"text": text}), encoding="utf-8")
    key = watermark.partition(",delta")[0]

    def p_value(named: str) -> float:
        found = call("detect-watermark", model, named, "--texts", out)
        assert found.exit_code == 0, found.output
        return float(found.stdout.split()[-1])

    assert p_value(key) <= 0.01
    assert p_value(key.rpartition("=")[0] + "=1") > 0.01


def test_texts_to_examine_are_checked(model: Path, tmp_path: Path) -> None:
    assert "give a TEXT" in call("detect-watermark", model, "green-list-watermark").stderr
    assert "did you mean" in call("detect-watermark", model, "green-list", "x").stderr
    (tmp_path / "bad.jsonl").write_text("[]\n", encoding="utf-8")
    wrong = call("detect-watermark", model, "green-list-watermark", "--texts", tmp_path / "bad.jsonl")
    assert wrong.exit_code == 2
    assert "bad.jsonl, line 1" in wrong.stderr.replace("\n", "")
