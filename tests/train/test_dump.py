"""tokens.jsonl says of every token what the algorithm does to it; a bad batch can be looked at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tokenloom.batch import Rollouts
from tokenloom.report.replay import replay
from tokenloom.signals import Signals
from tokenloom.train import dump
from tokenloom.train.dump import _whole_groups, cut, save_bad_batch, store, token_lines
from tokenloom.train.run import rounded
from tokenloom.train.session import Session
from train.setups import Tiny, lines


@pytest.mark.parametrize("slug", ["grpo", "clip-cov", "dapo", "reinforce"])
def test_the_quantities_are_those_of_the_algorithm(tiny: Tiny, tmp_path: Path, slug: str) -> None:
    recipe = tiny.recipe(algorithm=slug, log={"tokens_every": 1, "tokens_rows": 8})
    with Session(recipe, tmp_path, []) as session:
        trainer = session.trainer
        trainer.step(0)
        # The second step, from outside: the same batch, signals, state and randomness.
        algorithm, policy, position = trainer.algorithm, trainer.policy, trainer.stream.position
        collected = trainer.collector.collect(algorithm, 1, trainer.state)
        rollouts = collected.rollouts
        signals = policy.signals(rollouts, sorted(algorithm.needs | algorithm.loss_needs | {"entropies"}))
        expected = algorithm.coefficients(
            rollouts, signals, trainer.state, step=1, total_steps=3, generator=trainer._generator(1)
        )["logprobs"]
        plan = algorithm.plan(rollouts, signals, trainer.state, step=1, total_steps=3, generator=trainer._generator(1))
        trainer.stream.restore(position)
        trainer.step(1)
    found = [line for line in lines(tmp_path, "tokens.jsonl") if line["step"] == 2]
    assert found
    assert len(found) == min(8, len(rollouts))
    assert signals.logprobs is not None
    assert signals.entropies is not None
    assert rollouts.sampler_logprobs is not None
    ratio = signals.logprobs - rollouts.sampler_logprobs
    for row, line in enumerate(found):
        n = int(rollouts.lengths[row])
        assert line["row"] == row
        assert line["group"] == int(rollouts.group_ids[row])
        assert line["ids"] == rollouts.response(row).tolist()
        assert line["mask"] == rollouts.mask[row, :n].tolist()
        assert line["prompt"] == collected.items[row].text
        assert rollouts.rewards is not None
        assert line["reward"] == pytest.approx(float(rollouts.rewards[row]))
        values = {
            "coefficient": expected, "advantage": plan.values["advantages"], "weight": plan.values["weights"],
            "entropy": signals.entropies, "logprob": signals.logprobs, "log_ratio": ratio,
        }  # fmt: skip
        if signals.ref_logprobs is not None:
            d = signals.ref_logprobs - signals.logprobs
            values["reference_kl"] = d.exp() - 1 - d
        assert line["quantities"].keys() == values.keys()
        for name, value in values.items():
            assert line["quantities"][name] == pytest.approx(value[row, :n].tolist(), rel=1e-4, abs=1e-6), name
        assert "".join(line["pieces"]) == policy.tokenizer.decode(line["ids"])
        assert all(0 <= e <= math.log(12) + 1e-6 for e in line["quantities"]["entropy"])


def test_entropies_are_those_of_the_distribution(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    with Session(tiny.recipe(log={"tokens_every": 1, "tokens_rows": 12}), tmp_path, []) as session:
        session.trainer.step(0)
        encode = session.trainer.policy.encode_prompt
        task = session.trainer.task
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    prompts = {item.text: encode(item.messages or "") for item in task.train}
    for line in lines(tmp_path, "tokens.jsonl"):
        ids = torch.cat([prompts[line["prompt"]], torch.tensor(line["ids"])])[None]
        n = len(line["ids"])
        with torch.no_grad():
            law = torch.distributions.Categorical(logits=model(ids).logits[0, -n - 1 : -1])
        assert line["quantities"]["entropy"] == pytest.approx(law.entropy().tolist(), rel=1e-3, abs=1e-4)
        assert line["quantities"]["logprob"] == pytest.approx(
            law.log_prob(torch.tensor(line["ids"])).tolist(), rel=1e-3, abs=1e-4
        )


@pytest.mark.parametrize(
    ("groups", "limit", "rows"),
    [
        ([0, 0, 1, 1, 2, 2], 4, 4),
        ([0, 0, 1, 1, 2, 2], 5, 4),
        ([0, 0, 1, 1, 2, 2], 99, 6),
        ([0, 0, 0, 1, 1, 1], 2, 2),
        ([0, 1, 1, 1], 3, 1),
        ([0], 1, 1),
        ([], 3, 0),
    ],
)
def test_groups_stay_whole(groups: list[int], limit: int, rows: int) -> None:
    assert _whole_groups(groups, limit) == rows


def test_numbers_that_are_none_become_null(tiny: Tiny, tmp_path: Path) -> None:
    with Session(tiny.recipe(), tmp_path, []) as session:
        trainer = session.trainer
        collected = trainer.collector.collect(trainer.algorithm, 0)
        signals = trainer.policy.signals(collected.rollouts, sorted(trainer.algorithm.needs))
        plan = trainer.algorithm.plan(collected.rollouts, signals, {}, step=0, total_steps=3)
        plan.values["advantages"][0, 0] = math.nan
        made = token_lines(
            collected, plan, trainer.algorithm, trainer.policy, 4, {},
            step=0, total_steps=3, generator=trainer._generator(0),
        )  # fmt: skip
        for line in made:
            trainer.run.append("tokens.jsonl", line)
    text = (tmp_path / "tokens.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text
    first = json.loads(text.splitlines()[0])
    assert first["quantities"]["advantage"][0] is None
    assert rounded(made[1])["quantities"] == json.loads(text.splitlines()[1])["quantities"]


@pytest.mark.parametrize(
    "algorithm", [{"preset": "dapo"}, {"preset": "grpo", "kl_coef": 0.1}, {"preset": "reinforce"}],
    ids=lambda a: a["preset"],
)  # fmt: skip
def test_the_stored_batch_tells_the_same(tiny: Tiny, tmp_path: Path, algorithm: dict[str, Any]) -> None:
    """The whole batch is dumped, so asking the run's own algorithm again gives what the lines say."""
    recipe = tiny.recipe(algorithm=algorithm)
    with Session(recipe, tmp_path, []) as session:
        trainer = session.trainer
        collected = trainer.collector.collect(trainer.algorithm, 0)
        signals = trainer.policy.signals(collected.rollouts, sorted(trainer.algorithm.needs))
        plan = trainer.algorithm.plan(collected.rollouts, signals, {}, step=0, total_steps=3)
        made = token_lines(
            collected, plan, trainer.algorithm, trainer.policy, 12, {},
            step=0, total_steps=3, generator=trainer._generator(0), run=tmp_path,
        )  # fmt: skip
        plain = token_lines(
            collected, plan, trainer.algorithm, trainer.policy, 12, {},
            step=0, total_steps=3, generator=trainer._generator(0),
        )  # fmt: skip
    assert {line["stored"] for line in made} == {"tokens/step-000001"}
    assert [{k: v for k, v in line.items() if k != "stored"} for line in made] == plain
    back = Rollouts.load(tmp_path / "tokens/step-000001")
    assert torch.equal(back.tokens, collected.rollouts.tokens)
    (again,) = replay(tmp_path, ["tokens/step-000001"], ["this run's"], {"algorithm": algorithm})
    assert again.reason == ""
    held = again.values["tokens/step-000001"]
    for row, line in enumerate(made):
        for name, values in held.items():
            n = len(line["ids"])
            assert line["quantities"][name] == pytest.approx(values[row, :n].tolist(), rel=1e-5, abs=1e-7), name
        assert ("reference_kl" in line["quantities"]) == ("kl_coef" in algorithm)
        # The reference is the policy before its first update.
        assert line["quantities"].get("reference_kl", [0.0]) == pytest.approx(
            [0.0] * len(line["quantities"].get("reference_kl", [0.0]))
        )


def _rollouts() -> Rollouts:
    return Rollouts.build([[1], [1]], [[2, 3], [4]], [0, 0], rewards=torch.tensor([0.0, 1.0]))


def test_hidden_states_are_not_stored(tmp_path: Path) -> None:
    signals = Signals(
        logprobs=torch.zeros(2, 2), extras={"narrow": torch.ones(2, 2, 8), "hidden": torch.ones(2, 2, 99)}
    )
    folder = store(tmp_path, _rollouts(), signals, {}, {"step": 4, "total_steps": 9, "batch_rows": 2})
    assert folder == tmp_path / "tokens" / "step-000005"
    assert load_file(folder / "signals.safetensors").keys() == {"logprobs", "narrow"}


def test_a_batch_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"step": 0, "total_steps": 9, "batch_rows": 2}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dump, "flush", killed)
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path, _rollouts(), Signals(), {}, about)
    assert [f.name for f in (tmp_path / "tokens").iterdir()] == [".writing-step-000001"]
    store(tmp_path, _rollouts(), Signals(), {}, about)
    store(tmp_path, _rollouts(), Signals(), {}, about)
    assert [f.name for f in (tmp_path / "tokens").iterdir()] == ["step-000001"]


def test_resuming_takes_away_what_will_be_written_again(tmp_path: Path) -> None:
    cut(tmp_path, 0)
    for step in (0, 5, 9):
        store(tmp_path, _rollouts(), Signals(), {}, {"step": step, "total_steps": 9, "batch_rows": 2})
    (tmp_path / "tokens" / ".writing-step-000011").mkdir()
    (tmp_path / "tokens" / "notes").mkdir()
    cut(tmp_path, 6)
    assert sorted(f.name for f in (tmp_path / "tokens").iterdir()) == ["notes", "step-000001", "step-000006"]


def test_a_bad_batch_reads_back(tiny: Tiny, tmp_path: Path) -> None:
    with Session(tiny.recipe(), tmp_path / "run", []) as session:
        trainer = session.trainer
        rollouts = trainer.collector.collect(trainer.algorithm, 0).rollouts
        signals = trainer.policy.signals(rollouts, sorted(trainer.algorithm.needs))
        plan = trainer.algorithm.plan(rollouts, signals, {}, step=0, total_steps=3)
        rows = torch.tensor([3, 1])
        live: Any = trainer.policy.signals(rollouts.rows(rows), ["logprobs"], grad=True)
        folder = save_bad_batch(tmp_path / "bad", rollouts, live, plan, rows)
        save_bad_batch(tmp_path / "bad", rollouts, live, plan, rows)
    back = Rollouts.load(folder)
    assert torch.equal(back.tokens, rollouts.tokens)
    assert torch.equal(back.mask, rollouts.mask)
    tensors = load_file(folder / "signals.safetensors")
    assert tensors["rows"].tolist() == [3, 1]
    assert tensors["signals.logprobs"].shape == (2, rollouts.tokens.shape[1])
    assert torch.equal(tensors["plan.advantages"], plan.values["advantages"])
