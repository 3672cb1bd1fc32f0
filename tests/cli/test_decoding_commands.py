"""Decoding methods on the command line, on a tiny random model."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from cli.calling import call
from cli.tiny_run import make_tiny_model
from tokenloom.decode.respond import Decoding, respond
from tokenloom.policy import Policy
from tokenloom.report.samplers import Column, measured


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
        (["--sampler", "cntp+plain"], "cntp and plain each decide"),
        (["--sampler", ""], "--sampler and --draft take a method's name"),
        (["--draft", "cntp"], "cntp does not draft: name it with --sampler cntp"),
        (["--draft", "top-h"], "top-h does not draft: name it with --sampler top-h"),
        (["--draft", "group-ngrams"], "--draft speculative:drafter=group-ngrams"),
        (["--sampler", "best-of-n"], "best-of-n needs reward: add best-of-n:reward=..."),
        (["--sampler", "best-of-n:reward=missing.py:f"], "missing.py"),
        (["--sampler", "difficulty-probe:probe=none.safetensors"], "there is no file none.safetensors"),
        (["--sampler", "best-of-n:reward=./missing"], "no FILE.py:NAME and no model that loads"),
        (["--sampler", "top-h:alpha=7"], "(0, 1]"),
        (["--sampler", "beam-search"], "temperature 0"),
        (["--seed", "9" * 30], "a seed has at most 63 bits"),
        (["--temperature", "inf"], "must be finite"),
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


def test_a_page_shows_hostile_text_as_text(model: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    prompt = "<img src=x onerror=alert(1)>\x1b[31m\u202e"
    result = call("compare-samplers", model, "plain", "--prompt", prompt, "--raw", "-n", 40, "--max-tokens", 8,
                  "--seed", 3, "--temperature", 5, "--out", page)  # fmt: skip
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert "&lt;img src=x onerror=alert(1)&gt;\\u001b[31m\\u202e" in text
    # The model's own escape characters, which it writes once in twelve tokens.
    assert text.count("\\u001b") > 1
    assert not any(hostile in text for hostile in ("\x1b", "\u202e", "<img"))
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|<script|<link", text)
    assert "40 responses to each prompt, of at most 8 tokens; temperature 5, seed 3" in text


def test_the_numbers_of_a_comparison_are_those_of_its_responses(model: Path) -> None:
    policy = Policy.load(model)
    prompt = policy.encode_prompt("1+1").tolist()
    found = respond(policy, [prompt, prompt[:-1]], Decoding(max_tokens=12), copies=3, seed=1)
    shown = measured(Column("plain", found))
    pairs: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    means = []
    for a in found.answers:
        pairs[a.prompt] += itertools.pairwise(a.ids)
        ids = (prompt, prompt[:-1])[a.prompt] + a.ids
        laws = policy.model(input_ids=torch.tensor([ids])).logits[0].detach().log_softmax(-1)
        steps = [float(laws[place - 1, ids[place]]) for place in range(len(ids) - len(a.ids), len(ids))]
        means.append(sum(steps) / len(steps))
    assert shown.distinct == pytest.approx(sum(len(set(p)) / len(p) for p in pairs.values()) / 2)
    assert shown.logprob == pytest.approx(sum(means) / 6, abs=1e-5)
    assert shown.length == sum(len(a.ids) for a in found.answers) / 6


@pytest.mark.parametrize("bans", ["[12]", "@"])
def test_texts_of_a_method_are_given_as_they_are_or_as_a_file(model: Path, tmp_path: Path, bans: str) -> None:
    file = tmp_path / "bans.txt"
    file.write_text("1\n\n2\n", encoding="utf-8")
    result = call("generate", model, "1+1", "-n", 8, "--max-tokens", 12, "--seed", 1, "--out", tmp_path / "out.jsonl",
                  "--sampler", f"antislop:patterns={file if bans == '@' else bans}")  # fmt: skip
    assert result.exit_code == 0, result.output
    texts = "".join(json.loads(x)["response"] for x in (tmp_path / "out.jsonl").read_text().splitlines())
    assert "3" in texts
    assert not set("12") & set(texts)


def test_any_drafter_goes_with_any_verifier_by_name(model: Path) -> None:
    asked = ("generate", model, "1+1", "--max-tokens", 12, "--temperature", 0)
    plain = call(*asked, "--sampler", "plain")
    for pair in ("drafter=group-ngrams", "drafter=stand,verifier=recursive-rejection,nodes=3"):
        drafted = call(*asked, "--draft", f"speculative:{pair}")
        assert drafted.exit_code == 0, drafted.output
        assert drafted.stdout == plain.stdout
    refused = call(*asked, "--draft", "speculative:drafter=prompt-lookup,verifier=recursive-rejection")
    assert refused.exit_code == 2
    assert "use verifier 'prompt-lookup'" in refused.stderr


def test_what_drafts_brought_is_told_for_each_response(model: Path) -> None:
    result = call("generate", model, "1+1", "-n", 8, "--max-tokens", 40, "--temperature", 0, "--draft",
                  f"speculative-sampling:draft={model},nodes=3")  # fmt: skip
    assert result.exit_code == 0, result.output
    # The model agrees with itself: three drafts and a token of its own, however many responses a forward has.
    told = re.search(r"([\d.]+) tokens a forward for each response, (\d+)% of drafts accepted", result.stderr)
    assert told is not None, result.stderr
    assert 3 < float(told[1]) <= 4.5
    assert int(told[2]) > 70


def test_a_second_model_of_another_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    held = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    # As many tokens, in another order.
    words = held["model"]["vocab"]
    held["model"]["vocab"] = {word: number if number < 4 else 15 - number for word, number in words.items()}
    (other / "tokenizer.json").write_text(json.dumps(held), encoding="utf-8")
    for named in (["--draft", f"speculative-sampling:draft={other}"], ["-s", f"contrastive-decoding:amateur={other}"]):
        result = call("generate", model, "1+1", *named)
        assert result.exit_code == 2, result.output
        assert "has another tokenizer (4 of 12 tokens are the same)" in result.stderr
    assert call("generate", model, "1+1", "-s", f"contrastive-decoding:amateur={model}").exit_code == 0


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


def test_a_text_that_is_too_short_leaves_the_others_their_p_values(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("1\n1+2+3+1+2+3\n", encoding="utf-8")
    result = call("detect-watermark", model, "green-list-watermark", "--texts", file)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert rows[0] == ["1", "1", "-", "-"]
    assert 0 < float(rows[1][-1]) <= 1
    assert "1 of 2 texts cannot be tested: green-list-watermark: a text of 1 tokens" in result.stderr
    alone = call("detect-watermark", model, "green-list-watermark", "1")
    assert (alone.exit_code, "give more text" in alone.stderr) == (2, True)


def test_texts_to_examine_are_checked(model: Path, tmp_path: Path) -> None:
    assert "give a TEXT" in call("detect-watermark", model, "green-list-watermark").stderr
    assert "did you mean" in call("detect-watermark", model, "green-list", "x").stderr
    two = call("detect-watermark", model, "green-list-watermark+distortion-free-watermark", "x")
    assert (two.exit_code, "look for one at a time" in two.stderr) == (2, True)
    assert "has no tokenizer that loads" in call("detect-watermark", tmp_path, "green-list-watermark", "x").stderr
    (tmp_path / "bad.jsonl").write_text('{"text": "1"}\n\n[]\n', encoding="utf-8")
    wrong = call("detect-watermark", model, "green-list-watermark", "--texts", tmp_path / "bad.jsonl")
    assert wrong.exit_code == 2
    assert "bad.jsonl, line 3" in wrong.stderr.replace("\n", "")
