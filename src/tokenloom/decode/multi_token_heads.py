"""Heads on the last hidden state that predict the tokens after the next one (Medusa, arXiv 2401.10774).

Head d = 1 ... K maps the hidden state h at token y_t to what the model's own output layer reads as the law of
y_(t+1+d):  h + silu(W_d h + b_d), with W_d = b_d = 0 at first.  Drafts are the trees of the likeliest tokens of each
head. `fit` trains heads on rows of ids with the model frozen: sum_d decay^d x cross-entropy, in nats.

Deviations from Medusa: the output layer is the model's own and shared, where Medusa trains one for each head: K D^2
numbers instead of K (D^2 + D V). Fidelity: paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenloom.decode.drafters.base import EMPTY, Ask, Drafter, Round, drawn, filled, largest
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Run
from tokenloom.decode.speculative import Speculative
from tokenloom.methods.decoding.draft_tree import DraftTree
from tokenloom.policy.own_logits import own_logits, run_trunk, trunk_of
from tokenloom.rollout.forward import base_model


class MultiTokenHeads(nn.Module):
    """K heads for hidden states of size D.

    Raises:
        ValueError: for fewer than one head.
    """

    def __init__(self, hidden: int, count: int = 4) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"multi-token heads: count is the number of heads, 1 or more; got {count}")
        self.weight = nn.Parameter(torch.zeros(count, hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(count, hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        """[K, N, D] from hidden states [N, D], for the model's own output layer."""
        wide = hidden.to(self.weight.dtype)
        turned = torch.baddbmm(self.bias[:, None], wide.expand(len(self.weight), -1, -1), self.weight.transpose(1, 2))
        return wide + nn.functional.silu(turned)

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors."""
        save_file({name: value.detach().contiguous() for name, value in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> MultiTokenHeads:
        """Heads from a safetensors file that `save` wrote."""
        found = load_file(path)
        heads = cls(found["weight"].shape[1], len(found["weight"]))
        heads.load_state_dict(found)
        return heads


@decoder("multi-token-heads", kind="drafter")
class MultiTokenDrafter(Drafter):
    """Trees of the likeliest tokens of trained `heads` (see `MultiTokenHeads`), `width` of each."""

    slug = "multi-token-heads"
    draws = True
    guess = (0.4, 0.12, 0.07, 0.05)

    def __init__(self, heads: Any, *, width: int = 6) -> None:
        if width < 1:
            raise ValueError(f"multi-token-heads: width is the tokens of each head, 1 or more; got {width}")
        self._heads: MultiTokenHeads = heads
        self.branching, self.depth = (width, width), len(heads.weight)
        self._hidden: Tensor | None = None
        self._scores: dict[int, Tensor] = {}

    @contextmanager
    def open(self, run: Run) -> Iterator[None]:
        """See `Drafter`."""
        model = base_model(run.model)
        size = model.config.get_text_config(decoder=True).hidden_size
        if size != self._heads.weight.shape[1]:
            raise ValueError(
                f"multi-token-heads: the heads read hidden states of size {self._heads.weight.shape[1]} and the "
                f"model's have {size}; fit heads on this model"
            )
        self._run, self._model, self._started = run, model, False
        self._scores.clear()

        def note(module: Any, args: Any, output: Any) -> None:
            self._hidden = output[0]

        handle = trunk_of(model).register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def key(self, row: int, text: list[int]) -> int | None:
        """See `Drafter`."""
        return 0 if row in self._scores else None

    def draft(self, asks: Sequence[Ask]) -> list[DraftTree]:
        """See `Drafter`."""
        return [self._tree(ask) if len(ask.shape) else EMPTY for ask in asks]

    def _tree(self, ask: Ask) -> DraftTree:
        scores = self._scores[ask.row]
        generated = ask.text[len(self._run.prompts[ask.row]) :]

        def followers(path: list[int], count: int) -> tuple[list[int], Tensor | None]:
            own = scores[len(path)][None]
            if ask.drawing == "given":
                return [int(i) for i in largest(own, count)[1][0]], None
            law = self._run.laws([ask.row], [[*generated, *path]], own)[0]
            return drawn(law, count, ask.drawing, ask.draw), law

        return filled(ask.shape, followers)

    def learn(self, rounds: Sequence[Round], scores: Tensor) -> None:
        """See `Drafter`: what the heads say behind the last accepted token."""
        if not self._started:
            # The prompts, whose last tokens lie anywhere in what was read.
            self._started = True
            return
        assert self._hidden is not None
        hidden = self._hidden[:, -scores.shape[1] :]
        places = torch.tensor([done.at[-1] for done in rounds], device=hidden.device)
        last = hidden[torch.arange(len(rounds), device=hidden.device), places]
        states = self._heads(last).to(hidden.dtype)  # [K, B, D]
        logits = own_logits(self._model, states.flatten(0, 1)).view(*states.shape[:2], -1)
        self._scores = {done.row: logits[:, i] for i, done in enumerate(rounds)}


@decoder("multi-token-heads", kind="loop")
def multi_token_heads(heads: Any, *, width: int = 6, nodes: int | None = None) -> Speculative:
    """Trees of the likeliest tokens of trained `heads`, verified by recursive rejection."""
    return Speculative(MultiTokenDrafter(heads, width=width), "recursive-rejection", nodes=nodes)


def fit(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    count: int = 4,
    steps: int = 200,
    positions: int = 256,
    batch: int = 4,
    learning_rate: float = 1e-3,
    decay: float = 0.8,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[MultiTokenHeads, list[float]]:
    """Train `count` heads on `rows` of ids, at most `positions` tokens a step; the heads and every step's loss.

    The model does not change. `progress(step, loss)` is called after every step.

    Raises:
        ValueError: for rows too short for all heads.
    """
    usable = [list(row) for row in rows if len(row) >= count + 2]
    if not usable:
        raise ValueError(f"{count} multi-token heads need rows of {count + 2} tokens or more; none of {len(rows)} is")
    base = base_model(model)
    trunk, device = trunk_of(base), next(base.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    heads = MultiTokenHeads(base.config.get_text_config(decoder=True).hidden_size, count).to(device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=learning_rate, weight_decay=0.0)
    losses: list[float] = []
    frozen = {p: p.requires_grad for p in base.parameters()}
    was_training = base.training
    base.eval()
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for step in range(steps):
            chosen = [usable[int(i)] for i in torch.randint(len(usable), (batch,), generator=generator)]
            value = _loss_of(base, trunk, heads, chosen, positions, decay, generator, device)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
            optimizer.step()
            losses.append(float(value.detach()))
            if progress is not None:
                progress(step, losses[-1])
    finally:
        for parameter, wanted in frozen.items():
            parameter.requires_grad_(wanted)
        base.train(was_training)
    return heads, losses


def _loss_of(
    base: Any,
    trunk: nn.Module,
    heads: MultiTokenHeads,
    rows: Sequence[Sequence[int]],
    positions: int,
    decay: float,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    count = len(heads.weight)
    width = max(len(row) for row in rows)
    # Padded behind, where causal attention does not look.
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    with torch.no_grad():
        hidden = run_trunk(trunk, ids)
    at = torch.tensor([(r, t) for r, row in enumerate(rows) for t in range(len(row) - count - 1)])
    at = at[torch.randperm(len(at), generator=generator)[:positions]].to(device)
    states = heads(hidden[at[:, 0], at[:, 1]]).to(hidden.dtype)
    logits = own_logits(base, states.flatten(0, 1)).view(*states.shape[:2], -1)
    total: Tensor = logits.new_zeros((), dtype=torch.float32)
    for d in range(count):
        wanted = ids[at[:, 0], at[:, 1] + 2 + d]
        total = total + decay ** (d + 1) * nn.functional.cross_entropy(logits[d].float(), wanted)
    return total
