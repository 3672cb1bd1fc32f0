"""Pairs on the command line, end to end on a tiny random model: a student, heads, and methods that take them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.calling import call
from cli.tiny_run import make_tiny_model, tiny_recipe
from tokenloom.cli.distill import built_in_prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def student(model: Path) -> Path:
    prompts = model.parent / "prompts.txt"
    prompts.write_text("".join(f"{i % 4}+{i // 4}\n" for i in range(12)), encoding="utf-8")
    out = model.parent / "student"
    arguments = ("distill", model, "--layers", 1, "--tokens", 300, "--max-tokens", 8, "--prompts", prompts,
                 "--no-autocast", "--out", out)  # fmt: skip
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert "layers 1 of" in result.stdout
    again = call(*arguments)
    assert again.exit_code == 0, again.output
    assert again.stdout == result.stdout
    changed = call(*arguments, "--epochs", 1)
    assert changed.exit_code == 1
    assert "epochs 4 instead of 1" in changed.stderr.replace("\n", " ")
    quality = json.loads((out / "quality.json").read_text(encoding="utf-8"))
    for name in ("agreement", "acceptance"):
        assert f"{quality[name]:.1%}" in result.stdout
    return out


@pytest.fixture(scope="module")
def heads(model: Path) -> dict[str, Path]:
    recipe = tiny_recipe(model.parent, model)
    found = {}
    for kind in ("reward", "value"):
        out = found[kind] = model.parent / f"{kind}.safetensors"
        result = call(
            "fit-head", model, "--kind", kind, "--recipe", recipe, "--problems", 16, "--samples", 4, "--out", out
        )
        assert result.exit_code == 0, result.output
        assert f"{kind} head: AUROC" in result.stdout
        assert json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))["training"] <= 64
    return found


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("speculative-sampling:draft={student},drafts=2", "acceptance"),
        ("recursive-rejection:draft={student}", "acceptance"),
        ("contrastive-decoding:amateur={student},alpha=0.2", "acceptance"),
        ("rad:reward={reward},k=3", "reward head: AUROC"),
        ("rad:reward={reward},reward_tokenizer={model},k=3", "reward head: AUROC"),
        ("rmod:values={value},candidates=2,block=3", "value head: AUROC"),
    ],
)
def test_methods_take_them_by_name_and_say_how_good_they_are(
    model: Path, student: Path, heads: dict[str, Path], method: str, says: str
) -> None:
    named = method.format(student=student, model=model, **heads)
    result = call("generate", model, "1+1", "--sampler", named, "--seed", 1, "--max-tokens", 6)
    assert result.exit_code == 0, result.output
    assert says in result.stderr.replace("\n", " ")
    assert call("generate", model, "1+1", "--sampler", named, "--seed", 1, "--max-tokens", 6).stdout == result.stdout


def test_drafts_of_the_student_leave_greedy_text_as_it_is(model: Path, student: Path) -> None:
    plain = call("generate", model, "2+3", "--temperature", 0, "--max-tokens", 20, "--sampler", "plain")
    drafted = call("generate", model, "2+3", "--temperature", 0, "--max-tokens", 20,
                   "--draft", f"speculative-sampling:draft={student},nodes=3")  # fmt: skip
    assert drafted.exit_code == 0, drafted.output
    assert drafted.stdout == plain.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit-head", "{model}", "--kind", "reward", "--out", "head.bin"], "ending in .safetensors"),
        (["fit-head", "{model}", "--kind", "value", "--recipe", "quikstart", "--out", "x.safetensors"], "did you mean"),
        (["distill", "{model}", "--prompts", "none.txt", "--out", "x"], "there is no file none.txt"),
        (["distill", "{model}", "--layers", "3", "--out", "{folder}/x"], "keeps 1 to 2"),
        (["generate", "{model}", "1", "--sampler", "rad:reward=none.safetensors"], "there is no file none.safetensors"),
    ],
)
def test_mistakes_are_named(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = call(*(a.format(model=model, folder=tmp_path) for a in arguments))
    assert result.exit_code in (1, 2)
    assert message in result.stderr.replace("\n", " ")


def test_built_in_prompts_are_many_and_differ() -> None:
    prompts = [str(p) for p in built_in_prompts()]
    assert len(prompts) > 150
    assert len(set(prompts)) == len(prompts)
    assert all(p.strip() == p and p for p in prompts)
