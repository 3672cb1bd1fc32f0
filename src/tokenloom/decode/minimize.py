"""`minimize`: the one training loop of auxiliary models and heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Progress = Callable[[int, int, float], None]
"""Called after each step with the steps done, the steps in all and the loss."""


def minimize(
    parameters: Sequence[nn.Parameter],
    rows: int,
    loss: Callable[[list[int]], Tensor],
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    seed: int = 0,
    after: Callable[[], None] | None = None,
    progress: Progress | None = None,
    enough: Callable[[], bool] | None = None,
) -> None:
    """AdamW over mini-batches of row numbers, gradients clipped to norm 1; `after` runs behind each step.

    Training ends before its last step once `enough`, asked after each, says so.

    Raises:
        ValueError: without rows, or when the loss is not a number.
    """
    if rows < 1:
        raise ValueError("there is nothing to train on")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    steps, done = epochs * -(-rows // batch), 0
    for _ in range(epochs):
        order = torch.randperm(rows, generator=generator).tolist()
        for begin in range(0, rows, batch):
            value = loss(order[begin : begin + batch])
            if not bool(value.isfinite()):
                raise ValueError(f"the loss became {value.item()} at step {done + 1}; lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            done += 1
            if after is not None:
                after()
            if progress is not None:
                progress(done, steps, value.item())
            if enough is not None and enough():
                return
