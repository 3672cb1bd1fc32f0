"""A session: a model's state over a batch of prefixes, each of its own length.

Tokens are committed (`start`, `step`, `extend`), or tried without being committed (`try_nodes`, a tree of drafts per
row), after which `accept` commits a path of each tree. `crop` takes committed tokens back, `branch` selects rows.
A row's token number c lies in column c of the cache, whatever its neighbors do, so nothing is ever padded on the left;
what lies behind a row's last token is hidden by the mask and written over later.

Letters: B rows, n new tokens (or nodes) of a row, S columns, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenloom.decode.hidden_states import evaluating
from tokenloom.policy.tree_forward import MaskKinds
from tokenloom.rollout.attention import BLOCKED
from tokenloom.rollout.cache import Place, columns_for, new_masked_cache
from tokenloom.rollout.cache_block import block_of
from tokenloom.rollout.forward import ModelCall, base_model
from tokenloom.rollout.lean import Lean, lean_modules
from tokenloom.rollout.native import session as native

ROOT = -1
"""The parent of a node that follows the row's last committed token."""


class Session(Protocol):
    """What loops, drafters and verifiers see of a model; `TableSession` is the one of a table of probabilities."""

    rows: list[list[int]]
    """The committed ids of each row, the prompt first."""

    def start(self) -> Tensor:
        """Read the prompts; scores [B, V] of what follows each."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Commit one token per row, [B]; scores [B, V] of what follows."""
        ...

    def extend(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Commit any number of tokens per row, one at least; scores [B, V] of what follows the last of each."""
        ...

    ragged: bool
    """Whether what a row is filled up with costs nothing."""

    def try_nodes(self, tokens: Tensor, parents: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Scores [B, n, V] after each of `tokens` [B, n], whose parents [B, n] are earlier nodes of the row or `ROOT`.

        Nothing is committed. Rows with fewer nodes are filled up with anything, such as copies of a node; `counts` says
        how many count, and the scores of others are anything.
        """
        ...

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit, in each row, the nodes of its path (indices into what was tried last; may be empty)."""
        ...

    def crop(self, lengths: Sequence[int]) -> None:
        """Keep the first `lengths` tokens of each row."""
        ...

    def branch(self, rows: Sequence[int]) -> None:
        """Go on with copies of the rows at these indices, repeats allowed."""
        ...


class ModelSession:
    """The session of a Hugging Face causal LM whose attention a mask can tell what it sees."""

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], *, lean: Lean | None = None, **model_options: Any
    ) -> None:
        """Use `open_session`. `model_options` go to every forward, such as `output_hidden_states=True`; what the model
        returned last is `output`.

        Raises:
            ValueError: for an empty prompt, or a model with other state than keys and values.
        """
        if not prompts or any(len(p) == 0 for p in prompts):
            raise ValueError("a session needs prompts of at least one token each, such as the model's start token")
        self._call = ModelCall(model, **model_options)
        self._config = base_model(model).config
        self.device = next(base_model(model).parameters()).device
        self._kinds = MaskKinds.from_config(self._config)
        self._place = Place(alike=not self._kinds.names)
        lean = lean or Lean()
        self.ragged, self._block = lean.compiled, block_of(self.device, lean)
        dtype = next(base_model(model).parameters()).dtype
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        self._dtype = dtype
        cache = new_masked_cache(
            self._config,
            self._place,
            rows=len({tuple(p) for p in prompts}),
            dtype=dtype if lean.attention else None,
            transposed=lean.attention,
            block=self._block,
        )
        if cache is None:
            raise ValueError(
                f"{type(base_model(model)).__name__} has layers that carry other state than keys and values, or that a "
                "mask does not tell what they see; tokens cannot be taken back from it. Use plain generate with logits "
                "processors"
            )
        self._cache: Any = cache
        text = self._config.get_text_config(decoder=True)
        self.positions: int | None = getattr(text, "max_position_embeddings", None)
        self.rows = [list(p) for p in prompts]
        self._lengths = torch.zeros(0, dtype=torch.int64, device=self.device)  # committed to the cache
        self._reached = 0
        self._tried: Tensor | None = None

    @property
    def output(self) -> Any:
        """What the model returned last."""
        return self._call.output

    def start(self) -> Tensor:
        """See `Session`."""
        prompts = [tuple(row) for row in self.rows]
        distinct = list(dict.fromkeys(prompts))
        self.rows = [[] for _ in distinct]
        self._lengths = torch.zeros(len(distinct), dtype=torch.int64, device=self.device)
        scores = self.extend(distinct)
        if len(distinct) == len(prompts):
            return scores
        copies = [distinct.index(p) for p in prompts]
        self.branch(copies)
        return scores[copies]

    def step(self, tokens: Tensor) -> Tensor:
        """See `Session`."""
        scores = self._forward(tokens[:, None].to(self.device), None, last=1)[:, 0]
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        self._lengths = self._lengths + 1
        return scores

    def step_embeddings(self, embeddings: Tensor, tokens: Tensor) -> Tensor:
        """Commit one input embedding per row, [B, D], recorded as `tokens` [B]; scores [B, V] of what follows."""
        scores = self._forward(None, None, last=1, embeddings=embeddings[:, None])[:, 0]
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        self._lengths = self._lengths + 1
        return scores

    def extend(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Session`."""
        counts = torch.tensor([len(t) for t in tokens], device=self.device)
        if len(tokens) != len(self.rows) or int(counts.min()) < 1:
            raise ValueError(f"extend takes at least one token for each of the {len(self.rows)} rows")
        ids = self._filled(tokens)
        ragged = int(counts.min()) != ids.shape[1]
        scores = self._forward(ids, None, last=ids.shape[1] if ragged else 1, counts=counts.tolist())
        for row, new in zip(self.rows, tokens, strict=True):
            row.extend(int(t) for t in new)
        self._lengths = self._lengths + counts
        return scores[torch.arange(len(scores), device=self.device), counts - 1 if ragged else 0]

    def try_nodes(self, tokens: Tensor, parents: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """See `Session`."""
        self._tried = tokens.to(self.device)
        return self._forward(self._tried, parents, last=tokens.shape[1], counts=counts)

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """See `Session`."""
        if self._tried is None:
            raise ValueError("nothing was tried: accept follows try_nodes")
        longest = max((len(p) for p in paths), default=0)
        moved = any(list(p) != list(range(len(p))) for p in paths)
        if longest and moved:
            # Where a path is shorter, its node moves onto itself.
            source = torch.tensor([list(p) + list(range(len(p), longest)) for p in paths], device=self.device)
            target = torch.arange(longest, device=self.device).expand_as(source)
            columns = self._lengths[:, None]
            if not native.move(self._cache.layers, columns + source, columns + target):
                for layer in self._cache.layers:
                    layer.move(columns + source, columns + target)
        tried = self._tried.tolist()
        for row, nodes, path in zip(self.rows, tried, paths, strict=True):
            row.extend(nodes[i] for i in path)
        self._lengths = self._lengths + torch.tensor([len(p) for p in paths], device=self.device)
        self._tried = None

    def crop(self, lengths: Sequence[int]) -> None:
        """See `Session`."""
        kept = torch.tensor(list(lengths), device=self.device)
        if bool((kept > self._lengths).any()) or bool((kept < 1).any()):
            raise ValueError(
                f"crop to {list(lengths)}: rows have {self._lengths.tolist()} tokens, and keep one at least"
            )
        self._lengths, self._tried = kept, None
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]

    def branch(self, rows: Sequence[int]) -> None:
        """See `Session`."""
        at = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        self._cache.reorder_cache(at)
        self._lengths, self._tried = self._lengths[at], None
        self.rows = [list(self.rows[i]) for i in rows]

    def _filled(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        width = max(len(t) for t in tokens)
        return torch.tensor([[*t, *([0] * (width - len(t)))] for t in tokens], device=self.device)

    def _forward(
        self,
        tokens: Tensor | None,
        parents: Tensor | None,
        *,
        last: int,
        embeddings: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Scores [B, last, V] after the last of the new tokens (or embeddings [B, n, D]) of each row."""
        given = tokens if tokens is not None else embeddings
        assert given is not None
        n = given.shape[1]
        depths, seen = _ancestry(parents, n, self.device)
        columns = self._lengths[:, None] + torch.arange(n, device=self.device)
        together = len(self._lengths) == 1 or bool((self._lengths == self._lengths[0]).all())
        self._place.row = 0
        self._place.columns = int(self._lengths[0]) if together else columns
        self._place.length = n + int(self._lengths.max())
        whole = counts is None or min(counts) == n
        self._place.counts = None if whole else torch.tensor(counts, device=self.device)
        self._reached = max(self._reached, columns_for(self._place.length, self._block))
        positions = self._lengths[:, None] + depths
        masks = self._masks(positions, columns, seen)
        # Fillers behind a shorter row's tokens may stand beyond the last position; nobody reads them.
        most = None if self.positions is None else self.positions - 1
        positions = positions.clamp(max=most)
        with torch.no_grad():
            return self._call(tokens, masks, positions, self._cache, last=last, embeddings=embeddings)

    def _masks(self, positions: Tensor, columns: Tensor, seen: Tensor) -> Any:
        """Additive masks [B, 1, n, S]; by type of layer where there are several."""
        b, n = positions.shape
        keys = torch.arange(self._reached, device=self.device)
        visible = (keys < self._lengths[:, None])[:, None].repeat(1, n, 1)
        visible.scatter_(2, columns[:, None].expand(b, n, n), seen.expand(b, n, n))
        if self._kinds.window is None:
            near = visible
        else:
            stands = keys.repeat(b, 1).scatter_(1, columns, positions)
            near = visible & (positions[:, :, None] - stands[:, None] < self._kinds.window)
        if not self._kinds.names:
            return self._additive(near)
        return {name: self._additive(near if name == "sliding_attention" else visible) for name in self._kinds.names}

    def _additive(self, visible: Tensor) -> Tensor:
        zeros = torch.zeros(visible.shape, dtype=self._dtype, device=self.device)
        return zeros.masked_fill_(~visible, BLOCKED)[:, None]


@contextmanager
def open_session(model: Any, prompts: Sequence[Sequence[int]], **model_options: Any) -> Iterator[Session]:
    """A session of `model` over prompts (ids without padding) while the block lasts; nothing is trained in it.

    A model with a method `open_session(prompts)`, such as `TableLM`, gives its own. `model_options` go to every
    forward; with some, modules are not replaced by lean forms, as those hand nothing out.

    Raises:
        ValueError: as `ModelSession`.
    """
    own = getattr(model, "open_session", None)
    if own is not None:
        yield own(prompts)
        return
    # No gradient is taken in each forward, not here: sessions may close in any order.
    with evaluating(model):
        if model_options:
            yield ModelSession(model, prompts, **model_options)
        else:
            with lean_modules(base_model(model), in_chunks=True) as lean:
                yield ModelSession(model, prompts, lean=lean)


def _ancestry(parents: Tensor | None, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Depth [B or 1, n] of each node and, for node i, which nodes j it descends from or is, [B or 1, n, n]."""
    if parents is None:
        return torch.arange(n, device=device)[None], torch.ones(1, n, n, dtype=torch.bool, device=device).tril()
    # A node's ancestors as the bits of a number: cheaper than tensors of a few numbers each.
    width, bits = -(-n // 8), bytearray()
    for row in parents.tolist():
        lines: list[int] = []
        for node, parent in enumerate(row):
            lines.append((0 if parent == ROOT else lines[parent]) | 1 << node)
        bits += b"".join(line.to_bytes(width, "little") for line in lines)
    packed = torch.frombuffer(bits, dtype=torch.uint8).view(len(parents), n, width, 1)
    seen = (packed >> torch.arange(8)).bitwise_and(1).flatten(2)[..., :n].bool()
    return (seen.sum(-1) - 1).to(device), seen.to(device)
