"""The output head of a causal LM as a module whose forward is the fused log-prob."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenloom.kernels import linear_logprobs
from tokenloom.policy.chunks import map_chunks
from tokenloom.policy.own_logits import own_logits


@dataclass(frozen=True)
class HeadShape:
    """What follows the linear map of a head: logits = cap(scale * linear(hidden)), cap(x) = c tanh(x / c)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config: Any) -> HeadShape:
        """Read the names under which Hugging Face configs state a head's scale and final soft-cap.

        A name read wrongly is caught by the self-test at load.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale = 1.0
        for name in ("logit_scale", "lm_head_multiplier"):
            scale *= _number(text, name) or 1.0
        scale /= _number(text, "logits_scaling") or 1.0
        return cls(scale, _number(text, "final_logit_softcapping"))


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


class LogprobHead(nn.Module):
    """Log-probs and entropies of response tokens from hidden states.

    `fused` runs `linear_logprobs` on the head's weight; it needs a plain `nn.Linear` head. Otherwise
    every chunk of rows goes through the model's own code (`own_logits`). Neither holds [N, V].
    """

    def __init__(self, causal: nn.Module, *, chunk_rows: int = 0, fused: bool = True) -> None:
        super().__init__()
        model = cast(Any, causal)
        self.linear: nn.Module | None = model.get_output_embeddings()
        # Kept out of the module tree: the head is part of the model, not the other way round.
        object.__setattr__(self, "causal", causal)
        self.shape = HeadShape.from_config(model.config)
        vocabulary = int(model.config.get_text_config().vocab_size)
        self.chunk_rows = chunk_rows or max(16, 2**24 // vocabulary)
        self.fused = fused and type(self.linear) is nn.Linear

    def forward(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, need_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of `targets` [N] and entropies (or None), both [N], from `hidden` [N, D]."""
        if self.fused:
            linear = cast(nn.Linear, self.linear)
            return linear_logprobs(
                hidden,
                linear.weight,
                targets,
                bias=linear.bias,
                scale=self.shape.scale,
                softcap=self.shape.softcap,
                temperature=temperature,
                need_entropy=need_entropy,
                chunk=self.chunk_rows,
            )

        def rows(hidden: Tensor, targets: Tensor) -> list[Tensor]:
            law = torch.log_softmax(self.logits(hidden, temperature), -1)
            chosen = [law.gather(-1, targets[:, None])[:, 0]]
            return [*chosen, -(law.exp() * law).sum(-1)] if need_entropy else chosen

        results = map_chunks(rows, (hidden, targets), self.chunk_rows)
        return results[0], results[1] if need_entropy else None

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """[N, V] logits at `temperature`, float32 (float64 for a float64 model). For chunks only."""
        if self.fused:
            raw = _widen(cast(nn.Linear, self.linear)(hidden)) * self.shape.scale
            if self.shape.softcap is not None:
                raw = self.shape.softcap * torch.tanh(raw / self.shape.softcap)
        else:
            raw = _widen(own_logits(cast(nn.Module, self.causal), hidden))
        return raw if temperature == 1.0 else raw / temperature


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
