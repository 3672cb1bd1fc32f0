"""The output head of a causal LM as a module whose forward is the fused log-prob."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenloom.kernels import LinearLogprobs, TopTokens, linear_logprobs
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
    """Log-probs, entropies and top tokens of response tokens from hidden states.

    `fused` computes them inside of the call of the model's own head, whose forward is `linear_logprobs` for that
    moment: what is hooked to the head (FSDP's gathering of a sharded weight, a user's hooks) runs as ever, and
    hooks that look at its output see the log-probs. It needs a head that is an `nn.Linear` with the forward of
    one. Otherwise every chunk of rows goes through the model's own code (`own_logits`). Neither holds [M, V].
    Exchanging the forward changes the model, so one model must not be used from several threads at once.
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
        # The fused form works in tiles of its own size unless told how many rows to take.
        self.tile_rows = chunk_rows
        self.fused = fused and _is_plain_linear(self.linear)

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        rows: Tensor | None = None,
        temperature: float = 1.0,
        need_entropy: bool = False,
        top_k: int = 0,
    ) -> LinearLogprobs:
        """Log-probs of `targets` [N] under the rows `rows` [N] of `hidden` [M, D]; see `linear_logprobs`.

        Without `rows`, M = N and target n is that of row n.

        Raises:
            ValueError: as `linear_logprobs` does.
        """
        if not self.fused:
            return self._from_own_logits(hidden, targets, rows, temperature, need_entropy, top_k)
        linear = cast(nn.Linear, self.linear)

        def scored(hidden: Tensor) -> LinearLogprobs:
            return linear_logprobs(
                hidden,
                rows,
                targets,
                linear.weight,
                linear.bias,
                scale=self.shape.scale,
                softcap=self.shape.softcap,
                temperature=temperature,
                need_entropy=need_entropy,
                top_k=top_k,
                chunk=self.tile_rows,
            )

        with _forward_is(linear, scored):
            return cast(LinearLogprobs, linear(hidden))

    def _from_own_logits(
        self,
        hidden: Tensor,
        targets: Tensor,
        rows: Tensor | None,
        temperature: float,
        need_entropy: bool,
        top_k: int,
    ) -> LinearLogprobs:
        """The same from whole logits, chunk by chunk of the hidden rows that have a target."""
        if rows is None:
            used, place, slot = None, torch.arange(len(hidden), device=hidden.device), torch.zeros_like(targets)
        else:
            used, place = torch.unique(rows, return_inverse=True)
            slot = _occurrence(place)
        # One log-softmax for all targets of a row: they lie side by side, [M, most targets of a row].
        width = int(slot.max()) + 1 if len(slot) else 1
        beside = targets.new_zeros(len(hidden) if used is None else len(used), width)
        beside[place, slot] = targets

        def of_rows(hidden: Tensor, beside: Tensor) -> list[Tensor]:
            law = torch.log_softmax(self.logits(hidden, temperature), -1)
            results = [law.gather(-1, beside)]
            if need_entropy:
                # A token that the model rules out has p log p = 0, not the product of 0 and -inf.
                results.append(-(law.exp() * law.clamp(min=torch.finfo(law.dtype).min)).sum(-1))
            return [*results, *law.topk(top_k, -1)] if top_k else results

        results = map_chunks(of_rows, (hidden if used is None else hidden[used], beside), self.chunk_rows)
        entropies = results[1][place] if need_entropy else None
        top = TopTokens(results[-2][place], results[-1][place]) if top_k else None
        return LinearLogprobs(results[0][place, slot], entropies, top)

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """[N, V] logits at `temperature`, float32 (float64 for a float64 model). For chunks only."""
        if self.fused:
            raw = _widen(cast(nn.Linear, self.linear)(hidden)) * self.shape.scale
            if self.shape.softcap is not None:
                raw = self.shape.softcap * torch.tanh(raw / self.shape.softcap)
        else:
            raw = _widen(own_logits(cast(nn.Module, self.causal), hidden))
        return raw if temperature == 1.0 else raw / temperature


def _is_plain_linear(module: nn.Module | None) -> bool:
    """Whether the module computes hidden @ weight.T + bias and nothing else.

    FSDP exchanges the class but not the forward; adapters, quantized layers and offloading bring one of their own.
    """
    return isinstance(module, nn.Linear) and getattr(module.forward, "__func__", None) is nn.Linear.forward


@contextmanager
def _forward_is(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    module.__dict__["forward"] = function
    try:
        yield
    finally:
        del module.__dict__["forward"]


def _occurrence(ids: Tensor) -> Tensor:
    """How often each entry [N] has occurred before: 0 for the first of its kind."""
    order = ids.argsort(stable=True)
    ordered = ids[order]
    start = torch.searchsorted(ordered, ordered)
    return torch.empty_like(ids).index_copy_(0, order, torch.arange(len(ids), device=ids.device) - start)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
