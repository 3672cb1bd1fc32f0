"""The tree forward: a step's rows packed into prefix trees, a shared prefix computed once. Positions are depths.

Where attention can be computed on trees (`TreeMask`), a call holds as many trees as fit, node after node, without
padding. Elsewhere it is told by an additive float mask over all pairs of nodes (a boolean 4D mask is silently wrong on
eager attention); then trees stay small, and trees of similar size share a call. Either way there is one mask for each
layer type: ancestors, and in sliding-window layers ancestors nearer than the window.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenloom.batch import Rollouts
from tokenloom.policy.forward import needed_lengths, predicting_positions, rotated_alike
from tokenloom.policy.interface import Gathered, Trunk
from tokenloom.policy.tree import BLOCKED, PrefixTree, ancestor_mask, build_tree, pad_tree, shared_lengths, sorted_rows
from tokenloom.policy.tree_attention_mask import TreeMask
from tokenloom.policy.tree_flex_attention import BLOCK

ATTENTION_KEYS = 256
"""Keys whose attention under a dense mask costs a node as much as its matrix products; on a CPU with a 135M model."""

TREE_NODES = 4096
"""Most nodes of a tree under a dense mask."""

PART_NODES = 100
"""What a call costs besides its nodes (formats of weights and gradients, among other things), in nodes."""

ABOUT = 1.1
"""Times its budget that a micro-batch may have where this saves one."""

BEYOND = 1.5
"""Of a long row's nodes: what a part may have with all that rows add which share its beginning."""

STYLES = ("flex", "blocks", "dense")
"""How attention learns of the trees, best first: see `MaskKinds`."""


@dataclass(frozen=True)
class MaskKinds:
    """Which masks a model takes: one for all layers, or a dict by layer type; and the window of sliding layers.

    `style` is "flex" (FlexAttention on CUDA, blocks on other devices), "blocks" (`tree_attention`), both through a
    `TreeMask` and for models that call PyTorch's fused attention; or "dense", additive numbers, which all models read.
    """

    names: tuple[str, ...] = ()
    window: int | None = None
    style: str = "dense"

    @classmethod
    def from_config(cls, config: Any) -> MaskKinds:
        """Read layer types and window as transformers' modeling code does."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        types = set(getattr(text, "layer_types", None) or ())
        window = getattr(text, "sliding_window", None) if types or _knows(text, "sliding_window") else None
        # GPT-Neo's local layers measure their window between places in the input, whatever mask and positions say.
        types |= set(getattr(text, "attention_layers", None) or ()) - {"global"}
        # ALiBi's biases are over places in the input, too.
        types |= {"alibi"} if _has_alibi(text) else set()
        style = "flex" if getattr(text, "_attn_implementation", None) == "sdpa" else "dense"
        return cls(tuple(sorted(types)), window, style)

    @property
    def unknown(self) -> list[str]:
        """Layer types of which it is not known what they see."""
        return [name for name in self.names if name not in ("full_attention", "sliding_attention")]

    def fallbacks(self, device: torch.device) -> list[MaskKinds]:
        """These kinds in the style for `device`, and after them what to try where they fail."""
        styles = STYLES[STYLES.index(self.style) :]
        return [replace(self, style=s) for s in styles if s != "flex" or device.type == "cuda"]

    def padded(self, tree: PrefixTree, device: torch.device) -> PrefixTree:
        """The tree as `build` wants it."""
        return pad_tree(tree, BLOCK) if self._flex(device) else tree

    def build(self, trees: list[PrefixTree], width: int, dtype: torch.dtype, device: torch.device) -> Any:
        """The mask(s) [n, 1, width, width] for trees padded to `width` nodes; n is 1 in every style but "dense".

        Raises:
            NotImplementedError: for a layer type that is neither full nor sliding-window attention.
        """
        if not self.names:
            return self._mask(trees, width, self.window, dtype, device)
        if self.unknown:
            raise NotImplementedError(f"what layers of type {self.unknown} see of a tree is not known")
        windows = {"full_attention": None, "sliding_attention": self.window}
        return {name: self._mask(trees, width, windows[name], dtype, device) for name in self.names}

    def _mask(
        self, trees: list[PrefixTree], width: int, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        if self.style == "dense":
            return _additive(trees, width, window, dtype, device)
        return TreeMask.build(trees[0], window, dtype, device, flex=self._flex(device))

    def _flex(self, device: torch.device) -> bool:
        return self.style == "flex" and device.type == "cuda"


class TreeForward:
    """Calls of at most `token_budget` nodes, padding included; of long rows as `_parts` has it.

    `reach`: see `rotation_reach`.
    """

    def __init__(
        self,
        device: torch.device,
        kinds: MaskKinds,
        *,
        token_budget: int,
        dtype: torch.dtype = torch.float32,
        reach: int | None = None,
    ) -> None:
        self.device, self.kinds, self.dtype = device, kinds, dtype
        self.token_budget, self.reach = token_budget, reach
        self.computed = 0

    def gather(self, trunk: Trunk, rollouts: Rollouts) -> Iterator[Gathered]:
        """One `Gathered` per call. Rows without a sampled token, and what follows a row's last one, are left out."""
        prompts = torch.tensor([len(p) for p in rollouts.prompt_tokens], dtype=torch.int64)
        rows, columns, positions = predicting_positions(prompts, rollouts.mask.cpu())
        predicting = _by_row(len(rollouts), rows)
        for call in self._planned(rollouts, needed_lengths(len(rollouts), rows, positions)):
            self.computed += sum(len(t) for t in call)
            padded = [self.kinds.padded(t, self.device) for t in call]
            width = max(len(t) for t in padded)
            fed = torch.stack([_filled(t.tokens, width) for t in padded]).to(self.device)
            depths = torch.stack([_filled(t.depth, width) for t in padded]).to(self.device)
            hidden = trunk(fed, mask=self.kinds.build(padded, width, self.dtype, self.device), positions=depths)
            # Which entries a call gives, and the node that predicts each.
            entries, nodes = [], []
            for i, tree in enumerate(call):
                for row, path in tree.nodes.items():
                    entries.append(predicting[row])
                    nodes.append(i * width + path[positions[predicting[row]]])
            distinct, at = torch.unique(torch.cat(nodes), return_inverse=True)
            chosen = torch.cat(entries)
            # Not hidden[...]: its backward adds the gradients of a shared node in the order in which threads come by.
            yield Gathered(
                hidden.reshape(-1, hidden.shape[-1]).index_select(0, distinct.to(self.device)),
                rows[chosen].to(self.device),
                columns[chosen].to(self.device),
                at.to(self.device),
            )

    def split(self, rollouts: Rollouts, token_budget: int) -> list[Tensor]:
        """Rows [n_i] int64 of micro-batches of at most about `token_budget` nodes; rows that share stay together."""
        prompts = torch.tensor([len(p) for p in rollouts.prompt_tokens], dtype=torch.int64)
        rows, _, positions = predicting_positions(prompts, rollouts.mask.cpu())
        numbers, tokens, shared = _sorted(rollouts, needed_lengths(len(rollouts), rows, positions))
        return [torch.tensor(numbers[a:b], dtype=torch.int64) for a, b in _even_parts(tokens, shared, token_budget)]

    def _planned(self, rollouts: Rollouts, needed: Tensor) -> Iterator[list[PrefixTree]]:
        """What each call holds: one tree, or several under a dense mask."""
        dense = self.kinds.style == "dense"
        for some in rotated_alike(needed, self.reach):
            numbers, tokens, shared = _sorted(rollouts, some)
            runs = _runs(tokens, shared, self._joins) if dense else _parts(tokens, shared, self.token_budget)
            trees = [build_tree(numbers[a:b], tokens[a:b], [0, *shared[a + 1 : b]]) for a, b in runs]
            yield from self._calls(trees) if dense else ([tree] for tree in trees)

    def _joins(self, size: int, fresh: int, common: int) -> bool:
        """Is a row with `common` shared and `fresh` own tokens cheaper inside a tree of `size` nodes than alone?

        A node costs 1 for the layers' matrix products and width / ATTENTION_KEYS for attention, which a dense mask
        does not make cheaper: inside, everyone's attention widens; alone, the shared tokens are computed again.
        """
        if not common or size + fresh > TREE_NODES:
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


def _has_alibi(config: Any) -> bool:
    attention = getattr(config, "attn_config", None)  # MPT's
    return config.model_type == "bloom" or any(bool(getattr(c, "alibi", False)) for c in (config, attention))


def _knows(config: Any, name: str) -> bool:
    """Whether the config's class has a setting; what else stands in a config.json, no modeling code reads."""
    kind = type(config)
    return hasattr(kind, name) or name in kind.attribute_map or name in inspect.signature(kind).parameters


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


def _by_row(count: int, rows: Tensor) -> list[Tensor]:
    """For each of `count` rows the indices at which it stands in the ascending `rows`."""
    return list(torch.split(torch.arange(len(rows)), torch.bincount(rows, minlength=count).tolist()))


def _even_parts(tokens: list[Tensor], shared: list[int], budget: int) -> list[tuple[int, int]]:
    """As many parts as `_parts` makes and no more nodes, but no larger than need be: the largest one takes memory.

    Where a budget `ABOUT` times as large makes do with fewer parts, it is taken: each part reads all weights.
    """

    def nodes(parts: list[tuple[int, int]]) -> int:
        return sum(len(tokens[row]) - (shared[row] if row > a else 0) for a, b in parts for row in range(a, b))

    parts, high = _parts(tokens, shared, budget), budget
    roomier = _parts(tokens, shared, round(ABOUT * budget))
    if len(roomier) < len(parts):
        parts, high = roomier, round(ABOUT * budget)
    most, low = nodes(parts), 0
    while len(parts) > 1 and high - low > max(1, budget // 64):
        middle = (low + high) // 2
        tried = _parts(tokens, shared, middle)
        if len(tried) == len(parts) and nodes(tried) <= most:
            parts, high = tried, middle
        else:
            low = middle
    return parts


def _parts(tokens: list[Tensor], shared: list[int], budget: int) -> list[tuple[int, int]]:
    """Sorted rows in consecutive parts of at most `budget` nodes.

    A row near the budget or beyond it takes rows along that share more with it than they add, up to `BEYOND` times
    its nodes: each on its own would compute all that again.

    A part computes the whole prefix of its first row, which the part before may have computed, too. So a part ends
    where the next row shares little, even if that leaves it less than full: each part costs PART_NODES once.
    """
    parts: list[tuple[int, int]] = []
    start = 0
    while start < len(tokens):
        size, end, least = len(tokens[start]), start + 1, math.inf
        beyond = max(budget, BEYOND * size)
        for row in range(start + 1, len(tokens)):
            loss = shared[row] - PART_NODES * size / budget
            if loss <= least:
                end, least = row, loss
            fresh = len(tokens[row]) - shared[row]
            size += fresh
            if size > (beyond if shared[row] > fresh else budget):
                break
        else:
            end = len(tokens)
        parts.append((start, end))
        start = end
    return parts


def _runs(tokens: list[Tensor], shared: list[int], joins: Callable[[int, int, int], bool]) -> Iterator[tuple[int, int]]:
    """Sorted rows in consecutive runs: a row joins while `joins(nodes so far, its own, those it shares)`."""
    start = 0
    while start < len(tokens):
        end, size = start + 1, len(tokens[start])
        while end < len(tokens) and joins(size, len(tokens[end]) - shared[end], shared[end]):
            size += len(tokens[end]) - shared[end]
            end += 1
        yield start, end
        start = end


def _filled(x: Tensor, width: int) -> Tensor:
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
