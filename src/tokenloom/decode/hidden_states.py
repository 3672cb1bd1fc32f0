"""Hidden states and heads' outputs of a causal LM at chosen tokens, collected in batches.

Letters: N texts, D hidden size, L layers, B rows, n tokens, H heads, E size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.decode.layers import decoder_layers
from tokenloom.policy.own_logits import trunk_of
from tokenloom.rollout.forward import base_model

_OUTPUT_NAMES = ("o_proj", "c_proj", "out_proj", "dense", "wo")


def states(
    model: Any, texts: Sequence[Sequence[int]], *, layer: int = -1, pool: str = "last", batch: int = 16
) -> Tensor:
    """Hidden states [N, D], float32, of texts (ids): at the last token, or with `pool` "mean" over all.

    `layer` counts as `output_hidden_states` does: 0 the embeddings, -1 the last, behind the final norm.

    Raises:
        ValueError: for an empty text or an unknown `pool`.
    """
    if pool not in ("last", "mean"):
        raise ValueError(f"states are pooled as 'last' or 'mean', not {pool!r}")
    places = [[len(t) - 1] if pool == "last" else list(range(len(t))) for t in texts]
    found = states_at(model, texts, places, layers=[layer], batch=batch)
    return torch.stack([f[:, 0].mean(0) for f in found])


def states_at(
    model: Any,
    texts: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    *,
    layers: Sequence[int] | None = None,
    batch: int = 16,
) -> list[Tensor]:
    """For each text, the states [places, L, D], float32 on the CPU, at its `places` after `layers`.

    `layers` None is all of them without the embeddings.

    Raises:
        ValueError: for an empty text.
    """
    if any(len(t) == 0 for t in texts):
        raise ValueError("hidden states need texts of at least one token")
    causal = base_model(model)
    trunk, device = trunk_of(causal), next(causal.parameters()).device
    found: dict[int, Tensor] = {}
    # Texts of like length together, so that little is computed on filling.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    with evaluating(causal), torch.no_grad():
        for begin in range(0, len(order), batch):
            some = order[begin : begin + batch]
            ids, mask = padded([texts[i] for i in some], device)
            output = trunk(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False)
            chosen = output.hidden_states[1:] if layers is None else [output.hidden_states[n] for n in layers]
            for row, i in enumerate(some):
                at = torch.tensor(list(places[i]), dtype=torch.int64, device=device)
                found[i] = torch.stack([h[row, at] for h in chosen], 1).float().cpu()
    return [found[i] for i in range(len(texts))]


@contextmanager
def head_outputs(model: Any) -> Iterator[Callable[[], Tensor]]:
    """While it lasts, the function yielded gives the heads' outputs of the model's last forward: [B, n, L, H, E].

    They are what each layer's output projection reads, on the model's device and in its format.

    Raises:
        ValueError: for attention whose output projection has no known name.
    """
    causal = base_model(model)
    heads = int(causal.config.get_text_config(decoder=True).num_attention_heads)
    seen: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            seen[number] = given[0]

        return hook

    layers = list(decoder_layers(causal))
    handles = [_output_projection(layer).register_forward_pre_hook(keep(i)) for i, layer in enumerate(layers)]

    def last() -> Tensor:
        joined = torch.stack([seen[i] for i in range(len(layers))], 2)
        return joined.view(*joined.shape[:-1], heads, -1)

    try:
        yield last
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's flag is put back."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def padded(texts: Sequence[Sequence[int]], device: Any = None) -> tuple[Tensor, Tensor]:
    """Ids [N, S] filled up on the right, and which are real [N, S]: causal models need no more than that."""
    width = max(len(t) for t in texts)
    ids = torch.tensor([[*t, *([0] * (width - len(t)))] for t in texts], device=device)
    lengths = torch.tensor([len(t) for t in texts], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def _output_projection(layer: nn.Module) -> nn.Module:
    for name, module in layer.named_children():
        if ("attn" in name or "attention" in name) and "cross" not in name and "norm" not in name:
            for child in _OUTPUT_NAMES:
                found = getattr(module, child, None)
                if isinstance(found, nn.Module):
                    return found
    raise ValueError(
        f"{type(layer).__name__} has no attention whose output projection is named {', '.join(_OUTPUT_NAMES)}; heads "
        "of this architecture cannot be read"
    )
