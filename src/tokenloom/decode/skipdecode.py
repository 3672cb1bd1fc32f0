"""SkipDecode as a loop: later tokens are read by fewer layers, the same for every row of the batch.

The rule is `methods.decoding.skipdecode`; layers left out are replaced, in the model's list of layers and for one
forward, by modules that pass the hidden state on. Left padding does not matter: a position is a token's number in its
response.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tokenloom.decode.layers import decoder_layers
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.methods.decoding.skipdecode import active_layers


@contextmanager
def only_layers(model: Any, active: Sequence[int]) -> Iterator[None]:
    """Forwards of `model` run the layers at these indices alone, the first among them, while the block lasts."""
    layers = decoder_layers(model)
    kept, before = set(active), list(layers)
    bypasses = [_Bypass(layer) if i not in kept else None for i, layer in enumerate(before)]
    for i, bypass in enumerate(bypasses):
        if bypass is not None:
            layers[i] = bypass

    def learn(_: nn.Module, __: Any, output: Any) -> None:
        for bypass in bypasses:
            if bypass is not None:
                bypass.in_tuple = isinstance(output, tuple)

    # Some architectures' layers give hidden states alone, others a tuple; the first layer tells which.
    hook = before[0].register_forward_hook(learn)
    try:
        yield
    finally:
        hook.remove()
        for i, layer in enumerate(before):
            layers[i] = layer


class _Bypass(nn.Module):
    """Stands for a layer, its attributes included, and hands on the hidden state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_stands_for"] = layer  # not registered: it keeps its own place in the model
        self.in_tuple = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stands_for"], name)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """The hidden state unchanged, as the other layers give it."""
        return (hidden_states,) if self.in_tuple else hidden_states


@decoder("skipdecode", kind="loop")
class SkipDecode(Loop):
    """Fewer and fewer layers as the response grows; for models tuned to it. `over` = 0: until the longest response."""

    def __init__(self, *, warmup: int = 1, least: int = 0, most: int = 0, over: int = 0) -> None:
        self.settings = {"warmup": warmup, "least": least, "most": most}
        self.over = over

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        total = len(decoder_layers(run.model))
        over = self.over or run.limit
        schedule = [active_layers(t, total, **self.settings, over=over) for t in range(-1, run.limit)]
        generated: list[list[int]] = [[] for _ in range(len(run))]
        live = list(range(len(run)))
        executed = 0
        with run.session() as session:
            with only_layers(run.model, schedule[0]):
                scores = session.start()
            for at in range(run.limit):
                chosen = run.choose(live, [generated[r] for r in live], scores)
                running = run.append(live, generated, chosen)
                if not running:
                    break
                if len(running) < len(live):
                    session.branch(running)
                live = [live[i] for i in running]
                with only_layers(run.model, schedule[at + 1]):
                    scores = session.step(torch.tensor([chosen[i] for i in running]))
                executed += len(schedule[at + 1])
                run.counts["layers_per_token"] = executed / (at + 1)
        return generated
