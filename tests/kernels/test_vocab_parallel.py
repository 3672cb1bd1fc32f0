"""Two processes that hold half of the vocabulary each give the results of one that holds it all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kernels.definition import ROWS, inputs, mixture
from tokenloom.kernels import linear_logprobs

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")

PROGRAM = Path(__file__).with_name("vocab_process.py")


def test_two_processes_give_the_results_of_one(tmp_path: Path) -> None:
    hidden, weight, bias, targets = inputs()
    settings = {"softcap": 3.0, "scale": 1.5, "temperature": 0.8, "need_entropy": True, "top_k": 3}
    lengths = [14, 9]
    given = {"hidden": hidden, "weight": weight, "bias": bias}
    whole = {k: v.detach() for k, v in given.items()} | {"rows": ROWS, "targets": targets}
    torch.save(whole | {"lengths": lengths, "settings": settings}, tmp_path / "inputs.pt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, str(PROGRAM), str(rank), str(tmp_path)], env=environment)
        for rank in range(len(lengths))
    ]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(lengths))]

    found = linear_logprobs(hidden, ROWS, targets, weight, bias, **settings)  # type: ignore[arg-type]
    mixture(found).backward()
    assert found.top is not None
    for part in parts:
        whole_results = {"logprobs": found.logprobs, "entropies": found.entropies, "top": found.top.logprobs}
        for name, value in whole_results.items():
            torch.testing.assert_close(part[name], value, rtol=1e-12, atol=1e-12)
        assert part["tokens"].equal(found.top.tokens)
        # Each process holds the gradient of the whole loss, not its share.
        torch.testing.assert_close(part["hidden"], hidden.grad, rtol=1e-9, atol=1e-12)
    for name, whole_grad in (("weight", weight.grad), ("bias", bias.grad)):
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), whole_grad, rtol=1e-9, atol=1e-12)
