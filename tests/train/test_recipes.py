"""Recipes: overrides, what is refused and in which words, and that a resolved recipe means the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import presets
from tokenloom.train.plain import MAX_VALUES, plain, read_yaml, write_yaml
from tokenloom.train.recipe import RecipeError, build_recipe, differences, load_recipe, recipe_names, recipe_schema
from train.setups import Tiny, train

BASE: dict[str, Any] = {
    "task": {"source": "reasoning_gym:chain_sum", "rewards": [{"verifier": "number"}]},
    "algorithm": "grpo",
}


def refused(overrides: list[str], base: dict[str, Any] | None = None, tmp: Path | None = None) -> str:
    assert tmp is not None
    file = tmp / "r.yaml"
    file.write_text(yaml.safe_dump(BASE | (base or {})), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides, check_files=False)
    text = str(caught.value)
    assert "pydantic" not in text
    assert "Traceback" not in text
    return text


def resolved(overrides: list[str], tmp: Path) -> dict[str, Any]:
    file = tmp / "r.yaml"
    file.write_text(yaml.safe_dump(BASE), encoding="utf-8")
    return load_recipe(file, overrides, check_files=False).resolved()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        # unknown keys, with the nearest known one, at every level
        ("trian.steps=3", "trian: unknown key; did you mean 'train'"),
        ("train.step=3", "train.step: unknown key; did you mean 'steps'"),
        ("train.eval.sample=3", "train.eval.sample: unknown key; did you mean 'samples'"),
        ("train.early_stop.targt=1", "train.early_stop.targt: unknown key; did you mean 'target'"),
        ("model.lora.rnk=1", "model.lora.rnk: unknown key; did you mean 'rank'"),
        ("rollout.group=4", "rollout.group: unknown key; did you mean 'group_size'"),
        ("task.rewards=[{verifer: number}]", "task.rewards.0.verifer: unknown key; did you mean 'verifier'"),
        ("task.heldout={sorce: a.jsonl}", "task.heldout.sorce: unknown key; did you mean 'source'"),
        ("log.tracker=[]", "log.tracker: unknown key; did you mean 'trackers'"),
        ("algorithm.kl_coeff=0", "did you mean 'kl_coef'"),
        ("algorithm.surrogat=ppo-clip", "did you mean 'surrogate'"),
        ("algorithm.bounds.hihg=0.3", "did you mean 'high'"),
        ("algorithm=grop", "did you mean 'grpo'"),
        ("learning_rate=1", "learning_rate: unknown key; did you mean 'train.learning_rate'"),
        # wrong types
        ("train.steps=true", "train.steps = True: must be a whole number"),
        ("train.steps='3'", "train.steps = '3': must be a whole number"),
        ("train.steps=3.5", "train.steps = 3.5: must be a whole number"),
        ("train.steps=many", "train.steps = 'many': must be a whole number"),
        ("train.steps=null", "train.steps = None: must be a whole number"),
        ("train.learning_rate=false", "train.learning_rate = False: must be a number"),
        ("train.learning_rate=.nan", "train.learning_rate = nan: must be a finite number"),
        ("train.learning_rate=.inf", "train.learning_rate = inf: must be a finite number"),
        ("log.report=1", "log.report = 1: must be true or false"),
        ("model.name=135", "model.name = 135: must be text"),
        ("algorithm=3", "algorithm = 3: must be text or a mapping"),
        ("task.heldout=true", "task.heldout = True"),
        ("task.heldout='0.2'", "task.heldout = '0.2': must be a whole number or a number or a section"),
        ("train=3", "train = 3: must be a section"),
        ("task.prompt_suffix=Answer: no", "task.prompt_suffix = {'Answer': False}: must be text"),
        ("log.trackers=wandb", "log.trackers = 'wandb': must be a list"),
        ("log.trackers=[wandb, tensorbord]", "log.trackers.1 = 'tensorbord'"),
        ("train.betas=[0.9]", "train.betas"),
        ("train.betas=[0.9, 1.0]", "train.betas.1 = 1.0: must be less than 1"),
        ("rollout.stop=[1]", "rollout.stop.0 = 1: must be text"),
        ("algorithm.kl_coef=high", "kl_coef = 'high' is not allowed; it takes a number"),
        # values out of range
        ("train.steps=0", "train.steps = 0: must be greater than or equal to 1"),
        ("train.schedule=cosin", "'cosin': must be 'constant', 'linear' or 'cosine'; did you mean 'cosine'"),
        ("model.dtype=fp16", "model.dtype = 'fp16': must be 'float32' or 'bfloat16'"),
        ("rollout.temperature=0", "temperature 0 is greedy"),
        ("task.rewards=[{verifier: nubmer}]", "number"),
        ("task.heldout=1.5", "strictly between 0 and 1"),
        # impossible combinations
        ("rollout.group_size=1", "rollout.group_size = 1"),
        ("algorithm.updates.mini_batches=9", "algorithm.updates.mini_batches = 9 exceeds"),
        ("train.warmup_steps=50", "train.warmup_steps = 50 leaves no step of train.steps = 50"),
        ("train.early_stop={}", "no reason to stop"),
        ("train.early_stop={target: 0.5}", "train.eval.every = 0"),
        ("task.curriculum=true", "curriculum"),
        ("task.environment=calculater", "calculator"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, override: str, says: str) -> None:
    assert says in refused([override], tmp=tmp_path)


def test_more_impossible_combinations(tmp_path: Path) -> None:
    sampled = ["train.early_stop={metric: sampled, target: 1}", "train.eval.every=5", "train.eval.samples=0"]
    assert "nothing is sampled" in refused(sampled, tmp=tmp_path)
    assert "multi-turn" in refused(["algorithm=dapo", "task.environment=calculator"], tmp=tmp_path)
    lonely = ["algorithm=dapo", "algorithm.advantage=reinforce", "rollout.group_size=1"]
    assert "nothing would ever be kept" in refused(lonely, tmp=tmp_path)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    text = refused(["train.step=3", "model.dtype=fp16", "rollout.group_size=x"], tmp=tmp_path)
    assert len(text.splitlines()) == 4


def test_what_is_missing_is_named() -> None:
    with pytest.raises(RecipeError, match="task: missing"):
        build_recipe({"algorithm": "grpo"})
    with pytest.raises(RecipeError, match="algorithm: missing"):
        build_recipe({"task": BASE["task"]})


def test_a_missing_file_and_an_unknown_data_set_are_found_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothere"):
        build_recipe(BASE | {"task": {"source": str(tmp_path / "nothere.jsonl")}})
    with pytest.raises(RecipeError, match="chain_sum"):
        build_recipe(BASE | {"task": {"source": "reasoning_gym:chain_sun"}})


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=7", "train.steps", 7),
        ("train.learning_rate=1e-5", "train.learning_rate", 1e-5),
        ("train.learning_rate=2E-4", "train.learning_rate", 2e-4),
        ("train.learning_rate=1", "train.learning_rate", 1.0),
        ("train.max_grad_norm=null", "train.max_grad_norm", None),
        ("train.max_grad_norm=", "train.max_grad_norm", None),
        ("train.eval.every=3", "train.eval.every", 3),
        ("model.lora={rank: 4}", "model.lora.rank", 4),
        ("model.lora.rank=4", "model.lora.rank", 4),
        ("rollout.stop=['a b', \"=\", '1e5']", "rollout.stop", ["a b", "=", "1e5"]),
        ("rollout.stop=x=y", "rollout.stop", ["x=y"]),
        ("task.prompt_suffix='1e-5'", "task.prompt_suffix", "1e-5"),
        ("task.prompt_suffix=2024-01-01", "task.prompt_suffix", "2024-01-01"),
        ("task.rewards.0.weight=0.5", "task.rewards", None),
        ("task.params.max_terms=3", "task.params.max_terms", 3),
        ("algorithm=dapo", "algorithm", "dapo"),
        ("algorithm.bounds.high=0.3", "algorithm.bounds.high", 0.3),
        ("algorithm.kl_coef=1e-3", "algorithm.kl_coef", 1e-3),
        ("algorithm.terms.kl=null", "algorithm.terms.kl", None),
        ("  train.steps = 7 ", "train.steps", 7),
    ],
)
def test_overrides(tmp_path: Path, override: str, key: str, value: Any) -> None:
    here: Any = resolved([override], tmp_path)
    if key == "task.rewards":
        assert here["task"]["rewards"] == [{"verifier": "number", "weight": 0.5, "params": {}}]
        return
    for name in key.split("."):
        here = here[name]
    assert here == value
    assert type(here) is type(value)


def test_overrides_come_in_order_and_stages_may_be_short(tmp_path: Path) -> None:
    found = resolved(["algorithm=dapo", "algorithm.bounds=clip", "algorithm.bounds.high=0.4"], tmp_path)
    assert found["algorithm"] == {"preset": "dapo", "bounds": {"part": "clip", "high": 0.4}}
    assert resolved(["train.steps=3", "train.steps=4"], tmp_path)["train"]["steps"] == 4


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps", "section.key=value"),
        ("=3", "section.key=value"),
        ("train..steps=3", "section.key=value"),
        (".train=3", "section.key=value"),
        ("train.steps.more=3", "train.steps = {'more': 3}: must be a whole number"),
        ("name.more=3", "name is 'r'"),
        ("rollout.stop=[", "not valid YAML"),
        ("task.rewards.7.weight=1", "a list with the entries 0 to 0"),
        ("task.rewards.first.weight=1", "there is no 'first' in it"),
        ("rollout.stop=!!python/object/apply:os.system [echo]", "not valid YAML"),
        ("train={steps: 1, steps: 2}", "stands there twice"),
    ],
)
def test_overrides_that_are_malformed(tmp_path: Path, override: str, says: str) -> None:
    assert says in refused([override], {"name": "r"}, tmp_path)


def test_yaml_that_grows_is_refused(tmp_path: Path) -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(RecipeError, match=f"more than {MAX_VALUES} values"):
        read_yaml(bomb, "bomb")
    for text in ("a: &a [*a]", "a: &a {b: *a}", "[" * 100 + "]" * 100):
        with pytest.raises(RecipeError, match="nested"):
            read_yaml(text, "loop")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_yaml("[" * 50_000, "deep")


def test_anchors_and_merges_work() -> None:
    text = "base: &b {steps: 3, seed: 1}\ntrain: {<<: *b, seed: 2}\nagain: *b\n"
    assert read_yaml(text, "r") == {
        "base": {"steps": 3, "seed": 1}, "train": {"steps": 3, "seed": 2}, "again": {"steps": 3, "seed": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {steps: 1}\ntrain: {}", "'train' stands there twice"),
        ("1: 2", "key 1"),
        ("a: {true: 2}", "key True in a"),
        ("a: !!binary aGk=", "a is a bytes"),
        ("a: [!!set {x}]", "a.0 is a set"),
        ("a: !!timestamp 2024-01-01", "a is a date"),
        ("{a: b: c}", "not valid YAML"),
        ("a: !!python/name:os.system", "not valid YAML"),
    ],
)
def test_yaml_that_is_no_plain_data_is_refused(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        read_yaml(text, "r")


def test_yaml_comes_back() -> None:
    data = {
        "numbers": [1, 1.0, 1e-5, 2.5e-11, 1e22, -math.inf, 0.1],
        "text": [
            "1e-5",
            "1",
            "true",
            "null",
            "~",
            "2024-01-01",
            "",
            " x ",
            "a: b",
            "é\u2028\n",
            "1:30",
            "0x1",
            "on",
            "=",
        ],
        "nothing": [None, True, [], {}],
    }
    back = read_yaml(write_yaml(data), "r")
    assert back == data
    assert [type(v) for v in back["numbers"]] == [type(v) for v in data["numbers"]]
    shared = [1]
    assert "&" not in write_yaml({"a": shared, "b": shared})
    assert plain((1, (2,)), "r") == [1, [2]]


def test_a_resolved_recipe_means_the_same(tmp_path: Path) -> None:
    for algorithm in sorted(presets()):
        text = {"path": "text.txt"} if Algorithm.from_recipe(algorithm).corpus else None
        recipe = build_recipe(BASE | {"algorithm": {"preset": algorithm}, "corpus": text}, check_files=False)
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        again = load_recipe(tmp_path, check_files=False)
        assert again.resolved() == recipe.resolved()
        assert again == recipe
        assert differences(recipe.resolved(), again.resolved()) == {}
    odd = {"bounds": {"part": "clip", "cap": math.inf}, "preset": "grpo"}
    recipe = build_recipe(BASE | {"algorithm": odd, "rollout": {"stop": ["1e-5"]}}, check_files=False)
    assert recipe.resolved()["algorithm"]["bounds"]["cap"] == math.inf
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path, check_files=False) == recipe


def test_a_critic_is_added_where_it_is_needed() -> None:
    recipe = build_recipe(BASE | {"algorithm": "ppo-gae"}, check_files=False)
    assert recipe.resolved()["model"]["value_head"] == {"detach": False}
    assert build_recipe(BASE, check_files=False).resolved()["model"]["value_head"] is None


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_shipped_recipes_resolve_and_fit_the_schema(name: str) -> None:
    import jsonschema

    recipe = load_recipe(name, check_files=False)
    assert recipe.name == name
    assert recipe.description
    validator = jsonschema.Draft202012Validator(recipe_schema())
    assert list(validator.iter_errors(json.loads(json.dumps(recipe.resolved())))) == []
    assert list(validator.iter_errors(recipe.resolved() | {"trian": 1})) != []


def test_unknown_recipes_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        load_recipe("quikstart")
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    (tmp_path / "list.yaml").write_text("- a", encoding="utf-8")
    with pytest.raises(RecipeError, match="a mapping with the keys name, description, model"):
        load_recipe(tmp_path / "list.yaml")
    # A folder that happens to be named like a shipped recipe does not hide it.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert load_recipe("quickstart", check_files=False).name == "quickstart"


def test_a_run_folder_is_a_recipe(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(train={"steps": 1, "eval": {"samples": 0, "problems": 1}})
    train(recipe, tmp_path / "a")
    again = load_recipe(tmp_path / "a")
    assert again == recipe
    train(again, tmp_path / "b")
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    changed = load_recipe(tmp_path / "a", ["train.seed=1"])
    assert differences(recipe.resolved(), changed.resolved()) == {"train.seed": (0, 1)}
