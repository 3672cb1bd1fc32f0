"""Other algorithms asked about a stored batch: what the algorithm itself says; what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from report.make_batch import store_batches
from report.make_run import make_run
from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts
from tokenloom.report.read import read_run
from tokenloom.report.replay import OWN, replay
from tokenloom.report.token_payload import AS_TRAINED, replayed, token_payload, variant_values
from tokenloom.signals import Signals
from tokenloom.train.checkpoint import pack


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_batches(make_run(tmp_path_factory.mktemp("replay") / "run", steps=2, algorithm="dapo"))


@pytest.mark.parametrize("name", ["dapo", "reinforce", "gspo"])
def test_values_are_those_of_the_algorithm(run: Path, name: str) -> None:
    folder = "tokens/step-000001"
    (found,) = replay(run, [folder], [name], {})
    signals = load_file(run / folder / "signals.safetensors")
    rollouts, algorithm = Rollouts.load(run / folder), Algorithm.from_recipe(name)
    told = Signals(old_logprobs=signals["logprobs"], **signals)
    given = {"step": 0, "total_steps": 2}
    plan = algorithm.plan(rollouts, told, one_update=True, **given)
    assert found.reason == ""
    assert torch.equal(found.values[folder]["advantage"], plan.values["advantages"])
    assert torch.equal(found.values[folder]["weight"], plan.values["weights"])
    expected = algorithm.coefficients(rollouts, told, **given)["logprobs"]
    assert torch.equal(found.values[folder]["coefficient"], expected)
    assert bool(expected.ne(0).any())


def test_what_is_missing_is_named(run: Path) -> None:
    critic, reference = replay(run, ["tokens/step-000001"], ["ppo-gae", "aapo"], {})
    assert critic.reason == "it needs old_values, values, which this run did not store"
    assert "reference_rewards" in reference.reason
    assert replay(run, [], ["dapo"], {})[0].reason == "this run stored no batch beside tokens.jsonl"
    with pytest.raises(ValueError, match="did you mean"):
        replay(run, [], ["dappo"], {})


def test_a_damaged_batch_is_a_reason(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokens" / "step-000001"
    folder.mkdir(parents=True)
    assert "cannot be read" in replay(tmp_path, ["tokens/step-000001"], ["dapo"], {})[0].reason
    for file in (run / "tokens/step-000001").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "signals.safetensors").write_bytes(b"torn")
    assert "is damaged" in replay(tmp_path, ["tokens/step-000001"], ["dapo"], {})[0].reason


def test_the_own_algorithm_goes_on_from_its_state(tmp_path: Path) -> None:
    made = store_batches(make_run(tmp_path / "run", steps=1), batch_rows=48)
    folder = made / "tokens/step-000001"
    about = json.loads((folder / "batch.json").read_text(encoding="utf-8"))
    own = {"algorithm": {"preset": "reinforce", "running_baseline": True}}
    fresh = replay(made, ["tokens/step-000001"], [OWN], own)[0].values["tokens/step-000001"]["advantage"]
    algorithm = Algorithm.from_recipe(own["algorithm"])
    signals = load_file(folder / "signals.safetensors")
    rollouts = Rollouts.load(folder)
    assert rollouts.rewards is not None
    better = rollouts.replace(rewards=rollouts.rewards + 1)
    state = algorithm.plan(better, Signals(**signals), step=0, total_steps=1).state
    tensors, plain = pack(state)
    save_file(tensors, folder / "state.safetensors")
    (folder / "batch.json").write_text(json.dumps(about | {"state": plain}), encoding="utf-8")
    again = replay(made, ["tokens/step-000001"], [OWN], own)[0].values["tokens/step-000001"]["advantage"]
    assert state
    assert not torch.equal(fresh, again)


def test_variants_of_a_page(run: Path, tmp_path: Path) -> None:
    data, blobs = token_payload(read_run(run), ["reinforce", "ppo-gae"])
    assert [v["name"] for v in data["variants"]] == [AS_TRAINED, "reinforce", "ppo-gae"]
    assert data["variants"][2]["quantities"] == []
    assert {"1/advantage", "1/coefficient", "1/weight", "0/entropy", "index", "mask"} <= blobs.keys()
    assert not any(name.startswith("2/") for name in blobs)
    # Where a dump is part of a batch, the run's own algorithm is asked about the same part.
    part = read_run(store_batches(make_run(tmp_path / "run", steps=1, algorithm="dapo"), batch_rows=99))
    asked = replayed(part, part.tokens.rows, ["reinforce"])
    assert [one.name for one in asked] == ["dapo, these rows", "reinforce"]
    row = part.tokens.rows[2]
    values = variant_values(asked[1], row, "advantage")
    assert len(values) == len(row.pieces)
    assert list(values) == pytest.approx(
        asked[1].values[row.stored]["advantage"][row.row, : len(values)].tolist(), rel=1e-6
    )
