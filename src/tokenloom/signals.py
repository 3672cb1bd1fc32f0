"""`Signals`: what a model says about rollouts, and the registry of chunk signals.

Entry t of every [B, T] tensor speaks of token t of the response; log-probs are natural logs
at the sampling temperature, entropies and KL are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Self

from torch import Tensor

from tokenloom.masked import row_index


@dataclass(frozen=True, eq=False)
class Signals:
    """Model outputs over response tokens, all [B, T] float unless said otherwise.

    `logprobs`, `entropies` and `values` carry gradients when the policy was asked for them with
    `grad=True`; `old_*` and `ref_logprobs` never do. `extras` holds the results of registered
    chunk signals by name, [B, T] or [B, T, K].
    """

    logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    entropies: Tensor | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """Every signal that is present, by vocabulary name."""
        present = {n: getattr(self, n) for n in SIGNAL_NAMES if getattr(self, n) is not None}
        return present | self.extras

    def rows(self, index: Tensor | Sequence[int]) -> Self:
        """The rows at `index` [n] int64, in that order."""
        at = row_index(index)
        cut = {n: v[at] for n, v in self.named().items()}
        return replace(self, **{n: cut.pop(n, None) for n in SIGNAL_NAMES}, extras=cut)

    def detach(self) -> Self:
        """The same values without gradient."""
        cut = {n: v.detach() for n, v in self.named().items()}
        return replace(self, **{n: cut.pop(n, None) for n in SIGNAL_NAMES}, extras=cut)

    def replace(self, **changes: Tensor | None) -> Self:
        """A copy with some signals changed; names that are not fields go to `extras`."""
        known = {n: v for n, v in changes.items() if n in SIGNAL_NAMES}
        extra = {n: v for n, v in changes.items() if n not in SIGNAL_NAMES and v is not None}
        return replace(self, **known, extras=self.extras | extra)


SIGNAL_NAMES = tuple(f.name for f in fields(Signals) if f.name != "extras")

ChunkInput = Literal["logits", "ref_logits", "hidden", "targets"]


@dataclass(frozen=True)
class ChunkSignal:
    """A function of what the model computes on a chunk of N response tokens, reduced inside the chunk.

    `inputs` names its positional arguments: "logits" and "ref_logits" [N, V] (scaled by the
    temperature, float32), "hidden" [N, D], "targets" [N] int64. It returns [N] or [N, K]. The policy
    maps it over chunks under recomputation, so [B, T, V] never exists at once.
    """

    name: str
    inputs: tuple[ChunkInput, ...]
    function: Callable[..., Tensor]


CHUNK_SIGNALS: dict[str, ChunkSignal] = {}


def same_definition(a: Callable[..., object], b: Callable[..., object]) -> bool:
    """Whether two functions are one definition, executed again by a reload, an edit or a notebook cell."""

    def places(f: Callable[..., object]) -> set[tuple[str, str]]:
        code = getattr(f, "__code__", None)
        return {("module", f.__module__), ("file", code.co_filename if code else f.__module__)}

    return a.__qualname__ == b.__qualname__ and bool(places(a) & places(b))


def chunk_signal(name: str, *inputs: ChunkInput) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a chunk function under a vocabulary name; parts then take `name` as a positional parameter.

    Raises:
        ValueError: when the name is in the vocabulary or taken by another function.
    """

    from tokenloom.vocabulary import VOCABULARY  # it lists the registered signals, so it imports this module

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        known = CHUNK_SIGNALS.get(name)
        if name in VOCABULARY or (known is not None and not same_definition(known.function, function)):
            raise ValueError(f"the signal name {name!r} is taken; choose another")
        CHUNK_SIGNALS[name] = ChunkSignal(name, inputs, function)
        return function

    return register
