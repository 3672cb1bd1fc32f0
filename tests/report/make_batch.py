"""The batches behind a made-up run's tokens.jsonl, stored as the trainer stores them, and a run of any size.

Also a script: `python tests/report/make_batch.py FOLDER [ROWS TOKENS]` writes one to look at.
"""

from __future__ import annotations

import json
import random
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from report.make_run import make_run
from tokenloom.batch import Rollouts
from tokenloom.signals import Signals
from tokenloom.train.dump import store


def store_batches(run: Path, *, batch_rows: int | None = None) -> Path:
    """Write tokens/ of a run from its tokens.jsonl and name the folders in it.

    `batch_rows` is the size of the batch that the rows were part of; by default they were all of it.
    """
    lines = [json.loads(line) for line in (run / "tokens.jsonl").read_text(encoding="utf-8").splitlines()]
    for step, group in groupby(lines, lambda line: line["step"]):
        rows = list(group)
        told = {k: [_numbers(r["quantities"][k]) for r in rows] for k in ("logprob", "log_ratio", "entropy")}
        rollouts = Rollouts.build(
            prompt_tokens=[[r["group"], 1] for r in rows],
            response_tokens=[r["ids"] for r in rows],
            response_masks=[r["mask"] for r in rows],
            group_ids=[r["group"] for r in rows],
            sampler_logprobs=[
                [a - b for a, b in zip(x, y, strict=True)]
                for x, y in zip(told["logprob"], told["log_ratio"], strict=True)
            ],
            rewards=torch.tensor([r["reward"] for r in rows]),
            truncated=torch.zeros(len(rows), dtype=torch.bool),
        )
        signals = Signals(logprobs=_padded(told["logprob"]), entropies=_padded(told["entropy"]))
        about = {"step": step - 1, "total_steps": lines[-1]["step"], "batch_rows": batch_rows or len(rows)}
        folder = store(run, rollouts, signals, {}, about)
        for row in rows:
            row["stored"] = folder.relative_to(run).as_posix()
    (run / "tokens.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return run


def make_large_run(folder: Path, *, rows: int = 2000, tokens: int = 512, group_size: int = 16) -> Path:
    """A run whose only dump holds that many responses of that many tokens."""
    make_run(folder, steps=2)
    rng = random.Random(0)
    words = [f" {''.join(rng.choices('abcdefghijklmnopqrstuvwxyz', k=rng.randint(1, 8)))}" for _ in range(5000)]
    words += [".\n", ",", "\n\n"] * 40
    names = ("advantage", "coefficient", "weight", "entropy", "log_ratio", "reference_kl", "logprob")
    with (folder / "tokens.jsonl").open("w", encoding="utf-8") as file:
        for row in range(rows):
            ids = [rng.randrange(len(words)) for _ in range(tokens)]
            values = {n: [float(f"{rng.gauss(0, 1):.5g}") for _ in range(tokens)] for n in names}
            values["logprob"] = [-abs(v) for v in values["logprob"]]
            line = {
                "step": 1, "row": row, "group": row // group_size, "prompt": f"Prompt {row // group_size}: what next?",
                "answer": "x", "reward": float(rng.random() < 0.5), "ids": ids, "pieces": [words[i] for i in ids],
                "mask": [True] * tokens, "quantities": values,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
    return folder


def _numbers(values: list[Any]) -> list[float]:
    return [0.0 if v is None else v for v in values]


def _padded(rows: list[list[float]]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        make_large_run(Path(sys.argv[1]), rows=int(sys.argv[2]), tokens=int(sys.argv[3]))
    else:
        store_batches(make_run(Path(sys.argv[1])))
