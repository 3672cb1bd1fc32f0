"""`Signals`: what a model says about rollouts, and the registries of signals that parts declare.

Entry t of every [B, T] tensor speaks of token t of the response; log-probs are natural logs
at the sampling temperature, entropies and KL are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Self, TypeVar, get_args

import torch
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
        """A copy with some signals changed (None removes); names that are not fields go to `extras`."""
        known = {n: v for n, v in changes.items() if n in SIGNAL_NAMES}
        extra = {n: v for n, v in changes.items() if n not in SIGNAL_NAMES and v is not None}
        kept = {n: v for n, v in self.extras.items() if n not in changes}
        return replace(self, **known, extras=kept | extra)


SIGNAL_NAMES = tuple(f.name for f in fields(Signals) if f.name != "extras")

ChunkInput = Literal["logits", "ref_logits", "hidden", "targets"]
GroupInput = Literal["hidden", "logits", "tokens", "mask", "outcomes"]
AttentionInput = Literal["attention", "attention_entropies", "mask", "answer_mask", "prompt_length"]
Example = Callable[[int, int, torch.Generator], Tensor]
"""Values for B rows of T tokens, [B, T] or [B, T, K], float64, that the laws can try a part on."""


@dataclass(frozen=True)
class ChunkSignal:
    """A function of what the model computes on a chunk of N response tokens, reduced inside the chunk.

    `inputs` names its positional arguments: "logits" and "ref_logits" [N, V] (scaled by the temperature,
    float32), "hidden" [N, D], "targets" [N] int64, or the name of another chunk signal: its values at these
    tokens [N] or [N, K], taken at the start of the update and without gradient. It returns [N] or [N, K].
    The policy maps it over chunks under recomputation, so [B, T, V] never exists at once.
    """

    name: str
    inputs: tuple[str, ...]
    function: Callable[..., Tensor]
    example: Example | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """The inputs that are other signals."""
        return tuple(n for n in self.inputs if n not in get_args(ChunkInput))


@dataclass(frozen=True)
class GroupSignal:
    """A function of all R responses to one prompt together, without gradient; it returns [R, T] or [R, T, K].

    `inputs` names its positional arguments: "hidden" [R, T, D], "logits" (a function from hidden states [n, D] to
    logits [n, V], so that no more than a chunk of them exists at once), "tokens", "mask" [R, T], "outcomes" [R].
    """

    name: str
    inputs: tuple[GroupInput, ...]
    function: Callable[..., Tensor]
    example: Example | None = None


@dataclass(frozen=True)
class AttentionSignal:
    """A function of where one row's tokens look, without gradient; it returns [T] or [T, K].

    `inputs` names its positional arguments, for a row of S tokens, prompt and response together: "attention"
    [S, S], the mean map over heads and the layers of `band` (fractions of the depth), query by key;
    "attention_entropies" [S], the mean over the same heads and layers of each query's entropy in nats;
    "prompt_length", an int; "mask" and "answer_mask" [T]. Entry t of the result speaks of token t of the response.
    """

    name: str
    inputs: tuple[AttentionInput, ...]
    function: Callable[..., Tensor]
    band: tuple[float, float] = (0.0, 1.0)
    example: Example | None = None


CHUNK_SIGNALS: dict[str, ChunkSignal] = {}
GROUP_SIGNALS: dict[str, GroupSignal] = {}
ATTENTION_SIGNALS: dict[str, AttentionSignal] = {}

S = TypeVar("S", bound=ChunkSignal | GroupSignal | AttentionSignal)
Register = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


def signal_example(name: str, rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Values of a registered signal for the laws, float64."""
    signal = (CHUNK_SIGNALS | GROUP_SIGNALS | ATTENTION_SIGNALS)[name]
    if signal.example is not None:
        return signal.example(rows, width, generator)
    return torch.rand(rows, width, generator=generator, dtype=torch.float64)


def signal_names() -> list[str]:
    """Every registered signal, of whatever kind."""
    return [*CHUNK_SIGNALS, *GROUP_SIGNALS, *ATTENTION_SIGNALS]


def same_definition(a: Callable[..., object], b: Callable[..., object]) -> bool:
    """Whether two functions are one definition, executed again by a reload, an edit or a notebook cell."""

    def places(f: Callable[..., object]) -> set[tuple[str, str]]:
        code = getattr(f, "__code__", None)
        return {("module", f.__module__), ("file", code.co_filename if code else f.__module__)}

    return a.__qualname__ == b.__qualname__ and bool(places(a) & places(b))


def chunk_signal(name: str, *inputs: str, example: Example | None = None) -> Register:
    """Register a chunk function under a vocabulary name; parts then take `name` as a positional parameter.

    `example` draws values for the laws; without it they try uniform numbers [B, T].

    Raises:
        ValueError: when the name is in the vocabulary or taken by another function, or an input is unknown.
    """
    for given in inputs:
        if given not in get_args(ChunkInput) and given not in CHUNK_SIGNALS:
            known = ", ".join([*get_args(ChunkInput), *CHUNK_SIGNALS])
            raise ValueError(f"chunk signal {name!r} takes {given!r}, which is no input; known: {known}")
    return _register(CHUNK_SIGNALS, name, lambda function: ChunkSignal(name, inputs, function, example))


def group_signal(name: str, *inputs: GroupInput, example: Example | None = None) -> Register:
    """Register a function of a whole group, for parts of the plan; as `chunk_signal`."""
    return _register(GROUP_SIGNALS, name, lambda function: GroupSignal(name, inputs, function, example))


def attention_signal(
    name: str, *inputs: AttentionInput, band: tuple[float, float] = (0.0, 1.0), example: Example | None = None
) -> Register:
    """Register a function of attention maps, for parts of the plan; as `chunk_signal`."""
    return _register(ATTENTION_SIGNALS, name, lambda function: AttentionSignal(name, inputs, function, band, example))


def _register(table: dict[str, S], name: str, make: Callable[[Callable[..., Tensor]], S]) -> Register:
    from tokenloom.vocabulary import VOCABULARY  # it lists the registered signals, so it imports this module

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        known = table.get(name)
        elsewhere = name in signal_names() and name not in table
        if name in VOCABULARY or elsewhere or (known is not None and not same_definition(known.function, function)):
            raise ValueError(f"the signal name {name!r} is taken; choose another")
        table[name] = make(function)
        return function

    return register
