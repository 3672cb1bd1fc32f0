"""Steering vectors by the SPLIT objective: training through a hook, use while a model generates, log odds of pairs.

    vector, _ = fit_vector(model, pairs, layer=12)
    with steering(model, vector, layer=12, multiplier=4.0):
        model.generate(...)

or `decode.loop("split-steering", vector=vector, layer=12)`. A vector is added to the output of a layer's MLP, which
shifts the bias of its last linear map. The rules are in `methods.decoding.split_steering`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.decode.hidden_states import evaluating
from tokenloom.decode.layers import decoder_layers, first_tensor, hooked, mlp_of, with_first
from tokenloom.decode.plain import Plain
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.methods.decoding.split_steering import preference_log_odds, split_loss, utility_log_odds
from tokenloom.rollout.forward import base_model


@dataclass(frozen=True)
class Pair:
    """Ids of a prompt with a wanted and an unwanted continuation."""

    prompt: Sequence[int]
    positive: Sequence[int]
    negative: Sequence[int]


@contextmanager
def steering(model: Any, vector: Tensor, *, layer: int, multiplier: float | Tensor = 1.0) -> Iterator[None]:
    """While it lasts, `multiplier` (or one per row, [B]) times `vector` [D] is added to the MLP output of a layer.

    Raises:
        ValueError: for a layer that the model does not have, or a vector of another model.
    """
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"split-steering: the model has layers 0 to {len(layers) - 1}, not {layer}")
    width = model.get_input_embeddings().embedding_dim
    if vector.shape != (width,):
        raise ValueError(f"split-steering: the vector must be [{width}] for this model, got {list(vector.shape)}")

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = first_tensor(output)
        factor = multiplier.to(hidden)[:, None, None] if isinstance(multiplier, Tensor) else multiplier
        return with_first(output, hidden + factor * vector.to(hidden))

    with hooked(model, [(mlp_of(layers[layer]), hook)]):
        yield


@decoder("split-steering", kind="loop")
class SplitSteering(Loop):
    """Plain decoding with `vector` [D] added to the MLP output of a layer, `multiplier` times."""

    def __init__(self, vector: Tensor, *, layer: int = 20, multiplier: float = 1.0) -> None:
        """Raises ValueError for a vector that is no tensor."""
        if not isinstance(vector, Tensor):
            raise ValueError(
                "split-steering: the vector is a tensor, of fit_vector or of a .safetensors file under the name "
                f"'vector'; got {vector!r}"
            )
        self.vector, self.layer, self.multiplier = vector, layer, multiplier

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        with steering(run.model, self.vector, layer=self.layer, multiplier=self.multiplier):
            return Plain().rows(run)


def continuation_losses(
    model: Any, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, mean: bool = True
) -> Tensor:
    """-log P(continuation | prompt) [B], per token or (`mean` False) of the whole, float32; differentiable.

    Raises:
        ValueError: for an empty prompt or continuation.
    """
    if any(not p or not c for p, c in zip(prompts, continuations, strict=True)):
        raise ValueError("split-steering: prompts and continuations need at least one token each")
    rows = [[*p, *c] for p, c in zip(prompts, continuations, strict=True)]
    width = max(len(r) for r in rows)
    device = next(base_model(model).parameters()).device
    # Padding on the right: nothing before it sees it.
    ids = torch.tensor([[*r, *([0] * (width - len(r)))] for r in rows], device=device)
    real = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    starts = torch.tensor([len(p) for p in prompts], device=device)[:, None]
    scored = (torch.arange(1, width, device=device) >= starts) & real[:, 1:].bool()
    total = torch.where(scored, losses.view(len(rows), -1), 0.0).sum(-1)
    return total / scored.sum(-1) if mean else total


def pair_log_odds(model: Any, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Preference and utility log odds [N] of pairs of whole continuations, under the model as it is steered."""
    with torch.no_grad(), evaluating(base_model(model)):
        wanted = continuation_losses(model, [p.prompt for p in pairs], [p.positive for p in pairs], mean=False).double()
        unwanted = continuation_losses(model, [p.prompt for p in pairs], [p.negative for p in pairs], mean=False)
    return preference_log_odds(wanted, unwanted.double()), utility_log_odds(wanted, unwanted.double())


def fit_vector(
    model: Any,
    pairs: Sequence[Pair],
    *,
    layer: int,
    learning_rate: float = 0.08,
    epochs: int = 2,
    batch: int = 4,
    multipliers: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
    **objective: Any,
) -> tuple[Tensor, list[float]]:
    """A steering vector [D] for a layer, trained on pairs by `split_loss` (`objective`: its hyperparameters).

    Every pair of a batch is steered by a multiplier drawn for it; AdamW without weight decay, the rate falling
    linearly, gradients clipped to norm 1. The model's own weights are left alone. Also gives the losses of the
    steps; `progress(step, loss)` is called after each.

    Raises:
        ValueError: without pairs.
    """
    if not pairs:
        raise ValueError("split-steering: a steering vector needs pairs to be trained on")
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings().weight
    vector = nn.Parameter(torch.zeros(embeddings.shape[1], device=embeddings.device))
    optimizer = torch.optim.AdamW([vector], lr=learning_rate, weight_decay=0.0)
    steps = epochs * -(-len(pairs) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / steps)
    history: list[float] = []
    with _only_trained(model):
        for _ in range(epochs):
            order = torch.randperm(len(pairs), generator=generator).tolist()
            for start in range(0, len(order), batch):
                chosen = [pairs[i] for i in order[start : start + batch]]
                drawn = torch.randint(len(multipliers), (len(chosen),), generator=generator)
                factors = torch.tensor(list(multipliers))[drawn].to(embeddings.device)
                references = _losses(model, chosen) if objective.get("weight_reference") else ()
                with steering(model, vector, layer=layer, multiplier=factors):
                    losses = _losses(model, chosen, grad=True)
                loss = split_loss(*losses, *references, **objective)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
                nn.utils.clip_grad_norm_([vector], 1.0)
                optimizer.step()
                schedule.step()
                history.append(float(loss.detach()))
                if progress is not None:
                    progress(len(history), history[-1])
    return vector.detach(), history


def _losses(model: Any, pairs: Sequence[Pair], *, grad: bool = False) -> tuple[Tensor, Tensor]:
    with torch.set_grad_enabled(grad):
        prompts = [p.prompt for p in pairs]
        wanted = continuation_losses(model, prompts, [p.positive for p in pairs])
        return wanted, continuation_losses(model, prompts, [p.negative for p in pairs])


@contextmanager
def _only_trained(model: Any) -> Iterator[None]:
    """The model in evaluation mode, its weights without gradients."""
    training = [m for m in model.modules() if m.training]
    learning = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)
        for m in training:
            m.training = True
