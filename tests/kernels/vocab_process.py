"""One process of a vocabulary-parallel log-prob; `test_vocab_parallel.py` starts a group of them.

    python vocab_process.py RANK FOLDER

reads FOLDER/inputs.pt (everything whole, and the lengths of the processes' vocabulary blocks) and writes
FOLDER/RANK.pt: results and gradients.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from kernels.definition import mixture
from tokenloom.kernels import linear_logprobs


def main(rank: int, folder: Path) -> None:
    given = torch.load(folder / "inputs.pt")
    lengths = given["lengths"]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(lengths))
    start = sum(lengths[:rank])
    mine = slice(start, start + lengths[rank])
    hidden = given["hidden"].requires_grad_()
    weight, bias = given["weight"][mine].clone().requires_grad_(), given["bias"][mine].clone().requires_grad_()
    rows, targets = given["rows"], given["targets"]
    found = linear_logprobs(hidden, rows, targets, weight, bias, **given["settings"], group=dist.group.WORLD)
    mixture(found).backward()
    assert found.top is not None
    results = {"logprobs": found.logprobs, "entropies": found.entropies, "top": found.top.logprobs}
    results = {k: v.detach() for k, v in results.items() if v is not None} | {"tokens": found.top.tokens}
    written = results | {"hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}
    torch.save(written, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
