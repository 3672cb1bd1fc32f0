"""Plugin as a logits processor, and the training of its small model under a frozen base.

The formula and the loss are in `methods.decoding.plugin_reweighting`. A trained plugin is a causal LM like any other:
`plugin.save_pretrained(folder)` keeps it as safetensors.

Letters: B examples, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokenloom.decode.auxiliary import Aux, aligned, evaluating
from tokenloom.decode.registry import decoder
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.plugin_reweighting import plugin_loss, plugin_reweighting

Example = tuple[Sequence[int], Sequence[int]]
"""The ids of a prompt and of the answer that is to be learned."""


@decoder("plugin-reweighting", kind="shaper")
class PluginReweighting(LogitsProcessor):
    """The decoded model's law times that of `plugin`, a small model with the same tokenizer; see `fit`."""

    def __init__(self, plugin: Any) -> None:
        self.aux = Aux(plugin)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after ids [B, T]."""
        plugin = aligned(self.aux.next(input_ids), scores.shape[-1])
        return plugin_reweighting(wide(scores), plugin).to(scores.dtype)


def fit(
    plugin: Any,
    base: Any,
    examples: Sequence[Example],
    *,
    epochs: int = 3,
    batch_size: int = 8,
    learning_rate: float = 1e-4,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `plugin` so that its product with the frozen `base` predicts the answers; the mean loss of each epoch.

    Nats per token. `progress(step, loss)` is called after each step. `evaluate` measures on examples held out.

    Raises:
        ValueError: for no examples, an empty prompt or answer, one model for both, or different vocabularies.
    """
    if plugin is base:
        raise ValueError("plugin-reweighting: plugin and base are one model; the base stays frozen, load a second one")
    _check(examples)
    trained = [p for p in plugin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    was_training = plugin.training
    plugin.train()
    history, step = [], 0
    # Dropout draws from the global state, which the caller gets back as it was.
    with torch.random.fork_rng(devices=[d for d in {p.device for p in trained} if d.type == "cuda"]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            total = tokens = 0.0
            shuffled = [examples[i] for i in torch.randperm(len(examples)).tolist()]
            for batch in _batches(shuffled, batch_size):
                losses = _losses(plugin, base, batch)
                optimizer.zero_grad()
                torch.autograd.backward(losses.mean())
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                loss = float(losses.detach().sum())
                total, tokens, step = total + loss, tokens + len(losses), step + 1
                if progress is not None:
                    progress(step, loss / len(losses))
            history.append(total / tokens)
    optimizer.zero_grad()
    plugin.train(was_training)
    return history


def evaluate(plugin: Any | None, base: Any, examples: Sequence[Example], *, batch_size: int = 8) -> float:
    """Mean cross-entropy of the answers under the product, in nats per token; under the base alone without a plugin.

    Raises:
        ValueError: as `fit`.
    """
    _check(examples)
    with evaluating(plugin):
        losses = torch.cat([_losses(plugin, base, batch) for batch in _batches(examples, batch_size)])
    return float(losses.mean())


def _losses(plugin: Any | None, base: Any, batch: Sequence[Example]) -> Tensor:
    """Cross-entropy of every answer token of the batch, one after the other."""
    texts = [[*prompt, *answer] for prompt, answer in batch]
    width = max(len(t) for t in texts)
    device = next(base.parameters()).device
    # Right padding: causal attention never looks at it, so no position needs to be told.
    ids = torch.tensor([[*t, *([0] * (width - len(t)))] for t in texts], device=device)
    real = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts], device=device)
    asked = real.bool().clone()
    for row, (prompt, _) in enumerate(batch):
        asked[row, : len(prompt)] = False
    labels, asked = ids[:, 1:][asked[:, 1:]], asked[:, 1:]
    with evaluating(base):
        scores = base(input_ids=ids, attention_mask=real).logits[:, :-1][asked]
    if plugin is None:
        return plugin_loss(scores, torch.zeros_like(scores), labels)
    own = next(plugin.parameters()).device
    found = plugin(input_ids=ids.to(own), attention_mask=real.to(own)).logits[:, :-1][asked.to(own)].to(device)
    return plugin_loss(scores, aligned(found, scores.shape[-1]), labels)


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    return (examples[i : i + size] for i in range(0, len(examples), size))


def _check(examples: Sequence[Example]) -> None:
    if not examples:
        raise ValueError("plugin-reweighting: there are no examples to learn from")
    empty = [i for i, (prompt, answer) in enumerate(examples) if not len(prompt) or not len(answer)]
    if empty:
        raise ValueError(
            f"plugin-reweighting: example {empty[0]} has an empty prompt or answer; a prompt needs one token at least, "
            "such as the model's start token"
        )
