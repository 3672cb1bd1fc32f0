"""The commands as a user meets them: messages, exit codes, files. Runs are real, with a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cli.calling import call
from cli.tiny_run import make_tiny_model, tiny_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny-model, tiny.yaml and problems.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_recipe(folder, make_tiny_model(folder))
    return folder


@pytest.fixture(scope="module")
def run(made: Path) -> Path:
    """A finished run of two steps."""
    result = call("train", made / "tiny.yaml", "train.steps=2", "--out", made / "run")
    assert result.exit_code == 0, result.output
    return made / "run"


def test_version_and_help() -> None:
    import tokenloom

    assert call("--version").output == f"tokenloom {tokenloom.__version__}\n"
    assert call("--help").exit_code == 0
    for name in (
        "train", "eval", "compare", "report", "generate", "compare-samplers", "distill", "fit-head", "unslop",
        "methods", "recipes", "doctor",
    ):  # fmt: skip
        text = call(name, "--help").output
        assert "Examples:" in text
        assert f"tokenloom {name}" in text, name


# -- wrong command lines ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train"], "which recipe?"),
        (["train", "quikstart"], "did you mean 'quickstart'?"),
        (["train", "quickstart", "train.step=4"], "train.step: unknown key; did you mean 'steps'?"),
        (["train", "quickstart", "trane.steps=4"], "trane: unknown key; did you mean 'train'?"),
        (["train", "quickstart", "rollout.group_size=many"], "rollout.group_size = 'many'"),
        (["train", "quickstart", "algorithm=gropo"], "did you mean 'grpo'"),
        (["train", "quickstart", "rollout"], "'rollout' is not of the form"),
        (["train", "--resume", "nowhere"], "nowhere is not a run folder"),
        (["train", "quickstart", "--force"], "--force goes with --resume"),
        (["methods", "gpso"], "did you mean 'gspo'"),
        (["methods", "--stage", "surogate"], "did you mean 'surrogate'"),
        (["recipes", "quickstrat"], "did you mean 'quickstart'?"),
        (["eval", "some-model"], "--recipe quickstart"),
        (["eval", "some-model", "--recipe", "quickstart", "--k", "1,x"], "--k '1,x'"),
        (["eval", "some-model", "--recipe", "quickstart", "--k", "64"], "--samples 64"),
        (["eval", "some-model", "--task", "source"], "not of the form key=value"),
        (["generate", "some-model"], "give a PROMPT"),
        (["generate", "some-model", "--prompts", "none.txt"], "there is no file none.txt"),
        (["generate", "some-model", "hello", "--out", "no/such/folder.jsonl"], "no folder no/such"),
    ],
)
def test_a_wrong_command_line_is_explained(arguments: list[str], says: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert says in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output


def test_failures_exit_with_1_and_debugging_shows_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = call("report", tmp_path / "none")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "does not exist" in result.stderr
    monkeypatch.setenv("TOKENLOOM_DEBUG", "1")
    assert isinstance(call("report", tmp_path / "none").exception, ValueError)


def test_a_missing_tracker_is_refused_before_anything_is_made(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = call("train", made / "tiny.yaml", "log.trackers=[wandb]", "--out", made / "tracked")
    assert result.exit_code == 2
    assert "pip install 'tokenloom[wandb]'" in result.stderr
    assert not (made / "tracked").exists()


# -- the catalog and recipes ------------------------------------------------------------------------


def test_methods_as_json_holds_the_whole_catalog() -> None:
    from tokenloom import catalog

    found = json.loads(call("methods", "--json").output)
    assert [m["slug"] for m in found] == list(catalog.methods())
    for method in found:
        assert all(isinstance(method[k], str) and method[k] for k in ("slug", "family", "stage", "paper", "formula"))
        assert method["stage"] == ", ".join(method["stages"])
    one = next(m for m in found if m["slug"] == "grpo")
    assert one["defaults"]["grpo"]["eps"] == 1e-6
    assert set(one["preset"]["composition"]) == set(one["dialects"]) >= {"paper", "trl", "verl"}
    assert json.loads(call("methods", "grpo", "--json").output) == [one]


def test_methods_filters_and_shows_one_in_full() -> None:
    stages = {m["slug"] for m in json.loads(call("methods", "--stage", "surrogate", "--json").output)}
    assert "ppo-clip" in stages
    assert "grpo" not in stages
    text = call("methods", "gspo").output
    for piece in ("arXiv:2507.18071", "normalize", "dialect=trl", "algorithm=gspo", "made of"):
        assert piece in text


def test_recipes_lists_prints_and_gives_the_schema(tmp_path: Path) -> None:
    assert "quickstart" in call("recipes").output
    written = call("recipes", "quickstart").output
    copy = tmp_path / "copy.yaml"
    copy.write_text(written, encoding="utf-8")
    resolved = call("recipes", copy, "--resolved").output
    assert yaml.safe_load(resolved) == yaml.safe_load(call("recipes", "quickstart", "--resolved").output)
    assert yaml.safe_load(resolved)["rollout"]["top_k"] == 0
    assert json.loads(call("recipes", "--schema").output)["title"] == "Tokenloom recipe"


# -- training ---------------------------------------------------------------------------------------


def test_train_leaves_a_run_and_says_where_everything_is(run: Path) -> None:
    for name in ("recipe.yaml", "metrics.jsonl", "tokens.jsonl", "model/config.json"):
        assert (run / name).is_file(), name
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["kind"], r["step"]) for r in records] == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]


def test_train_prints_a_line_a_step_and_what_to_try_next(made: Path) -> None:
    result = call("train", made / "tiny.yaml", "train.steps=2", "--out", made / "told", "--no-report")
    lines = result.output.splitlines()
    assert result.exit_code == 0
    assert sum(line.startswith("step ") for line in lines) == 2
    assert sum(line.startswith("held-out ") for line in lines) == 2
    assert "16 training and 8 held-out" in result.output
    assert "surrogate" in result.output
    assert f"tokenloom eval {made / 'told'} --samples 16" in result.output
    assert not (made / "told" / "report.html").exists()


def test_quiet_says_only_where_the_results_are(made: Path) -> None:
    result = call("train", made / "tiny.yaml", "train.steps=1", "--out", made / "quiet", "--quiet")
    assert result.output.startswith("Done: 1 steps")
    assert str(made / "quiet" / "model") in result.output
    assert "step 1/1" not in result.output


def test_a_run_folder_is_never_overwritten(made: Path, run: Path) -> None:
    result = call("train", made / "tiny.yaml", "--out", run)
    assert result.exit_code == 2
    assert f"train --resume {run}" in result.stderr.replace("\n", " ")


def test_the_default_folder_is_the_next_free_one(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for number in ("001", "002"):
        assert call("train", made / "tiny.yaml", "train.steps=1", "name=my run/1", "-q").exit_code == 0
        assert (tmp_path / "runs" / f"my-run-1-{number}" / "model").is_dir()


def test_resuming_a_finished_run_says_so(run: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    result = call("train", "--resume", run)
    assert result.exit_code == 0
    assert "finished; there is nothing to resume" in result.output
    assert (run / "metrics.jsonl").read_bytes() == before


def test_resuming_with_another_recipe_shows_the_difference_and_is_refused(made: Path) -> None:
    folder = made / "longer"
    assert call("train", made / "tiny.yaml", "train.steps=1", "--out", folder, "-q").exit_code == 0
    refused = call("train", "--resume", folder, "train.steps=2")
    assert refused.exit_code == 2
    assert refused.stdout.splitlines()[-1].split() == ["train.steps", "1", "2"]
    assert yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["train"]["steps"] == 1
    forced = call("train", "--resume", folder, "train.steps=2", "--force")
    assert forced.exit_code == 0, forced.output
    assert yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["train"]["steps"] == 2
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2]


def test_a_forced_recipe_that_does_not_fit_the_checkpoint_replaces_nothing(made: Path) -> None:
    folder = made / "unfit"
    assert call("train", made / "tiny.yaml", "train.steps=1", "--out", folder, "-q").exit_code == 0
    before = (folder / "recipe.yaml").read_bytes()
    result = call("train", "--resume", folder, "model.lora.rank=2", "--force")
    assert result.exit_code == 1
    assert "another policy" in result.stderr
    assert (folder / "recipe.yaml").read_bytes() == before


def test_dry_run_loads_no_weights_and_makes_no_folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenloom.policy import Policy, loading

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Policy, "load", refuse)
    monkeypatch.setattr(loading, "load_model", refuse)
    monkeypatch.chdir(made)
    result = call("train", made / "tiny.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    for piece in ("ppo-clip", "16 training and 8 held-out", "48 responses", "logprobs, ref_logprobs", "estimate", "GB"):
        assert piece in result.output, piece
    assert not (made / "runs").exists()


# -- looking at runs and models -----------------------------------------------------------------------


def test_eval_measures_a_run_and_a_model(made: Path, run: Path) -> None:
    result = call("eval", run, "--samples", 4, "--k", "1,4", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["problems"], found["samples"]) == (8, 4)
    for name in ("greedy", "sampled", "pass@1", "pass@4"):
        assert 0 <= found[name]["low"] <= found[name]["value"] <= found[name]["high"] <= 1
    assert found["pass@1"] == pytest.approx(found["sampled"])
    assert found["pass@4"]["value"] >= found["pass@1"]["value"]
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert found["greedy"]["value"] == pytest.approx(last["greedy"])
    task = [
        "--task",
        f"source={made / 'problems.jsonl'}",
        "--task",
        "heldout=8",
        "--task",
        "rewards=[{verifier: number}]",
    ]
    table = call("eval", made / "tiny-model", *task, "--samples", 0, "--max-tokens", 4)
    assert table.exit_code == 0, table.output
    first = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert f"{first['greedy']:.1%}" in table.stdout


def test_a_run_without_a_model_says_how_to_get_one(made: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((made / "tiny.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    result = call("generate", tmp_path, "1+1")
    assert result.exit_code == 2
    assert f"train --resume {tmp_path}" in result.stderr.replace("\n", " ")


def test_generate_shows_control_characters_as_text(run: Path) -> None:
    arguments = ("generate", run, "1+1", "--seed", 3, "-n", 8, "--max-tokens", 20)
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "\\u001b" in result.stdout
    assert result.stdout.count("[8] ") == 1
    assert call(*arguments).stdout == result.stdout


def test_generate_reads_files_and_writes_json_lines(made: Path, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "1+2"}]}
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "1+1"}) + "\n\n" + json.dumps(chat) + "\n", encoding="utf-8"
    )
    out = tmp_path / "out.jsonl"
    model = made / "tiny-model"
    result = call("generate", model, "--prompts", tmp_path / "p.jsonl", "-n", 2, "--max-tokens", 5, "--out", out)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [x["prompt"] for x in lines] == ["1+1", "1+1", chat["messages"], chat["messages"]]
    assert all(1 <= x["tokens"] <= 5 and x["logprob"] <= 0 for x in lines)
    (tmp_path / "bad.jsonl").write_text('{"promt": "1+1"}\n', encoding="utf-8")
    wrong = call("generate", model, "--prompts", tmp_path / "bad.jsonl")
    assert wrong.exit_code == 2
    assert "bad.jsonl, line 1" in wrong.stderr.replace("\n", "")
    assert call("generate", model, "-", "--seed", 1, input="1+1").exit_code == 0


def test_report_and_compare_write_pages(run: Path, tmp_path: Path) -> None:
    result = call("report", run, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "held-out greedy" in result.output
    assert (tmp_path / "page.html").is_file()
    both = call("compare", run, run, "--out", tmp_path / "both.html")
    assert both.exit_code == 0, both.output
    assert "The recipes do not differ." in both.output
    assert (tmp_path / "both.html").is_file()


def test_doctor_tells_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path / "cache"))
    text = call("doctor").output
    for piece in ("PyTorch", "float32 products", "transformers", "disk for runs", "smollm2-135m-instruct"):
        assert piece in text, piece
    found = json.loads(call("doctor", "--json").output)
    assert found["Models and disk"]["cache"]["value"] == str(tmp_path / "cache")
    assert found["Models and disk"]["smollm2-135m-instruct"]["value"] in ("installed", "missing")


def test_methods_fit_narrow_terminals_and_say_how_they_are_called() -> None:
    narrow = call("methods", "--family", "decoding", env={"COLUMNS": "60"})
    assert narrow.output.splitlines()[0].split() == ["method", "what", "it", "does"]
    assert max(map(len, narrow.output.splitlines())) <= 60
    assert "paper" in call("methods", "--family", "decoding").output.splitlines()[0]
    for slug, option in (
        ("top-h", "--sampler top-h"),
        ("rad", "--sampler rad:reward=..."),
        ("stand", "--draft stand"),
        ("speculative-sampling", "--draft speculative-sampling:draft=..."),
        ("awrs", "--sampler awrs --constraint KIND=VALUE"),
    ):
        lines = [line.strip() for line in call("methods", slug).output.splitlines()]
        assert any(line.endswith(f"generate MODEL PROMPT {option}") for line in lines), slug
