"""The Triton kernels run by Triton's interpreter on the CPU; `test_triton.py` starts this in a process of its own.

Compares log-probs, entropies and all gradients with the definition in float64 and prints, as one JSON line, the
largest error of each case in units of the rounding error of its format. (Triton's interpreter multiplies the bit
patterns of bfloat16, so 16 bits means float16 here.)
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from kernels.definition import defined, mixture
from tokenloom.kernels import linear_logprobs
from tokenloom.kernels.backend import Call

function = sys.modules["tokenloom.kernels.linear_logprobs"]

CASES: list[dict[str, Any]] = [
    {"m": 70, "d": 48, "v": 300},
    {"m": 9, "d": 5, "v": 23, "bias": True, "form": {"scale": 1.5, "softcap": 2.0, "temperature": 0.6}},
    {"m": 9, "d": 5, "v": 150, "rows": [3, 3, 0, 6, 3, 0, 5, 8, 8], "form": {"temperature": 1.7}, "entropy": False},
    {"m": 20, "d": 64, "v": 70, "bias": True, "hidden": "float16", "weight": "float16"},
    {"m": 6, "d": 32, "v": 40, "autocast": True},
    {"m": 9, "d": 5, "v": 150, "bias": True, "ruled_out": [0, 70], "form": {"temperature": 0.6}},
]


def engine(call: Call, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    from tokenloom.kernels.triton_logprobs import TritonLogits

    return TritonLogits(hidden, weight, bias, call.form)


def error(case: dict[str, Any]) -> float:
    """Largest error of any result, relative to what rounding explains."""
    generator = torch.Generator().manual_seed(0)
    m, d, v = case["m"], case["d"], case["v"]

    def leaf(*shape: int, dtype: str = "float32") -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(getattr(torch, dtype)).requires_grad_()

    hidden, weight = leaf(m, d, dtype=case.get("hidden", "float32")), leaf(v, d, dtype=case.get("weight", "float32"))
    bias = leaf(v) if case.get("bias") else None
    if bias is not None:
        with torch.no_grad():
            bias[case.get("ruled_out", [])] = -torch.inf
    rows = torch.tensor(case["rows"]) if "rows" in case else None
    # The last word of the vocabulary too, and a pair of row and token twice.
    targets = torch.randint(v, (m if rows is None else len(rows),), generator=generator)
    targets[0] = targets[1] = v - 1
    form, entropy = case.get("form", {}), case.get("entropy", True)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    with torch.autocast("cpu", dtype=torch.float16, enabled=case.get("autocast", False)):
        ours = linear_logprobs(hidden, rows, targets, weight, bias, **form, need_entropy=entropy)
    mine = [*ours[:2], *torch.autograd.grad(mixture(ours), leaves)]

    exact = [x.detach().double().requires_grad_() for x in leaves]
    theirs = defined(exact[0], rows, targets, exact[1], exact[2] if bias is not None else None, **form)
    theirs = theirs if entropy else theirs._replace(entropies=None)
    wanted = [*theirs[:2], *torch.autograd.grad(mixture(theirs), exact)]
    half = case.get("autocast") or hidden.dtype == torch.float16
    eps = torch.finfo(torch.float16 if half else torch.float32).eps
    worst = 0.0
    for a, b in zip(mine, wanted, strict=True):
        if a is not None and b is not None:
            worst = max(worst, float(((a.double() - b).norm() / b.norm()).detach()) / eps)
    return worst


if __name__ == "__main__":
    function.engine = engine  # type: ignore[attr-defined]
    print(json.dumps([error(case) for case in CASES]))
