"""Training of the router, its threshold, and its file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tokenloom.decode.r2r.labels import Labels
from tokenloom.methods.decoding.r2r import Router, positive_weight, recall_threshold, route, router_loss


@dataclass(frozen=True)
class Fitted:
    """What training found: the threshold, and on held-out positions loss, recall and the share routed."""

    threshold: float
    loss: float
    recall: float
    usage: float
    history: list[float]
    """Held-out loss after each epoch."""


def fit(
    router: Router,
    labels: Labels,
    held_out: Labels | None = None,
    *,
    learning_rate: float = 5e-5,
    weight_decay: float = 5e-4,
    batch: int = 1024,
    epochs: int = 50,
    patience: int = 10,
    recall: float = 0.95,
    recall_factor: float = 1.0,
    share_held_out: float = 0.1,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Fitted:
    """Train `router`, keep the epoch with the lowest held-out loss, and find the largest threshold with `recall`.

    Without `held_out`, the positions of a share of the prompts are held out. `progress(epoch, loss)` is called after
    each epoch.

    Raises:
        ValueError: when either part has no positive positions, or there is too little to hold out.
    """
    generator = torch.Generator().manual_seed(seed)
    if held_out is None:
        labels, held_out = _split(labels, share_held_out, generator)
    if not bool((labels.labels > 0.5).any()) or not bool((held_out.labels > 0.5).any()):
        raise ValueError(
            "r2r: training and held-out positions both need some where the models part; label more prompts, or give "
            "held_out"
        )
    device = router.combine.weight.device
    weight = positive_weight(labels.labels, recall_factor=recall_factor)
    trained = [p for p in router.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    history: list[float] = []
    best: tuple[float, dict[str, Tensor]] | None = None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # dropout draws from the global state
        for epoch in range(epochs):
            router.train()
            for rows in torch.split(torch.randperm(len(labels.labels), generator=generator), batch):
                loss = router_loss(
                    _scores(router, labels, rows), labels.labels[rows].to(device), positive_weight=weight
                )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
                optimizer.step()
            scores = _held_out_scores(router, held_out, batch)
            history.append(float(router_loss(scores, held_out.labels, positive_weight=weight)))
            if progress is not None:
                progress(epoch, history[-1])
            if best is None or history[-1] < best[0]:
                best = history[-1], copy.deepcopy(router.state_dict())
            elif epoch - history.index(min(history)) >= patience:
                break
    assert best is not None
    router.load_state_dict(best[1])
    scores = _held_out_scores(router, held_out, batch)
    threshold = recall_threshold(scores, held_out.labels, recall=recall)
    routed = route(scores, threshold=threshold)
    found = float(routed[held_out.labels > 0.5].float().mean())
    return Fitted(threshold, best[0], found, float(routed.float().mean()), history)


def save_router(router: Router, path: str | Path, *, threshold: float) -> None:
    """Write a router and its threshold as safetensors; the embeddings, which are the small model's, are left out."""
    from safetensors.torch import save_file

    weights = {n: p.detach().cpu().contiguous() for n, p in router.state_dict().items() if n != "embeddings.weight"}
    save_file(weights, str(path), metadata={"threshold": repr(threshold), "shape": json.dumps(router.shape)})


def load_router(path: str | Path, embeddings: Tensor) -> tuple[Router, float]:
    """A router for the small model whose input embeddings [V, D] are given, and its threshold.

    Raises:
        ValueError: for a file that is no router, or one for another model.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        told = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    if "shape" not in told or "threshold" not in told:
        raise ValueError(f"{str(path)!r} is no router: write one with save_router")
    router = Router(embeddings, **json.loads(told["shape"]))
    if weights["logits.weight"].shape[0] != embeddings.shape[1]:
        raise ValueError(
            f"{str(path)!r} is a router for a model of size {weights['logits.weight'].shape[0]}, not of "
            f"{embeddings.shape[1]}"
        )
    router.load_state_dict(weights | {"embeddings.weight": router.embeddings.weight})
    return router.eval(), float(told["threshold"])


def _scores(router: Router, labels: Labels, rows: Tensor) -> Tensor:
    device = router.combine.weight.device
    given = (labels.hidden[rows], labels.logits[rows], labels.tokens[rows])
    scores: Tensor = router(*(x.to(device) for x in given))
    return scores


def _held_out_scores(router: Router, labels: Labels, batch: int) -> Tensor:
    router.eval()
    with torch.no_grad():
        return torch.cat(
            [_scores(router, labels, r).cpu() for r in torch.split(torch.arange(len(labels.labels)), batch)]
        )


def _split(labels: Labels, share: float, generator: torch.Generator) -> tuple[Labels, Labels]:
    """By prompts, so that no response is on both sides."""
    numbers = torch.unique(labels.prompt)
    order = numbers[torch.randperm(len(numbers), generator=generator)]
    out = torch.isin(labels.prompt, order[: max(round(share * len(order)), 1)])
    return _at(labels, ~out), _at(labels, out)


def _at(labels: Labels, rows: Tensor) -> Labels:
    return Labels(**{name: value[rows] for name, value in vars(labels).items()})
