"""`--constraint`: every kind holds under every way to decode, and what cannot hold is told."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import LlamaConfig

from cli.calling import call
from cli.tiny_run import make_tiny_model
from decode.tokenizers_at_hand import byte_level
from tiny_models import build
from tokenloom.cli.answers_file import AnswersFile

pytest.importorskip("llguidance", reason="python -m pip install 'tokenloom[constraints]'")
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["cat", "dog, or so"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}
# A random model would fill JSON with white space.
TIGHT = {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}
SUMS = 'start: number ("+" number)~1..2\nnumber: /[0-9]{1,2}/\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model over bytes and some merges."""
    path = tmp_path_factory.mktemp("constraint") / "model"
    tokenizer = byte_level()
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=len(tokenizer) + 4, hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    build(config, 0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of twelve characters."""
    return make_tiny_model(tmp_path_factory.mktemp("characters"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with files of constraints."""
    (tmp_path / "pet.json").write_text(json.dumps(TIGHT), encoding="utf-8")
    (tmp_path / "sums.lark").write_text(SUMS, encoding="utf-8")
    (tmp_path / "answers.txt").write_text("yes, please\r\nno|never\n\n", encoding="utf-8")
    (tmp_path / "rules.py").write_text(
        "def three(text):\n    return len(text) == 3\n\n"
        "def digits(text):\n    return len(text) < 4 and text.isdigit()\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answers(*arguments: object) -> list[dict[str, Any]]:
    result = call("generate", *arguments, "--raw", "--seed", 1, "--out", "out.jsonl")
    assert result.exit_code == 0, result.output
    return [json.loads(x) for x in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]


def is_pet(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


FITS = {
    "json-schema=@pet.json": is_pet,
    "regex=[a-c]{2,4},(x|yz)": lambda text: re.fullmatch("[a-c]{2,4},(x|yz)", text),
    "choice=@answers.txt": lambda text: text in ("yes, please", "no", "never"),
    "lark=@sums.lark": lambda text: re.fullmatch(r"[0-9]{1,2}(\+[0-9]{1,2}){1,2}", text),
}


@pytest.mark.parametrize("constraint", sorted(FITS))
@pytest.mark.parametrize("sampler", [None, "awrs:particles=2", "smc:particles=2", "locally-constrained"])
def test_responses_fit(model: Path, folder: Path, constraint: str, sampler: str | None) -> None:
    named = [] if sampler is None else ["--sampler", sampler]
    lines = answers(model, "1+1", "--constraint", constraint, "-n", 3, "--max-tokens", 60, *named)
    assert [line["constraint"] for line in lines] == ["fulfilled"] * 3
    assert all(FITS[constraint](line["response"]) for line in lines)


@pytest.mark.parametrize(
    "way",
    [
        ["--temperature", 0],
        ["--temperature", 0.7, "--top-k", 1],
        ["--temperature", 0, "--draft", "token-recycling"],
        ["--draft", "prompt-lookup"],
        ["--sampler", "beam-search:beams=3", "--temperature", 0],
        ["--sampler", "top-h:alpha=0.4+cntp"],
        ["--sampler", "antislop:phrases=rules.py:words"],
        ["--sampler", "best-of-n:reward=rules.py:shortest,n=3"],
    ],
)
def test_masks_go_with_samplers_drafts_and_searches(model: Path, folder: Path, way: list[object]) -> None:
    with (folder / "rules.py").open("a") as more:
        more.write("\nwords = ['cat']\n\ndef shortest(texts):\n    return [-len(t) for t in texts]\n")
    lines = answers(model, "1+1", "--constraint", "json-schema=@pet.json", "-n", 2, "--max-tokens", 60, *way)
    assert all(is_pet(line["response"]) for line in lines)
    assert all(line["constraint"] == "fulfilled" and not line["truncated"] for line in lines)


def test_a_draft_changes_nothing(model: Path, folder: Path) -> None:
    asked = [model, "1+1", "--constraint", "lark=@sums.lark", "--temperature", 0]
    assert answers(*asked)[0]["response"] == answers(*asked, "--draft", "token-recycling")[0]["response"]


def test_prompts_of_different_lengths_that_continue_each_other(model: Path, folder: Path) -> None:
    (folder / "prompts.txt").write_text("1+\n1+1\n1+1+1\n", encoding="utf-8")
    for way in ([], ["--sampler", "antislop:phrases=rules.py:words"]):
        (folder / "rules.py").write_text("words = ['cat']\n")
        lines = answers(model, "--prompts", "prompts.txt", "--constraint", "regex=[0-9][+][0-9]", *way)
        assert all(re.fullmatch("[0-9][+][0-9]", line["response"]) for line in lines)


def test_what_is_cut_is_a_beginning(model: Path, folder: Path) -> None:
    result = call("generate", model, "1", "--raw", "--constraint", "regex=[0-9]{40}", "--max-tokens", 5, "--seed", 1)
    assert result.exit_code == 0, result.output
    assert re.fullmatch("[0-9]{5,10}", result.stdout.strip())
    assert "of 1 responses, 1 cut at --max-tokens 5" in result.stderr
    assert answers(model, "1", "--constraint", "regex=[0-9]{40}", "--max-tokens", 5)[0]["constraint"] == "unfinished"
    # Complete though no end came.
    assert answers(model, "1", "--constraint", "regex=[ab]{1,3}", "--max-tokens", 1)[0]["constraint"] == "fulfilled"


@pytest.mark.parametrize("predicate", ["rules.py:three,digits", "rules.py:three,rules.py:digits", "rules.py:sum"])
@pytest.mark.parametrize("sampler", ["plain", "awrs:particles=4", "smc:particles=4"])
def test_predicates(characters: Path, folder: Path, predicate: str, sampler: str) -> None:
    with (folder / "rules.py").open("a") as more:
        more.write("\ndef sum(text):\n    return '=' not in text\n")
    lines = answers(characters, "1+1", "--constraint", f"predicate={predicate}", "-n", 6, "--sampler", sampler)
    # One that judges whole texts alone is not always met, but what does not meet it is told.
    met = [line["response"] for line in lines if line["constraint"] == "fulfilled"]
    assert met
    if predicate == "rules.py:sum":
        assert all("=" not in text for text in met)
    else:
        assert len(met) == 6
        assert all(re.fullmatch("[0-3]{3}", text) for text in met)


@pytest.mark.parametrize("sampler", ["plain", "awrs:particles=2", "smc:particles=2", "beam-search:beams=2"])
def test_where_nothing_may_follow_the_beginning_is_left(characters: Path, folder: Path, sampler: str) -> None:
    (folder / "trap.py").write_text(
        "def never(text):\n    return False\n\ndef two(text):\n    return text in ('0', '01')\n"
    )
    asked = [characters, "1", "--constraint", "predicate=trap.py:never,two", "--sampler", sampler]
    asked += ["--temperature", 0] if "beam" in sampler else []
    (line,) = answers(*asked)
    assert line["constraint"] == "failed"
    assert line["response"] == "01"
    result = call("generate", *asked, "--raw")
    assert result.stdout.strip() == "01"
    assert "of 1 responses, 1 with weight 0" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--constraint", "regexp=a"], "did you mean 'regex'"),
        (["--constraint", "[0-9]+"], "a constraint is KIND=VALUE: json-schema=@FILE"),
        (["--constraint", "regex="], "regex: the constraint is empty"),
        (["--constraint", "regex=a(b"], "unclosed group"),
        (["--constraint", r"regex=(a)\1"], "backreferences are not supported"),
        (["--constraint", "json-schema={"], "cannot be read: Expecting property name"),
        (["--constraint", 'json-schema={"type": "integer", "minimum": 3, "maximum": 1}'], "minimum (3) is greater"),
        (["--constraint", 'json-schema={"type": "nothing"}'], "Invalid type: nothing"),
        (["--constraint", 'lark=start: "a"\n  b'], "2(4): Expected token"),
        (["--constraint", "lark=start: missing"], 'at 1(8): unknown name: "missing"'),
        (["--constraint", "lark=@missing.lark"], "there is no file 'missing.lark'"),
        (["--constraint", "lark=@binary.bin"], "binary.bin is no text in UTF-8"),
        (["--constraint", "lark=@."], "cannot be read"),
        (["--constraint", "choice=| "], "a choice names its texts"),
        (["--constraint", "predicate=rules.py:four"], "rules.py"),
        (["--constraint", "predicate=missing.py:f"], "missing.py"),
        (["--constraint", "predicate=raises.py:f"], "ZeroDivisionError: division by zero"),
        (["--constraint", "predicate=rules.py:number"], "a predicate is a function of the text so far"),
        (["--constraint", r"regex=[^\s\S]"], "has no text that begins with a token of this tokenizer"),
        (["--constraint", "regex=a", "--stop", "x"], "--stop goes with neither"),
        (["--constraint", "regex=a", "--sampler", "soft-thinking"], "soft-thinking feeds the model mixtures"),
        (["--constraint", "regex=a", "--sampler", "token-alignment"], "which no constraint can follow"),
        (["--constraint", "regex=a", "--draft", "byte-level-probabilities"], "draws bytes"),
        (["--constraint", "regex=a", "--sampler", "awrs:constraint=rules.py:three"], "given a constraint twice"),
        (["--sampler", "awrs"], "add --constraint"),
    ],
)
def test_mistakes_are_named(model: Path, folder: Path, arguments: list[str], message: str) -> None:
    (folder / "binary.bin").write_bytes(b"\xff\xfe\x00")
    (folder / "raises.py").write_text("1 / 0\n")
    (folder / "rules.py").write_text("def three(text):\n    return len(text) == 3\n\nnumber = 3\n")
    result = call("generate", model, "1+1", "--raw", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr, result.stderr


def test_without_the_extra_its_name_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    result = call("generate", model, "1+1", "--constraint", "regex=a")
    assert result.exit_code == 1
    assert "python -m pip install 'tokenloom[constraints]'" in result.stderr


def test_what_allows_no_first_token_is_told(characters: Path, folder: Path) -> None:
    (folder / "none.py").write_text("def none(text):\n    return False\n")
    result = call("generate", characters, "1+1", "--raw", "--constraint", "predicate=none.py:none,none")
    assert result.exit_code == 2
    assert "the predicate none allows no first token" in result.stderr


def test_samplers_are_compared_under_a_constraint(model: Path, folder: Path) -> None:
    result = call("compare-samplers", model, "plain", "awrs:particles=2", "--prompt", "1", "--raw", "-n", 2,
                  "--constraint", "regex=[0-9]{2},", "--out", "page.html")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "fulfilled" in result.stdout
    assert result.stdout.count("100%") == 2
    assert Path("page.html").read_text(encoding="utf-8").count("constraint fulfilled") == 4
    lacking = call("compare-samplers", model, "plain", "awrs", "--prompt", "1")
    assert lacking.exit_code == 2
    assert "add --constraint" in lacking.stderr


def test_an_interrupted_call_is_not_gone_on_with_under_a_changed_constraint(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("generate", model, "1", "--raw", "-n", 16, "--constraint", "choice=@answers.txt", "--out", "out.jsonl")
    with monkeypatch.context() as patched:
        # Stopped when all is there but its last move.
        patched.setattr(AnswersFile, "finish", lambda self: None)
        assert call(*asked).exit_code == 0
    (folder / "answers.txt").write_text("perhaps\n", encoding="utf-8")
    result = call(*asked)
    assert result.exit_code == 2
    assert "with other settings (--constraint)" in result.stderr
