"""The tree forward: a step's rows packed into prefix trees, a shared prefix computed once.

Attention is told by an additive float mask (a boolean 4D mask is silently wrong on eager attention), one for
each layer type: ancestors, and in sliding-window layers ancestors nearer than the window. Positions are depths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.policy.forward import needed_lengths, predicting_positions
from tokenloom.policy.interface import Gathered, Trunk
from tokenloom.policy.tree import BLOCKED, PrefixTree, ancestor_mask, build_tree, shared_lengths, sorted_rows

ATTENTION_KEYS = 256
"""Keys whose attention costs a node as much as its matrix products; measured on a CPU with a 135M model."""


@dataclass(frozen=True)
class MaskKinds:
    """Which masks a model takes: one for all layers, or a dict by layer type; and the window of sliding layers."""

    names: tuple[str, ...] = ()
    window: int | None = None

    @classmethod
    def from_config(cls, config: Any) -> MaskKinds:
        """Read layer types and window as transformers' modeling code does."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        window = getattr(text, "sliding_window", None)
        types = getattr(text, "layer_types", None)
        if types:
            return cls(tuple(sorted(set(types))), window)
        return cls((), window)

    def build(self, seen: list[PrefixTree], width: int, dtype: torch.dtype, device: torch.device) -> Any:
        """The mask(s) [n, 1, width, width] for trees padded to `width` nodes."""
        if not self.names:
            return _additive(seen, width, self.window, dtype, device)
        windows = {name: self.window if name == "sliding_attention" else None for name in self.names}
        return {name: _additive(seen, width, window, dtype, device) for name, window in windows.items()}


class TreeForward:
    """Trees of at most `tree_nodes` nodes, calls of at most `token_budget` padded nodes (a larger tree goes alone)."""

    def __init__(
        self,
        device: torch.device,
        kinds: MaskKinds,
        *,
        token_budget: int,
        tree_nodes: int = 4096,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device, self.kinds, self.dtype = device, kinds, dtype
        self.token_budget, self.tree_nodes = token_budget, tree_nodes
        self.computed = 0

    def gather(self, trunk: Trunk, rollouts: Rollouts) -> Iterator[Gathered]:
        """One `Gathered` per call. Rows without a sampled token, and what follows a row's last one, are left out."""
        mask = rollouts.mask.cpu()
        prompts = torch.tensor([len(p) for p in rollouts.prompt_tokens], dtype=torch.int64)
        rows, columns, positions = predicting_positions(prompts, mask)
        trees = self._trees(rollouts, needed_lengths(len(rollouts), rows, positions))
        for call in self._calls(trees):
            width = max(len(t) for t in call)
            tokens = torch.stack([_pad(t.tokens, width) for t in call]).to(self.device)
            depths = torch.stack([_pad(t.depth, width) for t in call]).to(self.device)
            masks = self.kinds.build(call, width, self.dtype, self.device)
            hidden = trunk(tokens, mask=masks, positions=depths)
            self.computed += sum(len(t) for t in call)
            yield self._gathered(hidden, call, width, rows, columns, positions)

    def split(self, rollouts: Rollouts, token_budget: int) -> list[Tensor]:
        """Rows [n_i] int64 of micro-batches of at most about `token_budget` nodes; rows that share stay together."""
        prompts = torch.tensor([len(p) for p in rollouts.prompt_tokens], dtype=torch.int64)
        rows, _, positions = predicting_positions(prompts, rollouts.mask.cpu())
        numbers, tokens, shared = _sorted(rollouts, needed_lengths(len(rollouts), rows, positions))
        parts: list[list[int]] = []
        size = 0
        for number, row, common in zip(numbers, tokens, shared, strict=True):
            fresh = len(row) - common
            if not parts or size + fresh > token_budget:
                parts.append([])
                size, fresh = 0, len(row)
            parts[-1].append(number)
            size += fresh
        return [torch.tensor(p, dtype=torch.int64) for p in parts]

    def _trees(self, rollouts: Rollouts, needed: Tensor) -> list[PrefixTree]:
        numbers, tokens, shared = _sorted(rollouts, needed)
        trees: list[PrefixTree] = []
        start = 0
        while start < len(numbers):
            end, size = start + 1, len(tokens[start])
            while end < len(numbers) and self._joins(size, len(tokens[end]) - shared[end], shared[end]):
                size += len(tokens[end]) - shared[end]
                end += 1
            common = [0, *shared[start + 1 : end]]
            trees.append(build_tree(numbers[start:end], tokens[start:end], common))
            start = end
        return trees

    def _joins(self, size: int, fresh: int, common: int) -> bool:
        """Is a row with `common` shared and `fresh` own tokens cheaper inside a tree of `size` nodes than alone?

        A node costs 1 for the layers' matrix products and width / ATTENTION_KEYS for attention, which a mask does
        not make cheaper: inside, everyone's attention widens; alone, the shared tokens are computed again.
        """
        if not common or size + fresh > self.tree_nodes:
            return False
        inside = fresh * (1 + (size + fresh) / ATTENTION_KEYS) + size * fresh / ATTENTION_KEYS
        alone = (fresh + common) * (1 + (fresh + common) / ATTENTION_KEYS)
        return inside < alone

    def _calls(self, trees: list[PrefixTree]) -> list[list[PrefixTree]]:
        calls: list[list[PrefixTree]] = []
        width = 0
        for tree in sorted(trees, key=len, reverse=True):
            if not calls or (len(calls[-1]) + 1) * width > self.token_budget:
                calls.append([])
                width = len(tree)
            calls[-1].append(tree)
        return calls

    def _gathered(
        self, hidden: Tensor, call: list[PrefixTree], width: int, rows: Tensor, columns: Tensor, positions: Tensor
    ) -> Gathered:
        chosen, at = [], []
        for i, tree in enumerate(call):
            for row, nodes in tree.nodes.items():
                here = (rows == row).nonzero()[:, 0]
                chosen.append(here)
                at.append(i * width + nodes[positions[here]])
        index = torch.cat(chosen)
        flat = hidden.reshape(-1, hidden.shape[-1])
        # Not flat[...]: its backward adds the gradients of a shared node in the order in which threads come by.
        return Gathered(
            flat.index_select(0, torch.cat(at).to(self.device)),
            rows[index].to(self.device),
            columns[index].to(self.device),
        )


def _sorted(rollouts: Rollouts, needed: Tensor) -> tuple[list[int], list[Tensor], list[int]]:
    live = needed.nonzero()[:, 0].tolist()
    joined = []
    for row in live:
        length = int(rollouts.lengths[row])
        both = torch.cat([rollouts.prompt_tokens[row].cpu(), rollouts.tokens[row, :length].cpu()])
        joined.append(both[: int(needed[row])])
    order = sorted_rows([j.tolist() for j in joined])
    rows = [joined[i] for i in order]
    return [live[i] for i in order], rows, shared_lengths(rows)


def _pad(x: Tensor, width: int) -> Tensor:
    # Padding repeats the last entry: an ordinary token and position, seen by nobody.
    return torch.cat([x, x[-1:].expand(width - len(x))])


def _additive(
    trees: list[PrefixTree], width: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    mask = torch.full((len(trees), 1, width, width), BLOCKED, dtype=dtype)
    for i, tree in enumerate(trees):
        n = len(tree)
        mask[i, 0, :n, :n].masked_fill_(ancestor_mask(tree, window=window), 0.0)
        # A padding node sees itself, so that its softmax is defined.
        mask[i, 0].diagonal().zero_()
    return mask.to(device)
