"""Gauges of context cutoff: P(a context read so far suffices), by probes on attention heads or by asking the model.

gauge = fit(model, samples)                                    # samples: Sample(question_ids, context_ids, gold_end)
gauge = SelfPrompt(ask_ids, yes=[...], no=[...])               # nothing is trained

Letters: n prefixes, L layers, H heads, E size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.hidden_states import evaluating, head_outputs
from tokenloom.decode.probe import Probe, load_tensors, save_tensors
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.context_cutoff import (
    chunk_ends,
    f1_score,
    outlier_bounds,
    soft_vote,
    sufficient,
    threshold_for,
)
from tokenloom.rollout.forward import base_model

MEMBERS: tuple[dict[str, Any], ...] = (
    {"hidden": (), "l2": 1.0},
    {"hidden": (), "l2": 0.01},
    {"hidden": (32,), "l2": 1.0},
    {"hidden": (128, 64, 32), "l2": 0.1},
)
"""Settings of `Probe.fit` for the ensemble. The release votes among boosted trees, machines and networks of several
libraries; linear and small networks serve here, so that a gauge is one safetensors file."""


@dataclass(frozen=True)
class Sample:
    """A question, a context (ids), and where the context's gold span ends (exclusive)."""

    question: Sequence[int]
    context: Sequence[int]
    gold_end: int


class Gauge:
    """P(sufficient) from heads' outputs [n, L, H, E] at the last token read."""

    def __init__(
        self,
        heads: Sequence[tuple[int, int]],
        bounds: tuple[Tensor, Tensor],
        members: Sequence[Probe],
        threshold: float,
    ) -> None:
        self.heads, self.bounds, self.members, self.threshold = list(heads), bounds, list(members), threshold

    def __call__(self, outputs: Tensor) -> Tensor:
        """[n]."""
        given = joined(outputs, self.heads).to(self.bounds[0]).clamp(*self.bounds)
        return soft_vote(torch.stack([member(given) for member in self.members]))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {"heads": torch.tensor(self.heads), "low": self.bounds[0], "high": self.bounds[1]}
        tensors["threshold"] = torch.tensor(self.threshold, dtype=torch.float64)
        for i, member in enumerate(self.members):
            tensors |= {f"{i}.{name}": value for name, value in member.tensors().items()}
        save_tensors(tensors, path)

    @classmethod
    def load(cls, path: str | Path) -> Gauge:
        """Read a file of `save`.

        Raises:
            ValueError: when it is none.
        """
        tensors = load_tensors(path)
        if not {"heads", "low", "high", "threshold", "0.shape"} <= set(tensors):
            raise ValueError(f"{str(path)!r} is not a gauge of context-cutoff")
        count = len({name.split(".")[0] for name in tensors if name[0].isdigit()})
        members = [
            Probe.from_tensors({n.split(".", 1)[1]: v for n, v in tensors.items() if n.startswith(f"{i}.")})
            for i in range(count)
        ]
        heads = [(int(layer), int(head)) for layer, head in tensors["heads"]]
        return cls(heads, (tensors["low"], tensors["high"]), members, float(tensors["threshold"]))


@dataclass(frozen=True)
class SelfPrompt:
    """Ask the model itself, for models large enough to tell: `ask` (ids) follows the context read so far.

    P(sufficient) is the share of the `yes` tokens' probability in that of `yes` and `no` tokens. What was asked is
    taken back from the cache.
    """

    ask: Sequence[int]
    yes: Sequence[int]
    no: Sequence[int]
    threshold: float = 0.5

    def confidence(self, scores: Tensor) -> float:
        """P(sufficient) from the scores [1, V] behind `ask`."""
        logprobs = wide(scores[0]).log_softmax(-1)
        yes, no = (logprobs[list(tokens)].logsumexp(0) for tokens in (self.yes, self.no))
        return float((yes - no).sigmoid())


def fit(
    model: Any,
    samples: Sequence[Sample],
    *,
    chunks: int = 10,
    heads: int = 5,
    validation: float = 0.3,
    precision: float = 0.9,
    seed: int = 0,
) -> Gauge:
    """A gauge from samples, a share `validation` of which chooses heads, orders members and tunes the threshold.

    Raises:
        ValueError: when training or validation lacks sufficient or insufficient prefixes.
    """
    outputs, labels, owners = prefixes(model, samples, chunks=chunks)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[: max(1, round(validation * len(samples)))])
    test = torch.tensor([o in held for o in owners])
    return fit_outputs(outputs, labels, test, heads=heads, precision=precision, seed=seed)


def fit_outputs(
    outputs: Tensor, labels: Tensor, test: Tensor, *, heads: int = 5, precision: float = 0.9, seed: int = 0
) -> Gauge:
    """The same from heads' outputs [n, L, H, E], labels [n] and which are for validation [n].

    Raises:
        ValueError: as `fit`.
    """
    for part in (labels[~test], labels[test]):
        if not bool(part.any()) or bool(part.all()):
            raise ValueError("context-cutoff needs sufficient and insufficient prefixes to train on and to validate on")
    scores = {}
    for layer in range(outputs.shape[1]):
        for head in range(outputs.shape[2]):
            features = outputs[:, layer, head].float()
            features = features.clamp(*outlier_bounds(features[~test]))
            probe = Probe.fit(features[~test], labels[~test], balanced=True, seed=seed)
            scores[layer, head] = f1_score(probe(features[test]) >= 0.5, labels[test])
    best = sorted(scores, key=lambda place: -scores[place])[:heads]
    features = joined(outputs, best)
    bounds = outlier_bounds(features[~test])
    features = features.clamp(*bounds)
    members = [Probe.fit(features[~test], labels[~test], balanced=True, seed=seed, **m) for m in MEMBERS]
    right = [float(((m(features[test]) >= 0.5) == labels[test]).double().mean()) for m in members]
    members = [members[i] for i in sorted(range(len(members)), key=lambda i: -right[i])]
    gauge = Gauge(best, bounds, members, 0.5)
    with torch.no_grad():
        gauge.threshold = threshold_for(gauge(outputs[test]), labels[test], precision=precision)
    return gauge


def prefixes(model: Any, samples: Sequence[Sample], *, chunks: int = 10) -> tuple[Tensor, Tensor, list[int]]:
    """Heads' outputs [n, L, H, E] (float32) at the ends of all chunks, whether each suffices [n], and whose it is."""
    outputs, labels, owners = [], [], []
    causal = base_model(model)
    device = next(causal.parameters()).device
    with evaluating(causal), torch.no_grad(), head_outputs(model) as last:
        for number, sample in enumerate(samples):
            ends = torch.tensor(chunk_ends(len(sample.context), chunks=chunks))
            # One pass: a causal model's state at a token does not know what follows.
            causal(input_ids=torch.tensor([[*sample.question, *sample.context]], device=device))
            outputs.append(last()[0, len(sample.question) + ends.to(device) - 1].float().cpu())
            labels.append(sufficient(ends, sample.gold_end))
            owners += [number] * len(ends)
    return torch.cat(outputs), torch.cat(labels), owners


def joined(outputs: Tensor, heads: Sequence[tuple[int, int]]) -> Tensor:
    """The outputs of some heads side by side, [n, heads * E], float32."""
    return torch.cat([outputs[:, layer, head].float() for layer, head in heads], -1)
