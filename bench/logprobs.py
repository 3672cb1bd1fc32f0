"""Log-probs from hidden states, forward and backward: Tokenloom's fused form against the logit matrix and its rivals.

All sides get the same random hidden states [N, D], vocabulary matrix [V, D] and targets [N] and give the gradients
of a weighted sum of the log-probs with respect to both. Extra memory is the most resident during one forward and
backward, less what was resident when the inputs existed; "share" leaves the two gradients out, which every side has
to return, and relates the rest to the float32 logits [N, V]. On a machine with a GPU everything runs there.

Naive: (hidden @ weight.T).float(), log_softmax, gather. Cut cross-entropy (arXiv 2411.09009): Apple's code, compiled by
PyTorch on a CPU (it needs a C++ compiler), Triton kernels without their gradient filter on a GPU. Liger-Kernel's fused
linear cross-entropy needs a GPU; it returns the sum alone, so that its weights are all 1.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.child import Turns, peak_rss, reset_peak_rss
from bench.harness import SECONDS, Metric, Row, Side, Table, Target, main

if TYPE_CHECKING:
    from torch import Tensor

EXTRA = Metric("extra", "extra peak memory", "MB", factor=1e-6)
SHARE = Metric("share", "share", "%", compare=False)


def tokenloom(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Ours."""
    from tokenloom.kernels import linear_logprobs

    return (weights * linear_logprobs(hidden, None, targets, weight).logprobs).sum()


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The definition, in float32 after the product."""
    law = (hidden @ weight.T).float().log_softmax(-1)
    return (weights * law.gather(-1, targets[:, None])[:, 0]).sum()


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Apple's, in its exact forms."""
    from cut_cross_entropy import linear_cross_entropy

    options = {"impl": "cce", "filter_eps": None} if hidden.is_cuda else {"impl": "torch_compile"}
    losses: Tensor = linear_cross_entropy(hidden, weight, targets, reduction="none", **options)
    return -(weights * losses).sum()


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Liger-Kernel's, which takes no weights."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")
    return -loss


def compiled(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The definition under torch.compile."""
    import torch

    loss: Tensor = torch.compile(naive)(hidden, weight, targets, weights)
    return loss


SIDES: dict[str, Callable[..., Tensor]] = {
    "tokenloom": tokenloom,
    "naive": naive,
    "compiled": compiled,
    "cut_cross_entropy": cut_cross_entropy,
    "liger": liger,
}


def measured(turns: Turns, *, side: str, n: int, d: int, v: int, precision: str) -> None:
    """Forward and backward of one side; the first pass, which compiles and touches what it needs, does not count."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=device).to(dtype).requires_grad_()
    weight = torch.randn(v, d, device=device).mul_(2 * d**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), device=device)
    weights = torch.ones(n, device=device) if side == "liger" else torch.linspace(-1, 1, n, device=device)

    def once() -> float:
        hidden.grad = weight.grad = None
        _synchronize(device)
        started = time.perf_counter()
        SIDES[side](hidden, weight, targets, weights).backward()  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
        _synchronize(device)
        return time.perf_counter() - started

    once()
    for _ in turns:
        hidden.grad = weight.grad = None
        before = _start_counting(device)
        seconds = once()
        extra = _most(device) - before
        gradients = (hidden.numel() + weight.numel()) * dtype.itemsize
        turns.report(seconds=seconds, extra=extra, share=100 * (extra - gradients) / (4 * n * v))


def _synchronize(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def _start_counting(device: Any) -> int:
    """Bytes held now, after what is free has gone back to the system; the peak is counted from here."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return reset_peak_rss()


def _most(device: Any) -> int:
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return peak_rss()


def rows(quick: bool) -> list[Row]:
    """Two vocabularies with the width of a model that has them, two numbers of tokens, two formats."""
    sizes = [(64, 32, 4000)] if quick else [(n, d, v) for d, v in ((576, 49152), (896, 151936)) for n in (1024, 4096)]
    return [_row(n, d, v, precision) for n, d, v in sizes for precision in ("float32", "bf16")]


def _row(n: int, d: int, v: int, precision: str) -> Row:
    import torch

    def side(name: str, key: str, *requires: str) -> Side:
        settings = {"side": key, "n": n, "d": d, "v": v, "precision": precision}
        install = f"pip install {' '.join(requires)}" if requires else ""
        return Side(name, "bench.logprobs:measured", settings, requires, install)

    sides = [
        side("Tokenloom", "tokenloom"),
        side("naive", "naive"),
        side("cut cross-entropy", "cut_cross_entropy", "cut-cross-entropy"),
    ]
    if torch.cuda.is_available():
        sides.append(side("Liger-Kernel", "liger", "liger-kernel"))
    targets = [Target("seconds", peer="naive", at_least=round(1 / 1.2, 3))]
    if v > 100_000:
        targets.append(Target("share", at_most=1.0))
    return Row(f"V = {v:,}, D = {d}, N = {n:,}, {precision}", tuple(sides), targets=tuple(targets))


TABLE = Table("logprobs", "Log-probs without logits", rows, (SECONDS, EXTRA, SHARE))

if __name__ == "__main__":
    main(TABLE)
