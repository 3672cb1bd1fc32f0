"""A run folder like the trainer's, made up but with the right format and plausible curves.

Also a script: `python tests/report/make_run.py FOLDER` writes one to look at.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

HOSTILE = (
    "</script><script>document.title='PWNED'</script><img src=x onerror=\"document.title='PWNED'\">"
    "<!--<b>&amp;{{data}}\u2028\u202egnihtyna\u202c\x00\x1b[31m\ud800\u200b"
)
RECIPE = """\
model:
  name: smollm2-135m-instruct
  dtype: bf16
task:
  name: reasoning_gym:chain_sum
  parameters: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}
  suffix: Answer with just the number.
algorithm: ALGORITHM
rollout:
  prompts: 8
  group_size: 8
  max_tokens: 16
  temperature: 1.0
train:
  steps: STEPS
  learning_rate: 1.0e-5
  evaluate_every: 5
"""


def make_run(folder: Path, *, steps: int = 30, seed: int = 0, algorithm: str = "grpo", hostile: bool = False) -> Path:
    """Write a complete run folder; `hostile` puts `HOSTILE` wherever a model's or a task's text goes."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    speed = 1.0 if algorithm == "grpo" else 1.4
    recipe = RECIPE.replace("ALGORITHM", algorithm).replace("STEPS", str(steps))
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(_info(seed, algorithm)), encoding="utf-8")
    skill = {s: 1 - 0.9 * math.exp(-speed * s / max(1, steps) * 3) for s in range(steps + 1)}
    _write(folder / "metrics.jsonl", _metrics(rng, steps, skill))
    _write(folder / "timing.jsonl", [_timing(rng, s) for s in range(1, steps + 1)])
    _write(folder / "samples.jsonl", _samples(rng, steps, skill, hostile))
    dumped = range(1, steps + 1, max(1, steps // 6))
    _write(folder / "tokens.jsonl", [r for s in dumped for r in _tokens(rng, s, skill[s], hostile)])
    return folder


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _info(seed: int, algorithm: str) -> dict[str, Any]:
    return {
        "version": "0.1.0",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.24.0"},
        "seed": seed,
        "started": "2026-11-26T07:00:00+00:00",
        "finished": "2026-11-26T07:06:12+00:00",
        "machine": {"system": "Linux x86_64", "processor": "2 cores", "memory": "16 GiB", "device": "cpu"},
        "model": "SmolLM2-135M-Instruct",
        "task": "reasoning_gym:chain_sum",
        "algorithm": {
            "name": algorithm,
            "description": [
                "advantage   grpo: (reward - group mean) / (group std + 1e-4)",
                "aggregate   sequence-mean: mean over tokens, then over rows",
                "log_ratio   token",
                "bounds      constant: 1 - 0.2 .. 1 + 0.2",
                "surrogate   ppo-clip: min(ratio * A, clip(ratio) * A)",
            ],
        },
    }


def _metrics(rng: random.Random, steps: int, skill: dict[int, float]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        s = skill[step]
        if step:
            accuracy = min(1.0, max(0.0, 0.06 + 0.62 * s + rng.gauss(0, 0.06)))
            lines.append(
                {
                    "step": step,
                    "kind": "train",
                    "reward": _r(accuracy + rng.gauss(0, 0.01)),
                    "accuracy": _r(accuracy),
                    "entropy": _r(0.25 + 1.6 * (1 - s) + rng.gauss(0, 0.05)),
                    "response_length": _r(3 + 9 * (1 - s) + rng.gauss(0, 0.4)),
                    "truncated": _r(max(0.0, 0.45 * (1 - s) + rng.gauss(0, 0.03))),
                    "loss": _r(rng.gauss(0, 0.02)),
                    "grad_norm": _r(abs(1.2 + rng.gauss(0, 0.4) + (6 if step == 17 else 0))),
                    "lr": _r(1e-5 * min(1, step / 3)),
                    "surrogate/clip_fraction": _r(abs(rng.gauss(0.02, 0.01))),
                    "surrogate/ratio": _r(1 + rng.gauss(0, 0.004)),
                    "kl/kl": _r(0.001 * step + abs(rng.gauss(0, 0.001))),
                    "advantage/zero_variance_fraction": _r(0.1 + 0.3 * s + rng.gauss(0, 0.05)),
                }
            )
        if step % 5 == 0 or step == steps:
            greedy, sampled = 0.31 + 0.5 * s - 0.05, 0.10 + 0.58 * s - 0.04
            lines.append(
                {"step": step, "kind": "eval", "greedy": round(greedy, 2), "sampled": _r(sampled)}
                | {"samples": 16, "problems": 100}
            )
    return lines


def _timing(rng: random.Random, step: int) -> dict[str, Any]:
    rollout, train = 4.5 + rng.gauss(0, 0.3), 7.1 + rng.gauss(0, 0.4)
    return {
        "step": step,
        "seconds": _r(rollout + train),
        "rollout_seconds": _r(rollout),
        "train_seconds": _r(train),
        "tokens_per_second": _r(640 / rollout),
    }


def _samples(rng: random.Random, steps: int, skill: dict[int, float], hostile: bool) -> list[dict[str, Any]]:
    lines = []
    for step in (0, steps):
        problems = random.Random(5)
        for i in range(24):
            a, b = problems.randint(0, 9), problems.randint(0, 9)
            right = rng.random() < 0.15 + 0.7 * skill[step]
            value = a + b if right else a + b + rng.choice((-2, -1, 1, 10))
            chatty = f"To solve {a} + {b} we add the numbers:\n\n{a} + {b} = {value}\n\nSo the answer is {value}"
            response = str(value) if step and rng.random() < 0.8 else chatty
            if hostile and i == 0:
                response = HOSTILE
            lines.append(
                {
                    "step": step,
                    "prompt": f"State the final answer to the following problem: {a} + {b} = ? "
                    f"Answer with just the number. ({i})" + (HOSTILE if hostile and i == 0 else ""),
                    "expected": str(a + b),
                    "response": response,
                    "answer": str(value),
                    "reward": float(right),
                    "correct": right,
                }
            )
    return lines


def _tokens(rng: random.Random, step: int, skill: float, hostile: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for group in range(3):
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        drawn: list[tuple[float, int, list[str]]] = []
        for _ in range(4):
            right = rng.random() < 0.1 + 0.6 * skill
            value = a + b if right else a + b + rng.choice((-1, 1, 3))
            text = f"The sum of {a} and {b} is:\n\n\t{a} + {b} = {value}\nAnswer: {value}"
            if rng.random() < 0.3 * skill:
                text = f"{value}"
            drawn.append((float(right), value, re.findall(r"\s?\w+|[^\w]", text)))
        rewards = [r for r, _, _ in drawn]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
        for reward, value, pieces in drawn:
            if hostile and not rows:
                pieces = [HOSTILE, "x" * 3000, " caf", "\u0301", "\t\n", "שלום", *pieces]
            rows.append(_token_row(rng, step, len(rows), group, (reward - mean) / (std + 1e-4), pieces))
            rows[-1] |= {"reward": reward, "answer": str(value), "prompt": f"What is {a} + {b}?"}
    return rows


def _token_row(
    rng: random.Random, step: int, row: int, group: int, advantage: float, pieces: list[str]
) -> dict[str, Any]:
    n = len(pieces)
    # Some rows carry tool output, which the policy did not sample.
    mask = [not (row % 4 == 3 and 2 <= t < 5) for t in range(n)]
    entropy = [abs(rng.gauss(0, 0.9)) for _ in range(n)]
    log_ratio = [rng.gauss(0, 0.05) for _ in range(n)]
    quantities: dict[str, list[float | None]] = {
        "advantage": [advantage if m else 0.0 for m in mask],
        "coefficient": [advantage * math.exp(x) / n / 8 if m else 0.0 for m, x in zip(mask, log_ratio, strict=True)],
        "log_ratio": [x if m else None for m, x in zip(mask, log_ratio, strict=True)],
        "entropy": list(entropy),
        "logprob": [-abs(rng.gauss(0, 0.8)) * (0.3 + e) for e in entropy],
        "weight": [float(m and e > 0.3) for m, e in zip(mask, entropy, strict=True)],
    }
    return {
        "step": step,
        "row": row,
        "group": group,
        "ids": [abs(hash_of(p)) % 49152 for p in pieces],
        "pieces": pieces,
        "mask": mask,
        "quantities": {k: [None if v is None else _r(v) for v in vs] for k, vs in quantities.items()},
    }


def hash_of(text: str) -> int:
    """A stable number for a piece (Python's own `hash` of text changes from run to run)."""
    return sum((i + 1) * ord(c) for i, c in enumerate(text[:50]))


def _r(value: float) -> float:
    return float(f"{value:.5g}")


if __name__ == "__main__":
    make_run(Path(sys.argv[1]), hostile="--hostile" in sys.argv)
