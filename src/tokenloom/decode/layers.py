"""A causal LM's decoder layers and the modules in them, for methods that hook or skip them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from tokenloom.policy.own_logits import trunk_of
from tokenloom.rollout.forward import base_model
from tokenloom.rollout.lean import lean_modules

_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_found: WeakSet[nn.Module] = WeakSet()


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of a model's layers.

    Raises:
        ValueError: when the model has no list of as many modules as its configuration has layers.
    """
    causal = base_model(model)
    count = causal.config.get_text_config(decoder=True).num_hidden_layers
    for module in trunk_of(causal).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(causal).__name__} has no list of its {count} layers that could be hooked")


def mlp_of(layer: nn.Module) -> nn.Module:
    """The MLP inside a layer, a submodule of its own.

    Raises:
        ValueError: when it has none under a known name.
    """
    for name in _MLP_NAMES:
        found = getattr(layer, name, None)
        if isinstance(found, nn.Module):
            return found
    raise ValueError(f"{type(layer).__name__} has no MLP module under the names {', '.join(_MLP_NAMES)}")


@contextmanager
def hooked(model: Any, hooks: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks on modules of `model` while the block lasts."""
    _find_lean_forms(base_model(model))
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden states that a module gave, alone or first of several."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def with_first(output: Any, hidden: torch.Tensor) -> Any:
    """What a module gave, with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _find_lean_forms(causal: nn.Module) -> None:
    """Sessions run on lean forms of modules, found once a model by comparing with what its modules give.

    That must not happen while hooks change what they give.
    """
    if causal in _found:
        return
    training = [m for m in causal.modules() if m.training]
    causal.eval()
    try:
        with torch.no_grad(), lean_modules(causal, in_chunks=True):
            _found.add(causal)
    finally:
        for module in training:
            module.training = True
