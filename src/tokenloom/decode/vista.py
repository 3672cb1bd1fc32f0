"""VISTA on a Hugging Face model: directions from prompts with and without a context, steering while it generates.

    directions = context_directions(model, [with_context], [without_context])
    with vista(model, directions):
        model.generate(...)

or `decode.loop("vista", directions=directions)`. The rules are in `methods.decoding.vista`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.decode.hidden_states import evaluating
from tokenloom.decode.layers import decoder_layers, first_tensor, hooked, mlp_of, with_first
from tokenloom.decode.plain import Plain
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.methods.decoding.vista import self_logits_augmentation, steer, steering_directions
from tokenloom.policy.own_logits import own_logits
from tokenloom.rollout.forward import base_model

# Layers 25 to 30 of the paper's 32.
_FIRST, _LAST = 25 / 32, 30 / 32


def context_directions(
    model: Any, with_context: Sequence[Sequence[int]], without_context: Sequence[Sequence[int]]
) -> Tensor:
    """Directions [Lyr, D] from prompts (ids), the i-th of one list being the i-th of the other without its context.

    Raises:
        ValueError: for lists of different lengths, or without prompts.
    """
    if len(with_context) != len(without_context) or not with_context:
        raise ValueError(
            f"vista: each prompt needs its counterpart without the context; got {len(with_context)} and "
            f"{len(without_context)} prompts"
        )
    states = [torch.stack([_last_states(model, p) for p in prompts]) for prompts in (with_context, without_context)]
    return steering_directions(*states)


@contextmanager
def vista(
    model: Any, directions: Tensor, *, strength: float = 0.1, gamma: float = 0.3, first: int = -1, last: int = -1
) -> Iterator[None]:
    """While it lasts, MLP outputs of `model` are steered along `directions` [Lyr, D] and its logits augmented.

    The scores of layers `first` to `last` (from 0, both included; -1: the paper's share of the depth) are mixed in.
    Prompts are steered as well as what follows, as in the release.

    Raises:
        ValueError: for directions of another model or layers that it does not have.
    """
    layers = decoder_layers(model)
    total = len(layers)
    width = model.get_input_embeddings().embedding_dim
    if directions.shape != (total, width):
        raise ValueError(f"vista: directions must be [{total}, {width}] for this model, got {tuple(directions.shape)}")
    first = int(_FIRST * total) if first < 0 else first
    last = max(int(_LAST * total), first) if last < 0 else last
    if not 0 <= first <= last < total:
        raise ValueError(f"vista: layers {first} to {last} are not among the {total} of the model (from 0)")
    hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
    if strength:
        hooks += [(mlp_of(layer), _steering(directions[i], strength)) for i, layer in enumerate(layers)]
    if gamma:
        augmentation = _Augmentation(base_model(model), total, gamma)
        hooks += [(layers[i], augmentation.keep(i)) for i in range(first, last + 1)]
        hooks.append((base_model(model), augmentation.mix))
    with hooked(model, hooks):
        yield


@decoder("vista", kind="loop")
class Vista(Loop):
    """Plain decoding with steered hidden states and augmented logits; `directions` is from `context_directions`."""

    def __init__(
        self, directions: Tensor, *, strength: float = 0.1, gamma: float = 0.3, first: int = -1, last: int = -1
    ) -> None:
        """Raises ValueError for directions that are no tensor."""
        if not isinstance(directions, Tensor):
            raise ValueError(
                f"vista: directions are a tensor, of context_directions or of a .safetensors file under the name "
                f"'directions'; got {directions!r}"
            )
        self.directions = directions
        self.settings: dict[str, Any] = {"strength": strength, "gamma": gamma, "first": first, "last": last}

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        with vista(run.model, self.directions, **self.settings):
            return Plain().rows(run)


def _last_states(model: Any, prompt: Sequence[int]) -> Tensor:
    """The residual stream [Lyr, D] after each layer at the last token of a prompt, float32."""
    states: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        states.append(first_tensor(output)[0, -1].float())

    device = next(base_model(model).parameters()).device
    hooks = [(layer, keep) for layer in decoder_layers(model)]
    with torch.no_grad(), evaluating(base_model(model)), hooked(model, hooks):
        model(input_ids=torch.tensor([list(prompt)], device=device), use_cache=False)
    return torch.stack(states)


def _steering(direction: Tensor, strength: float) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return with_first(output, steer(first_tensor(output), direction, strength=strength))

    return hook


class _Augmentation:
    """Keeps the hidden states of layers and mixes what the head makes of them into the logits."""

    def __init__(self, causal: Any, total: int, gamma: float) -> None:
        self._causal, self._total, self._gamma = causal, total, gamma
        self._states: dict[int, Tensor] = {}
        self._inside = False

    def keep(self, number: int) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._states[number] = first_tensor(output)

        return hook

    def mix(self, _: nn.Module, __: Any, output: Any) -> Any:
        if self._inside:  # the head at work on an earlier layer's states
            return output
        scores: Tensor = output.logits
        self._inside = True
        try:
            # Behind the last layer stands the final norm, so that its scores are the model's own.
            late = [
                scores if number == self._total - 1 else self._head(states[:, -scores.shape[1] :])
                for number, states in sorted(self._states.items())
            ]
        finally:
            self._inside = False
        output.logits = self_logits_augmentation(scores, torch.stack(late), gamma=self._gamma)
        return output

    def _head(self, states: Tensor) -> Tensor:
        return own_logits(self._causal, states.flatten(0, 1)).view(*states.shape[:2], -1)
