"""Sums over the vocabulary and their gradients on CUDA, with Triton kernels.

Forward: each program takes BM rows over a part of the vocabulary, logits stay on chip; the parts are joined here.
Backward: a kernel writes the loss's gradient with respect to a block of logits, recomputed on chip; the two
products with it go to cuBLAS, which keeps the sum over rows of the weight's gradient in float32 and rounds it once,
without atomics, so results do not change from run to run.

Formulas as in `chunked`. Logits are float32 here also for 16-bit inputs (the chunked form rounds them to 16 bits,
as the model's own head does).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenloom.kernels import triton_kernels as kernels
from tokenloom.kernels.chunked import Chunked, RowGradients, Sums, Tile
from tokenloom.kernels.tiles import Grid

TILE_ELEMENTS = 2**25
"""Slopes alive at once: 64 MiB in 16 bits."""

PROGRAMS_PER_CORE = 16
"""Programs of the forward for each multiprocessor: enough that the last, incomplete wave costs little."""

FORMATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Blocks(NamedTuple):
    """Block sizes of a kernel, its warps and the depth of its pipeline."""

    bm: int
    bv: int
    bd: int
    warps: int
    stages: int

    @classmethod
    def fitting(cls, rows: int, product: torch.dtype, stored: torch.dtype, shared_memory: int) -> Blocks:
        """The largest that fit into a multiprocessor's `shared_memory` [bytes]; `stored` is the widest input."""
        # float32 products run outside of the tensor cores: small tiles, or the accumulators spill.
        choices = [cls(128, 256, 64, 8, 3), cls(128, 128, 64, 8, 3), cls(128, 128, 32, 8, 3), cls(64, 64, 32, 4, 2)]
        if product == torch.float32:
            choices = choices[-1:]
        fits = [c for c in choices if (c.bm + c.bv) * c.bd * c.stages * stored.itemsize <= shared_memory - 4096]
        best = (fits or choices[-1:])[0]
        return best._replace(bm=max(16, min(best.bm, triton.next_power_of_2(rows))))


class TritonLogits(Chunked):
    """`Chunked` with its two inner loops replaced by kernels."""

    def cut(self, chunk: int) -> Grid:
        """All rows at once, as long as a tile is wide enough to be worth a launch."""
        self.hidden, self.weight = _row_major(self.hidden), _row_major(self.weight)
        self.bias = None if self.bias is None else self.bias.contiguous()
        rows = max(len(self.hidden), 1)
        stored = torch.promote_types(self.hidden.dtype, self.weight.dtype)
        self.blocks = Blocks.fitting(rows, self.form.product, stored, _shared_memory(self.hidden.device))
        height = min(rows, TILE_ELEMENTS // 1024)
        width = max(TILE_ELEMENTS // height // self.blocks.bv, 1) * self.blocks.bv
        return Grid(rows, len(self.weight), height, width)

    def sums(self, rows: Tensor, tokens: Tensor, *, need_entropy: bool, top_k: int) -> Sums:
        """As in `Chunked`, for tokens within the vocabulary and without top tokens."""
        m, v = len(self.hidden), len(self.weight)
        device, blocks = self.hidden.device, self.blocks
        chosen = torch.empty(len(rows), dtype=torch.float32, device=device)
        row_blocks = triton.cdiv(m, blocks.bm)
        word_blocks = triton.cdiv(v, blocks.bv)
        splits = min(word_blocks, max(1, PROGRAMS_PER_CORE * _cores(device) // max(row_blocks, 1)))
        split = triton.cdiv(word_blocks, splits) * blocks.bv
        splits = triton.cdiv(v, split)
        parts = torch.empty(3, splits, m, dtype=torch.float32, device=device)
        with _on(device):
            if len(rows):
                kernels.chosen_kernel[(len(rows),)](
                    *self._tensors(), rows, tokens, chosen, *self._strides(), *self._factors(),
                    **self._flags(), BD=min(1024, triton.next_power_of_2(self.hidden.shape[1])),
                )  # fmt: skip
                kernels.sums_kernel[(row_blocks, splits)](
                    *self._tensors(), *parts, m, v, *self._strides(), split, *self._factors(),
                    ENTROPY=need_entropy, **self._flags(), **self._tile_settings(),
                )  # fmt: skip
        high = parts[0].amax(0)
        drop = parts[0] - high
        keep = drop.exp()
        total = (keep * parts[1]).sum(0)
        spread = (keep * (parts[2] + drop * parts[1])).sum(0) if need_entropy else torch.zeros_like(total)
        return Sums(high, total, spread, chosen, None)

    def slopes(self, out: Tensor, tile: Tile, of: RowGradients, values: Tensor) -> None:
        """As in `Chunked`; the kernel reads hidden states and vocabulary where they lie, in whatever format."""
        here, blocks = tile.rows, self.blocks
        n, width = out.shape
        log_norm, a = of.log_norm[here], of.a[here]
        b = a if of.b is None else of.b[here]
        with _on(out.device):
            kernels.slopes_kernel[(triton.cdiv(n, blocks.bm), triton.cdiv(width, blocks.bv))](
                self.hidden[here], *self._tensors()[1:], log_norm, a, b, out, n, len(self.weight), *self._strides(),
                tile.words.start, width, *self._factors(), self.form.factor,
                ENTROPY=of.b is not None, **self._flags(), **self._tile_settings(),
            )  # fmt: skip
        if tile.pairs is not None:
            out.put_(tile.pairs[1], values[tile.pairs[0]].to(out.dtype))

    # -- launches ------------------------------------------------------------------------------

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, vocabulary, bias; what stands in for a missing bias is never read."""
        return self.hidden, self.weight, self.weight if self.bias is None else self.bias

    def _strides(self) -> tuple[int, int, int]:
        return self.hidden.shape[1], self.hidden.stride(0), self.weight.stride(0)

    def _factors(self) -> tuple[float, float]:
        form = self.form
        if form.softcap is None:
            return form.factor, 1.0
        return form.scale / form.softcap, form.softcap / form.temperature

    def _flags(self) -> dict[str, Any]:
        return {
            "BIAS": self.bias is not None,
            "CAP": self.form.softcap is not None,
            "DOT": FORMATS[self.form.product],
        }

    def _tile_settings(self) -> dict[str, Any]:
        blocks = self.blocks
        return {
            # TF32 would keep ten bits of a float32 input.
            "PRECISION": "ieee" if self.form.product == torch.float32 else "tf32",
            "EVEN": self.hidden.shape[1] % blocks.bd == 0,
            "BM": blocks.bm,
            "BV": blocks.bv,
            "BD": blocks.bd,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }


def probe() -> None:
    """Build and run a kernel on the current device; raises whatever stands in the way."""
    kernels.probe_kernel[(1,)](torch.empty(1, device="cuda"))


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _cores(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may use; older PyTorch does not tell, and 99 KiB is what consumer cards have."""
    if device.type != "cuda":
        return 101376
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 101376))
