"""The loop: determinism, every preset, micro-batches, early stop, what is left behind."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import presets
from tokenloom.plan import Update
from tokenloom.train.recipe import Recipe, build_recipe
from tokenloom.train.session import Session
from train.setups import EVAL, Remembers, Tiny, lines, same_results, steps, train, weights


def after(recipe: Recipe, run: Path, count: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Trainable weights after `count` bare steps, and the lines of metrics."""
    with Session(recipe, run, []) as session:
        for step in range(count):
            session.trainer.step(step)
        return copies(session), lines(run)


def copies(session: Session) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in session.trainer.policy.trainable_parameters()}


def test_a_seed_decides_everything(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe()
    train(recipe, tmp_path / "a")
    torch.rand(7)  # the state of the process must not matter
    train(recipe, tmp_path / "b")
    same_results(tmp_path / "a", tmp_path / "b")
    train(tiny.recipe(train={"steps": 3, "seed": 1, "learning_rate": 0.01, "eval": EVAL}), tmp_path / "c")
    assert (tmp_path / "a/metrics.jsonl").read_bytes() != (tmp_path / "c/metrics.jsonl").read_bytes()
    assert not torch.equal(weights(tmp_path / "a")["lm_head.weight"], weights(tmp_path / "c")["lm_head.weight"])


def test_what_a_run_leaves_behind(tiny: Tiny, tmp_path: Path) -> None:
    outcome, _ = train(tiny.recipe(), tmp_path)
    kinds = [(line["step"], line["kind"]) for line in lines(tmp_path)]
    assert kinds == [(0, "eval"), (1, "train"), (2, "train"), (3, "train"), (3, "eval")]
    assert outcome.steps == 3
    assert not outcome.stopped_early
    first, last = lines(tmp_path)[0], lines(tmp_path)[-1]
    assert outcome.before is not None
    assert (outcome.before.greedy, outcome.after.greedy) == pytest.approx((first["greedy"], last["greedy"]), abs=1e-5)
    for line in steps(tmp_path):
        assert 0 <= line["accuracy"] <= 1
        assert line["reward"] == line["accuracy"]
        assert line["grad_norm"] > 0
        assert line["lr"] == 0.01
        assert 0 < line["entropy"] < math.log(12)
        assert 1 <= line["response_length"] <= 3
    assert [line["step"] for line in lines(tmp_path, "timing.jsonl")] == [1, 2, 3]
    assert [line["step"] for line in lines(tmp_path, "samples.jsonl")] == [0, 0, 3, 3]
    assert sorted({line["step"] for line in lines(tmp_path, "tokens.jsonl")}) == [1, 3]
    hidden = [p.name for p in tmp_path.rglob(".*") if p.name != ".lock"]
    assert hidden == []


def test_the_learning_rate_follows_its_schedule(tiny: Tiny, tmp_path: Path) -> None:
    schedule = {"steps": 3, "learning_rate": 0.01, "warmup_steps": 1, "schedule": "linear", "eval": EVAL}
    train(tiny.recipe(train=schedule), tmp_path)
    assert [line["lr"] for line in steps(tmp_path)] == [0.005, 0.01, 0.0]


ALGORITHMS: list[dict[str, Any]] = [{"preset": slug} for slug in sorted(presets())]
ALGORITHMS += [{"preset": "segment-po", "samples": 2}, {"preset": "segment-po", "kind": "tree"}]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: "-".join(map(str, a.values())))
def test_every_preset_trains(tiny: Tiny, tmp_path: Path, algorithm: dict[str, Any]) -> None:
    (tmp_path / "text.txt").write_text("0 1 2 3 " * 9, encoding="utf-8")
    text = {"path": str(tmp_path / "text.txt")} if Algorithm.from_recipe(algorithm).corpus else None
    recipe = tiny.recipe(
        algorithm=algorithm, rollout={"prompts_per_step": 4, "group_size": 4, "max_tokens": 3}, corpus=text
    )
    with Session(recipe, tmp_path / "run", []) as session:
        start = copies(session)
        session.trainer.step(0)
        session.trainer.step(1)
        moved, record = copies(session), lines(tmp_path / "run")
    assert all(bool(p.isfinite().all()) for p in moved.values())
    assert not all(torch.equal(moved[n], start[n]) for n in start)
    assert len(record) == 2
    for line in record:
        assert "skipped_updates" not in line
        assert all(v is not None and math.isfinite(v) for v in line.values() if not isinstance(v, str)), line


@pytest.mark.parametrize(
    "algorithm",
    [
        {"preset": "grpo"},
        {"preset": "ppo-gae", "updates": {"epochs": 2, "mini_batches": 2}},
        {"preset": "dapo", "updates": {"mini_batches": 2}},
        {"preset": "clip-cov", "updates": {"epochs": 2}},
    ],
    ids=lambda a: a["preset"],
)
def test_micro_batches_do_not_change_the_step(tiny: Tiny, tmp_path: Path, algorithm: dict[str, Any]) -> None:
    def recipe(tokens: int) -> Recipe:
        # Adam divides by |g| + eps: with a large eps its step is a smooth function of the gradient.
        training = {"steps": 3, "learning_rate": 0.05, "adam_eps": 1.0, "micro_batch_tokens": tokens, "eval": EVAL}
        return tiny.recipe(algorithm=algorithm, train=training)

    whole, whole_lines = after(recipe(10_000), tmp_path / "whole", 2)
    split, split_lines = after(recipe(1), tmp_path / "split", 2)
    # A gradient is a sum of at most 12 rows x 3 tokens, summed in another order: n * eps relative to its largest
    # terms, which are of order 1 here; the learning rate scales it once more, two steps add up.
    tolerance = 2 * 0.05 * 36 * torch.finfo(torch.float32).eps
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=0, atol=tolerance)
    for a, b in zip(whole_lines, split_lines, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-5)), key


def test_rows_without_effect_may_be_left_out(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(algorithm={"preset": "grpo", "kl_coef": 0.0}, train={"adam_eps": 1.0, "eval": EVAL})
    skipping, record = after(recipe, tmp_path / "skipping", 2)
    assert any(line["plan/live"] < 1 for line in record)
    monkeypatch.setattr(Update, "live_rows", property(lambda u: torch.arange(len(u))))
    everything, _ = after(recipe, tmp_path / "everything", 2)
    tolerance = 2 * 1e-5 * 36 * torch.finfo(torch.float32).eps + torch.finfo(torch.float32).eps
    for name, value in everything.items():
        torch.testing.assert_close(skipping[name], value, rtol=1e-6, atol=tolerance)


def test_updates_of_a_batch_are_steps_of_the_optimizer(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(algorithm={"preset": "grpo", "updates": {"epochs": 2, "mini_batches": 3}})
    with Session(recipe, tmp_path, []) as session:
        session.trainer.step(0)
        state = session.trainer.optimizer.state()
        counts = {int(v) for k, v in state.items() if k.split("/")[0] == "step"}
    # A mini-batch without a live row is no step.
    assert max(counts) <= 6
    assert max(counts) >= 2
    assert lines(tmp_path)[0]["ratio/abs_log"] > 0


def test_it_stops_early_at_a_target(tiny: Tiny, tmp_path: Path) -> None:
    training = {"steps": 9, "early_stop": {"target": 0.0}, "eval": EVAL | {"every": 2}, "checkpoint_every": 0}
    outcome, seen = train(tiny.recipe(train=training), tmp_path)
    assert outcome.stopped_early
    assert outcome.steps == 2
    assert any("reached 0.0" in m for m in seen.messages)
    again, _ = train(tiny.recipe(train=training), tmp_path, resume=True)
    assert (again.steps, again.stopped_early) == (2, True)
    # Without the reason to stop, it goes on.
    more, _ = train(tiny.recipe(train=training | {"early_stop": None, "steps": 4}), tmp_path, resume=True, force=True)
    assert (more.steps, more.stopped_early) == (4, False)


def test_it_stops_early_without_progress(tiny: Tiny, tmp_path: Path) -> None:
    # A learning rate that changes nothing: no evaluation is better than the first.
    training = {"steps": 9, "learning_rate": 1e-12, "early_stop": {"patience": 2}, "eval": EVAL | {"every": 1}}
    outcome, seen = train(tiny.recipe(train=training), tmp_path)
    assert outcome.steps == 3
    assert any("in 2 evaluations" in m for m in seen.messages)


def test_a_finished_run_stays_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe()
    train(recipe, tmp_path)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()}
    outcome, _ = train(recipe, tmp_path, resume=True)
    assert outcome.steps == 3
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_finished_run_can_be_made_longer(tiny: Tiny, tmp_path: Path) -> None:
    short = {"steps": 2, "learning_rate": 0.01, "eval": EVAL}
    train(tiny.recipe(train=short), tmp_path)
    outcome, _ = train(tiny.recipe(train=short | {"steps": 4}), tmp_path, resume=True, force=True)
    assert outcome.steps == 4
    kinds = [(line["step"], line["kind"]) for line in lines(tmp_path)]
    assert kinds == [(0, "eval"), (1, "train"), (2, "train"), (2, "eval"), (3, "train"), (4, "train"), (4, "eval")]


def test_the_model_loads_with_transformers(tiny: Tiny, tmp_path: Path) -> None:
    check_model(tiny.recipe(train={"steps": 2, "learning_rate": 0.01, "eval": EVAL}), tmp_path)


def test_adapters_are_merged_into_the_model(tiny: Tiny, tmp_path: Path) -> None:
    model = {"name": str(tiny.model), "lora": {"rank": 2}}
    recipe = tiny.recipe(model=model, algorithm={"preset": "grpo", "kl_coef": 0.1})
    check_model(recipe, tmp_path / "a")
    train(recipe, tmp_path / "b")
    same_results(tmp_path / "a", tmp_path / "b")


def check_model(recipe: Recipe, run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with Session(recipe, run, []) as session:
        session.trainer.train()
        collected = session.trainer.collector.collect(session.trainer.algorithm, 0)
        rollouts = collected.rollouts
        ours = session.trainer.policy.signals(rollouts, ["logprobs"]).logprobs
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.chat_template
    assert ours is not None
    for i in range(len(rollouts)):
        ids = torch.cat([rollouts.prompt_tokens[i], rollouts.response(i)])[None]
        n = int(rollouts.lengths[i])
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)[0, -n - 1 : -1]
        theirs = logprobs.gather(1, rollouts.response(i)[:, None])[:, 0]
        torch.testing.assert_close(ours[i, :n], theirs, rtol=1e-4, atol=1e-5)


ENVIRONMENT = '''
"""The calculator for a model that cannot spell: its first plus sign calls."""

from tokenloom.tasks.environments.calculator import CalculatorEnvironment


class Plus(CalculatorEnvironment):
    def step(self, response_text):
        return super().step(response_text.replace("+", "<calc>1+2</calc>", 1))
'''


@pytest.mark.parametrize("name", ["calculator", "plus"])
def test_a_multi_turn_task_trains(tiny: Tiny, tmp_path: Path, name: str) -> None:
    file = tmp_path / "plus.py"
    file.write_text(ENVIRONMENT, encoding="utf-8")
    task = {"environment": name if name == "calculator" else f"{file}:Plus", "environment_params": {"max_calls": 1}}
    recipe = tiny.recipe(task=task, train={"steps": 2, "learning_rate": 0.01, "eval": EVAL})
    train(recipe, tmp_path / "a")
    train(recipe, tmp_path / "b")
    same_results(tmp_path / "a", tmp_path / "b")
    masks = [line["mask"] for line in lines(tmp_path / "a", "tokens.jsonl")]
    assert any(not all(mask) for mask in masks) == (name == "plus")
    for line in lines(tmp_path / "a", "tokens.jsonl"):
        off = [i for i, m in enumerate(line["mask"]) if not m]
        assert all(line["quantities"]["coefficient"][i] == 0 for i in off)


def test_a_pooled_verifier_that_raises_costs_its_samples_only(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "fails.py"
    file.write_text("def fails(response, item):\n    raise KeyError(response)\n", encoding="utf-8")
    rewards = [{"verifier": "number"}, {"verifier": f"{file}:fails", "weight": 0.5}]
    recipe = tiny.recipe(task={"rewards": rewards}, train={"steps": 1, "eval": EVAL | {"samples": 0}})
    _, seen = train(recipe, tmp_path / "run")
    (line,) = steps(tmp_path / "run")
    assert line["verifier_errors"] == 12
    assert line[f"reward/{file}:fails"] == 0
    assert line["reward"] == line["accuracy"]
    assert any("fails" in m and "verifier" in m for m in seen.messages)


def test_a_random_part_of_a_user_repeats_after_a_resume(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "coin.py"
    file.write_text(
        "import random\n\nimport numpy\nimport torch\n\n\n"
        "def coin(response, item):\n"
        "    return float(random.random() + numpy.random.random() + float(torch.rand(())) > 1.5)\n",
        encoding="utf-8",
    )
    # In this process, where the global generators live; a pool would have its own.
    from tokenloom.tasks import verify

    recipe = build_recipe(tiny.data(task={"rewards": [{"verifier": f"{file}:coin"}]}))
    patch = pytest.MonkeyPatch()
    with patch.context() as p:
        p.setattr(verify, "IN_PROCESS", (*verify.IN_PROCESS, f"{file}:coin"))
        train(recipe, tmp_path / "a")
        with Session(recipe, tmp_path / "b", []) as session:
            session.trainer.before = session.trainer._evaluate(0, None)
            session.trainer._samples(session.trainer.before, 0)
            session.trainer.step(0)
            session.trainer.done = 1
            session.trainer.save_checkpoint()
        torch.rand(3)
        train(recipe, tmp_path / "b", resume=True)
    same_results(tmp_path / "a", tmp_path / "b")


def test_observers_are_closed_once_whatever_happens(tiny: Tiny, tmp_path: Path) -> None:
    seen = Remembers()
    with Session(tiny.recipe(), tmp_path / "ok", [seen]):
        pass
    assert seen.closed == 1
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file"), Session(tiny.recipe(), tmp_path / "file", [seen]):
        pass
    assert seen.closed == 2


def test_micro_batches_deal_out_the_live_rows(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(train={"micro_batch_tokens": 20, "eval": EVAL})
    with Session(recipe, tmp_path, []) as session:
        trainer = session.trainer
        rollouts = trainer.collector.collect(trainer.algorithm, 0).rollouts
        acting = torch.tensor([True, True, False, True, True])
        live = acting[:, None] & rollouts.mask[[7, 1, 4, 0, 11]]
        update = replace(Update(torch.tensor([7, 1, 4, 0, 11]), {}), live=live)
        cuts = list(trainer._micro_batches(rollouts, update))
    assert sorted(torch.cat(cuts).tolist()) == [0, 1, 3, 4]
    assert len(cuts) > 1
