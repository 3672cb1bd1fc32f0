"""SDSAT: a model that drafts for itself by adaptive tokens, its training, and its drafter.

`add_adaptive_tokens(model, 5)` gives a model five more tokens, `fit` trains it on rows of ids, and
`loop("sdsat", adaptive=ids)` decodes with it. See `tokenloom.methods.decoding.sdsat` for the method.

Behind the text and behind every draft lies a block of adaptive tokens, so that the next drafts are known wherever the
path ends. They are read along and never committed: the cache holds the text alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.drafters.base import EMPTY, Ask, Drafter, Round, vocabulary_of
from tokenloom.decode.registry import build, decoder
from tokenloom.decode.run import Run
from tokenloom.decode.speculative import Speculative
from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree
from tokenloom.methods.decoding.sdsat import IGNORED, insert, loss, sdsat
from tokenloom.policy.tree_forward import MaskKinds
from tokenloom.rollout.attention import BLOCKED
from tokenloom.rollout.forward import base_model


@decoder("sdsat", kind="drafter")
class Sdsat(Drafter):
    """Drafts of the model's own `adaptive` tokens, given by their ids."""

    slug = "sdsat"
    draws = True
    guess = (0.6,)

    def __init__(self, adaptive: Any) -> None:
        self.forbidden = tuple(int(token) for token in adaptive)
        if not self.forbidden:
            raise ValueError("sdsat needs the ids of the model's adaptive tokens; add_adaptive_tokens gives them")
        self.depth = len(self.forbidden)
        self._scores: dict[int, Tensor] = {}
        self._probing: set[int] = set()

    @contextmanager
    def open(self, run: Run) -> Iterator[None]:
        """See `Drafter`."""
        vocab = vocabulary_of(run.model)
        if max(self.forbidden) >= vocab:
            raise ValueError(
                f"sdsat: adaptive token {max(self.forbidden)} is none of the model's {vocab} tokens; train a model "
                "that has them with add_adaptive_tokens and fit"
            )
        self._run = run
        self._scores.clear()
        yield

    def draft(self, asks: Sequence[Ask]) -> list[DraftTree]:
        """See `Drafter`; none before a block has been read."""
        return [self._chain(ask) if len(ask.shape) and ask.row in self._scores else EMPTY for ask in asks]

    def _chain(self, ask: Ask) -> DraftTree:
        scores, count = self._scores[ask.row], len(ask.shape)
        parents = [ROOT, *range(count - 1)]
        if ask.drawing == "given":
            return DraftTree(sdsat(scores, drafts=count), parents)
        generated = ask.text[len(self._run.prompts[ask.row]) :]
        tokens: list[int] = []
        q: dict[int, Tensor] = {}
        for parent, own in zip(parents, scores, strict=False):
            q[parent] = self._run.laws([ask.row], [[*generated, *tokens]], own[None])[0]
            tokens.append(ask.draw.categorical(q[parent]))
        return DraftTree(tokens, parents, q)

    def probes(self, ask: Ask, tree: DraftTree) -> tuple[list[int], list[int]]:
        """See `Drafter`: a block behind the text and one behind every draft."""
        if not len(ask.shape):
            return [], []
        self._probing.add(ask.row)
        tokens, parents = list[int](), list[int]()
        for node in range(ROOT, len(tree)):
            first = len(tree) + len(tokens)
            tokens += self.forbidden
            parents += [node, *range(first, first + len(self.forbidden) - 1)]
        return tokens, parents

    def probed(self, drafts: int) -> int:
        """See `Drafter`."""
        return (drafts + 1) * len(self.forbidden) if drafts else 0

    def learn(self, rounds: Sequence[Round], scores: Tensor) -> None:
        """See `Drafter`: the scores of the block behind the last accepted token."""
        for done, read in zip(rounds, scores, strict=True):
            self._scores.pop(done.row, None)
            if done.row in self._probing:
                start = 1 + len(done.tree) + done.at[-1] * self.depth
                self._scores[done.row] = read[start : start + self.depth]
        self._probing.clear()


@decoder("sdsat", kind="loop")
def sdsat_loop(adaptive: Any, *, nodes: int | None = None) -> Speculative:
    """Drafts of the model's own `adaptive` tokens, given by their ids, verified as a chain."""
    return Speculative(Sdsat(adaptive), build("verifier", "speculative-sampling"), nodes=nodes)


def add_adaptive_tokens(model: Any, count: int) -> tuple[int, ...]:
    """Give a Hugging Face causal LM `count` more tokens, each begun as the mean of all; their ids.

    What other tokens predict among themselves stays as it was.

    Raises:
        ValueError: for fewer than one.
    """
    if count < 1:
        raise ValueError(f"sdsat needs one adaptive token at least; got {count}")
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(old + count, mean_resizing=False)
    tables = {id(w): w for w in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    with torch.no_grad():
        for weight in tables.values():
            mean = weight[:old].float().mean(0)
            # Apart from each other, or they would learn the same.
            noise = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(0)).to(mean)
            weight[old:] = (mean + noise * weight[:old].float().std(0)).to(weight.dtype)
    return tuple(range(old, old + count))


def fit(
    model: Any,
    rows: Sequence[Sequence[int]],
    adaptive: Sequence[int],
    *,
    steps: int = 200,
    batch: int = 4,
    blocks: int = 8,
    learning_rate: float = 1e-4,
    weight: float = 1.0,
    embeddings_only: bool = False,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` on `rows` of ids with `blocks` blocks each, at places drawn evenly; the loss of every step.

    `embeddings_only` trains the adaptive tokens' embeddings alone: the model writes what it wrote before.
    `progress(step, loss)` is called after every step.

    Raises:
        ValueError: for a row too short to hold a block with a token to predict behind it.
    """
    short = [i for i, row in enumerate(rows) if len(row) < 3]
    if not rows or short:
        raise ValueError(f"sdsat is trained on rows of 3 tokens or more; rows {short[:5]} of {len(rows)} are shorter")
    generator = torch.Generator().manual_seed(seed)
    table = model.get_input_embeddings().weight
    before = {p: p.requires_grad for p in model.parameters()}
    trained = [table] if embeddings_only else [p for p, wanted in before.items() if wanted]
    own = torch.tensor(list(adaptive), device=table.device)
    losses: list[float] = []
    was_training = model.training
    model.eval()  # no dropout: ordinary tokens are to predict what they do in use
    try:
        for parameter in before:
            parameter.requires_grad_(any(parameter is p for p in trained))
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        for step in range(steps):
            chosen = [rows[int(i)] for i in torch.randint(len(rows), (batch,), generator=generator)]
            value = _loss_of(model, chosen, adaptive, blocks, weight, generator)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
            if embeddings_only:
                assert table.grad is not None
                kept = table.grad[own].clone()
                table.grad.zero_()
                table.grad[own] = kept
            optimizer.step()
            losses.append(float(value.detach()))
            if progress is not None:
                progress(step, losses[-1])
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
            parameter.grad = None
        model.train(was_training)
    return losses


def _loss_of(
    model: Any,
    rows: Sequence[Sequence[int]],
    adaptive: Sequence[int],
    blocks: int,
    weight: float,
    generator: torch.Generator,
) -> Tensor:
    made = []
    for row in rows:
        # Behind a place come the token that the text predicts, and one at least for the block.
        places = torch.randperm(len(row) - 2, generator=generator)[:blocks]
        made.append(insert(torch.tensor(list(row)), places.tolist(), adaptive))
    width = max(len(m.ids) for m in made)
    ids = torch.stack([_padded(m.ids, width, 0) for m in made])
    positions = torch.stack([_padded(m.positions, width, 0) for m in made])
    labels = torch.stack([_padded(m.labels, width, IGNORED) for m in made])
    visible = torch.eye(width, dtype=torch.bool).repeat(len(made), 1, 1)  # padding sees itself
    for i, m in enumerate(made):
        visible[i, : len(m.ids), : len(m.ids)] = m.visible
    device = model.get_input_embeddings().weight.device
    logits = model(
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        attention_mask=masks(model, visible, positions),
        use_cache=False,
    ).logits
    return loss(logits, labels.to(device), torch.isin(ids, torch.tensor(list(adaptive))).to(device), weight=weight)


def masks(model: Any, visible: Tensor, positions: Tensor) -> Any:
    """What a Hugging Face model takes as `attention_mask` for `visible` [B, S, S] at `positions` [B, S]."""
    kinds = MaskKinds.from_config(base_model(model).config)
    weight = model.get_input_embeddings().weight

    def additive(seen: Tensor) -> Tensor:
        zeros = torch.zeros(seen.shape, dtype=weight.dtype)
        return zeros.masked_fill_(~seen, BLOCKED)[:, None].to(weight.device)

    near = visible
    if kinds.window is not None:
        near = visible & (positions[:, :, None] - positions[:, None] < kinds.window)
    if not kinds.names:
        return additive(near)
    return {name: additive(near if name == "sliding_attention" else visible) for name in kinds.names}


def _padded(x: Tensor, width: int, value: int) -> Tensor:
    return torch.cat((x, torch.full((width - len(x),), value, dtype=x.dtype)))
