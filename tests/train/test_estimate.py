"""The estimate of a run's memory against what models, optimizers and whole processes really hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import tiny_llama
from tokenloom.batch import Rollouts, Sampling
from tokenloom.policy import ModelConfig, Policy
from tokenloom.train.config import TrainConfig
from tokenloom.train.estimate import _kept_bytes, estimate, micro_batch_sizes, model_shape
from tokenloom.train.optim import Optimizer
from tokenloom.train.recipe import Recipe, build_recipe
from train.setups import Tiny

SIZES = {"vocab": 100, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}


def batch(groups: int, size: int, prompt: int, answer: int) -> Rollouts:
    """Random responses: nothing is shared but the prompts."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 100, (prompt,), generator=generator) for _ in range(groups)]
    return Rollouts.build(
        [p for p in prompts for _ in range(size)],
        [torch.randint(3, 100, (answer,), generator=generator) for _ in range(groups * size)],
        [g for g in range(groups) for _ in range(size)],
        sampling=Sampling(),
    )


def recipe_for(folder: Path, tiny: Tiny, model: dict[str, Any], **sections: Any) -> Recipe:
    tiny_llama(**SIZES).save_pretrained(folder)
    return build_recipe(tiny.data(model={"name": str(folder), **model}, **sections))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [40, 100, 250, 1000])
def test_micro_batches_are_those_of_the_policy(share: bool, budget: int, tiny: Tiny) -> None:
    groups, size, prompt, answer = 3, 4, 30, 12
    recipe = tiny.recipe(
        model={"share_prefixes": share},
        rollout={"prompts_per_step": groups, "group_size": size, "max_tokens": answer},
        train={"micro_batch_tokens": budget},
    )
    policy = Policy(tiny_llama(vocab=100), config=ModelConfig(self_test=False, share_prefixes=share))
    rollouts = batch(groups, size, prompt, answer)
    sizes = []
    for part in policy.micro_batches(rollouts, budget):
        rows = len(part)
        together = len({int(rollouts.group_ids[r]) for r in part})
        sizes.append(together * prompt + rows * (answer - 1) if share else rows * (prompt + answer - 1))
    assert sorted(micro_batch_sizes(recipe, prompt, groups)) == sorted(sizes)


@pytest.mark.parametrize("autocast", ["none", "bf16"])
def test_activations_of_a_token(autocast: str, tiny: Tiny, tmp_path: Path) -> None:
    """Counted are the storages that autograd keeps until the backward, other than the weights and their copies."""
    recipe = recipe_for(tmp_path, tiny, {"autocast": autocast, "self_test": False})
    policy = Policy(tiny_llama(**SIZES), config=recipe.model)
    weights = [p for p in policy.causal.parameters() if p.ndim == 2]
    shapes = {p.shape for p in weights} | {p.T.shape for p in weights}
    own = {p.untyped_storage().data_ptr() for p in policy.causal.parameters()}

    def kept(rollouts: Rollouts) -> int:
        storages: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            at = x.untyped_storage().data_ptr()
            if at not in own and x.shape not in shapes:
                storages[at] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            policy.signals(rollouts, ["logprobs"], grad=True)
        return sum(storages.values())

    # The difference of two sizes: what does not grow with the tokens falls out, as does the head.
    measured = (kept(batch(4, 4, 220, 2)) - kept(batch(4, 4, 20, 2))) / (4 * 200)
    assert measured == pytest.approx(_kept_bytes(recipe, model_shape(recipe, recipe.model.name)), rel=0.1)


@pytest.mark.parametrize("states", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_weights_gradients_and_moments(states: Any, lora: dict[str, int] | None, tiny: Tiny, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny, {"lora": lora, "self_test": False}, train={"optimizer_states": states})
    policy = Policy.load(config=recipe.model, device="cpu")
    optimizer = Optimizer(policy.trainable_parameters(), TrainConfig(optimizer_states=states))
    memory = estimate(recipe).memory
    moments = sum(v.nbytes for k, v in optimizer.state().items() if not k.startswith("step/"))
    assert memory[f"optimizer, two moments in {states}"] == moments
    assert memory["gradients"] == sum(p.nbytes for _, p in policy.trainable_parameters())
    base = sum(p.numel() for n, p in policy.causal.named_parameters() if "lora" not in n)
    assert memory["weights"] == 4 * base


def test_only_a_kl_term_takes_a_reference(tiny: Tiny) -> None:
    def reference(**algorithm: Any) -> float:
        return estimate(tiny.recipe(algorithm={"preset": "grpo", **algorithm})).memory.get("reference model", 0.0)

    assert reference(kl_coef=0.0) == 0
    assert reference(kl_coef=0.1) == estimate(tiny.recipe()).memory["weights"]


MEASURE = """
import json, sys
from tokenloom.train.recipe import build_recipe
from tokenloom.train.session import Session
recipe, run = build_recipe(json.loads(sys.argv[1])), sys.argv[2]
with Session(recipe, run, []) as session:
    session.trainer.policy.eos_ids = set()
    for step in range(2):
        session.trainer.step(step)
(line,) = [x for x in open("/proc/self/status") if x.startswith("VmHWM")]
print(int(line.split()[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({"autocast": "bf16"}, {}),
        ({"autocast": "bf16", "gradient_checkpointing": True}, {"optimizer_states": "bfloat16"}),
        ({}, {"micro_batch_tokens": 512}),
    ],
)
def test_a_whole_process(model: dict[str, Any], train: dict[str, Any], tmp_path: Path) -> None:
    """Two steps of the built-in model at 4 prompts x 8 responses of 32 tokens: the peak within 25 %."""
    problems, rewards = tmp_path / "problems.jsonl", tmp_path / "rewards.py"
    lines = [{"prompt": f"Count from {i} on. " + "Do it well. " * 8, "answer": ""} for i in range(16)]
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    # Hardly ever equal over a whole group, which would leave nothing to train on.
    rewards.write_text(
        "def vowels(response, item):\n    return sum(map(response.count, 'aeiou')) / 99\n", encoding="utf-8"
    )
    data = {
        "model": {"name": "smollm2-135m-instruct", **model},
        "task": {"source": str(problems), "heldout": 1, "workers": 1, "rewards": [{"verifier": f"{rewards}:vowels"}]},
        "algorithm": {"preset": "grpo", "kl_coef": 0.0},
        "rollout": {"prompts_per_step": 4, "group_size": 8, "max_tokens": 32},
        "train": {"steps": 2, **train},
    }
    recipe = build_recipe(data)
    command = [sys.executable, "-c", MEASURE, json.dumps(data), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, measured = estimate(recipe), int(done.stdout.splitlines()[-1])
    print(f"estimated {found.peak / 1e9:.2f}, measured {measured / 1e9:.2f} GB: {found.memory}")
    assert found.peak == pytest.approx(measured, rel=0.25)
