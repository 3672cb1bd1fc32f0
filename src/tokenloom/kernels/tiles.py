"""The logit matrix [M, V] cut into tiles that fit into a cache, and the places of (row, token) pairs in them.

Vocabulary blocks are the outer loop: a block of the vocabulary matrix is read (and its gradient written) once,
however many rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Grid:
    """`rows` x `words` logits cut into tiles of at most `height` x `width`."""

    def __init__(self, rows: int, words: int, height: int, width: int) -> None:
        self.rows, self.words, self.height, self.width = rows, words, max(height, 1), max(width, 1)

    @classmethod
    def fitting(cls, rows: int, words: int, device: torch.device, chunk: int) -> Grid:
        """Tiles of `chunk` rows (0: chosen).

        On a CPU a tile stays in the second-level cache (of several sizes around this one, all equally quick within
        5 %, it is the smallest). Elsewhere tiles are large enough to hide what it costs to start a kernel.
        """
        height, elements = (512, 2**18) if device.type == "cpu" else (4096, 2**24)
        # The width follows from what would be chosen: the backward may hold a block of words for all rows.
        width = elements // max(min(height, rows), 1)
        return cls(rows, words, max(min(chunk or height, rows), 1), width)

    def row_blocks(self) -> list[slice]:
        """Blocks of rows in order."""
        return [slice(i, min(i + self.height, self.rows)) for i in range(0, self.rows, self.height)]

    def word_blocks(self) -> list[slice]:
        """Blocks of the vocabulary in order."""
        return [slice(i, min(i + self.width, self.words)) for i in range(0, self.words, self.width)]


class Places:
    """Where `rows` [n] and `tokens` [n] fall in the tiles of `grid`; tokens outside the vocabulary fall nowhere.

    `order` [n] sorts the pairs by tile, vocabulary blocks first; the first `inside` of them lie in some tile.
    """

    def __init__(self, grid: Grid, rows: Tensor, tokens: Tensor) -> None:
        self._row_blocks = len(grid.row_blocks())
        count = len(grid.word_blocks()) * self._row_blocks
        tile = tokens // grid.width * self._row_blocks + rows // grid.height
        tile = torch.where((tokens >= 0) & (tokens < grid.words), tile, count)
        tile, self.order = tile.sort(stable=True)
        self._edges: list[int] = torch.searchsorted(tile, torch.arange(count + 1, device=rows.device)).tolist()
        self.inside = self._edges[-1]
        start = tokens // grid.width * grid.width
        width = (grid.words - start).clamp(max=grid.width)
        self._flat = (rows % grid.height * width + tokens - start)[self.order]

    def at(self, word_block: int, row_block: int) -> tuple[slice, Tensor] | None:
        """Which of the ordered pairs lie in a tile, and where in it when read as one long row [m]; None if none do."""
        tile = word_block * self._row_blocks + row_block
        here = slice(self._edges[tile], self._edges[tile + 1])
        return None if here.start == here.stop else (here, self._flat[here])
