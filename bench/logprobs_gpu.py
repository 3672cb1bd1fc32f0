"""The table of `bench.logprobs` at the sizes of a GPU; measured only where there is one, kept otherwise.

    python -m bench.logprobs_gpu          on a machine with CUDA: measure and store
    python -m bench.run --render          anywhere: rewrite the page from what is stored

Two more sides: the naive form under torch.compile, and Liger-Kernel's fused head.
"""

from __future__ import annotations

from bench.harness import SECONDS, Row, Side, Table, Target, main
from bench.logprobs import EXTRA, SHARE

SIZES = ((8192, 2048, 151936), (16384, 4096, 128256), (8192, 896, 151936))
"""N, D, V: heads of models with 1.5 to 8 billion parameters and of one with half a billion."""


def rows(quick: bool) -> list[Row]:
    """The sizes in bf16; none without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [_row(n, d, v) for n, d, v in (SIZES[:1] if quick else SIZES)]


def _row(n: int, d: int, v: int) -> Row:
    def side(name: str, key: str, *requires: str) -> Side:
        settings = {"side": key, "n": n, "d": d, "v": v, "precision": "bf16"}
        install = f"pip install {' '.join(requires)}" if requires else ""
        return Side(name, "bench.logprobs:measured", settings, requires, install)

    sides = (
        side("Tokenloom", "tokenloom"),
        side("naive", "naive"),
        side("naive, compiled", "compiled"),
        side("cut cross-entropy", "cut_cross_entropy", "cut-cross-entropy"),
        side("Liger-Kernel", "liger", "liger-kernel"),
    )
    targets = (Target("seconds", peer="naive", at_least=round(1 / 1.2, 3)), Target("share", at_most=1.0))
    return Row(f"V = {v:,}, D = {d:,}, N = {n:,}, bf16", sides, targets=targets, runs=7)


TABLE = Table("logprobs-gpu", "Log-probs without logits, on a GPU", rows, (SECONDS, EXTRA, SHARE))

if __name__ == "__main__":
    main(TABLE)
