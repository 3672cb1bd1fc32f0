"""The log-prob by its definition, with the whole [M, V] matrix; random inputs; a recorder of operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenloom.kernels import LinearLogprobs, TopTokens

FORMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"scale": 0.25},
    {"scale": 0.5, "temperature": 1.7},
    {"softcap": 2.0},
    {"softcap": 2.0, "scale": 1.5, "temperature": 0.6},
]

ROWS = torch.tensor([3, 3, 0, 6, 3, 0, 5, 8, 8])
"""Nine targets on rows of [9, D]: several of one row, in no order, four rows of none."""


def defined(
    hidden: Tensor,
    rows: Tensor | None,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
) -> LinearLogprobs:
    """What `linear_logprobs` must give, differentiable."""
    logits = (hidden @ weight.T + (0.0 if bias is None else bias)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    law = torch.log_softmax(logits / temperature, -1)
    law = law if rows is None else law[rows]
    top = TopTokens(*law.topk(top_k, -1)) if top_k else None
    # p log p of a token that a bias of -inf rules out is 0.
    entropies = -(law.exp() * law.clamp(min=-1e30)).sum(-1)
    return LinearLogprobs(law.gather(-1, targets[:, None])[:, 0], entropies, top)


def inputs(
    m: int = 9, d: int = 5, v: int = 23, n: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaves hidden [m, d], weight [v, d], bias [v]; and targets [n] (m without n)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((m, d), (v, d), (v,))
    )
    return hidden, weight, bias, torch.randint(v, (m if n is None else n,), generator=generator)


def mixture(result: LinearLogprobs) -> Tensor:
    """A loss of everything in `result`, with weights of both signs that add up to zero on some rows."""
    n = len(result.logprobs)
    weights = torch.linspace(-1, 1, n, dtype=result.logprobs.dtype)
    total = (weights * result.logprobs).sum()
    if result.entropies is not None:
        total = total + (weights.flip(0).exp() * result.entropies).sum()
    if result.top is not None:
        total = total + (weights[:, None] * result.top.logprobs * torch.arange(1, result.top.tokens.shape[1] + 1)).sum()
    return total


class Recorder(TorchDispatchMode):
    """The most elements of any tensor an operation returned, and the multiplications in all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "mm":
            self.multiplications += args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        elif name == "_linear_pointwise":
            self.multiplications += args[0].shape[0] * args[0].shape[1] * args[1].shape[0]
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out
