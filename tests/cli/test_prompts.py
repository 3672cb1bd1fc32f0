"""Prompts as people have them: lines, JSON lines, chats, ids, pipes; and what is none."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from cli.calling import call
from cli.tiny_run import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("prompts"))


def test_ids_stay_with_their_answers(model: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "2"}]
    records = [{"id": "a", "prompt": "1+1"}, {"id": 7, "messages": chat}, {"prompt": "3"}]
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, records)), encoding="utf-8")
    for sampler in ([], ["--sampler", "plain"]):
        out = tmp_path / "out.jsonl"
        result = call("generate", model, "--prompts", tmp_path / "p.jsonl", "--max-tokens", 3, "--out", out, *sampler)
        assert result.exit_code == 0, result.output
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert [line.get("id", "none") for line in lines] == ["a", 7, "none"]
        assert [line["prompt"] for line in lines] == ["1+1", chat, "3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "p.txt holds no prompts"),
        ("p.txt", b"\n \n", "p.txt holds no prompts"),
        ("p.txt", b"1+1\n2\xff\n", "p.txt, line 2 is no text in UTF-8"),
        ("p.jsonl", b'{"prompt": "1"}\n\n{"prompt": \n', "p.jsonl, line 3 is no JSON: Expecting value at column 12"),
        ("p.jsonl", b"[1]\n", "p.jsonl, line 1: list instead of an object"),
        ("p.jsonl", b'{"prompt": 5}\n', "`prompt` must be text, got int"),
        ("p.jsonl", b'{"prompt": " "}\n', "p.jsonl, line 1: the prompt is empty"),
        ("p.jsonl", b'{"prompt": "1\\ud800"}\n', "half a character at position 2"),
        ("p.jsonl", b'{"messages": [{"role": "user"}]}\n', "`content` of message 1 of 1 is missing"),
        ("p.jsonl", b'{"prompt": ' + b"[" * 100_000 + b"\n", "p.jsonl, line 1"),
    ],
)
def test_a_file_that_is_none_is_refused_by_line(
    model: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    result = call("generate", model, "--prompts", tmp_path / name)
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")


def test_standard_input_and_arguments_must_be_text(model: Path) -> None:
    assert "standard input is no text" in call("generate", model, "-", input=b"1\xff").stderr
    # What the command line cannot decode comes as half characters.
    assert "half a character" in call("generate", model, "1\udcff").stderr
    assert "is a folder" in call("generate", model, "--prompts", model).stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_read(model: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("1+1\n2+2\n"))
    writer.start()
    result = call("generate", model, "--prompts", pipe, "--max-tokens", 2)
    writer.join()
    assert result.exit_code == 0, result.output
    assert "2+2" in result.stdout


@pytest.mark.parametrize("command", [["generate"], ["generate", "-s", "plain"], ["compare-samplers", "plain"]])
def test_a_prompt_that_is_too_long_is_refused_before_any_work(model: Path, tmp_path: Path, command: list[str]) -> None:
    file = tmp_path / "p.txt"
    file.write_text("1+1\n" + "1+" * 100 + "\n", encoding="utf-8")
    first, *rest = command
    result = call(first, model, *rest, "--prompts", file, "--max-tokens", 5)
    assert result.exit_code == 2, result.output
    # The template adds a start and an end.
    assert "prompt 2 has 202 tokens, and this model reads 128; shorten it" in result.stderr
    file.write_text("1+" * 60, encoding="utf-8")
    result = call(first, model, *rest, "--prompts", file, "--max-tokens", 50)
    assert result.exit_code == 2, result.output
    assert "leaves room for 6 of the 128" in result.stderr
    assert "lower --max-tokens" in result.stderr


def test_a_default_length_that_gives_way_is_told(model: Path, tmp_path: Path) -> None:
    result = call("generate", model, "1+" * 60, "--seed", 1)
    assert result.exit_code == 0, result.output
    assert "leaves room for 6 tokens; that is the longest response" in result.stderr
