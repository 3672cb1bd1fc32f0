"""AdamW with its two moments in float32 or bfloat16, one parameter at a time.

float32: what `torch.optim.AdamW` keeps, updated by its own fused kernel, bit for bit.
bfloat16: half of that. The same kernel runs on float32 copies, a slice at a time, which are then rounded up or down
at random, so that on average nothing is lost:

    round(x) = the bfloat16 above x with probability (x - below) / (above - below), else the one below

Rounding to the nearest would freeze the second moment: when gradients shrink, a step takes a share 1 - beta2 = 0.001
off it, and bfloat16 numbers lie a share of 2^-8 to 2^-7 apart. The update uses the moments before they are rounded.
The libraries looked at do not do this: moments have the format of the weights in PyTorch, that or 8 and 4 bits in
torchao and bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from tokenloom.train.config import TrainConfig
from tokenloom.train.data import derive

_SLICE = 2**19
"""Numbers whose float32 copies exist at once."""

Round = Callable[[Tensor], Tensor]


class AdamMoments:
    """Moments in `dtype`, float32 or bfloat16, of named parameters in either format.

    All are made at once: what does not fit fails before the first step, and nothing long-lived is later put between
    the activations of a step, where it would keep the C library from handing their memory back.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, dtype: torch.dtype) -> None:
        self.parameters, self.config = parameters, config
        self.fused = has_fused_kernel(list(parameters.values()))
        self._states = {name: self._zeros(parameter, dtype) for name, parameter in parameters.items()}
        self._noise = _Noise(config.seed)

    def update(self, name: str, gradient: Tensor, rate: float) -> None:
        """Move the parameter by one step of AdamW at learning rate `rate`."""
        parameter = self.parameters[name].detach()
        state = self._states[name]
        tensors = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
        if torch.bfloat16 not in {x.dtype for x in tensors}:
            self._adamw(tensors, state["step"], rate)
            return
        count = int(state["step"])
        rounded = self._noise.rounding(name, count, parameter.device)
        for slices in zip(*(torch.split(x.view(-1), _SLICE) for x in tensors), strict=True):
            # What is float32 already is no copy: it changes in place.
            exact = tuple(x.float() for x in slices)
            self._adamw(exact, state["step"].fill_(count), rate)
            weights, _, *moments = zip(slices, exact, strict=True)
            for kept, value in moments:
                if kept.dtype == torch.bfloat16:
                    kept.copy_(rounded(value))
            if weights[0].dtype == torch.bfloat16:
                weights[0].copy_(weights[1])

    def state(self) -> dict[str, Tensor]:
        """Moments and counters by `kind/name`; they share memory with the optimizer."""
        return {f"{key}/{name}": value for name, state in self._states.items() for key, value in state.items()}

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Copy back what `state` gave for one parameter, by kind.

        Raises:
            ValueError: when kinds or shapes are not its own.
        """
        own = self._states[name]
        if own.keys() != state.keys() or any(own[k].shape != v.shape for k, v in state.items()):
            raise ValueError(f"the optimizer state of {name!r} does not fit: it was saved for another model")
        for key, value in state.items():
            own[key].copy_(value)

    def _zeros(self, parameter: nn.Parameter, dtype: torch.dtype) -> dict[str, Tensor]:
        if dtype == torch.float32:
            dtype = torch.promote_types(parameter.dtype, dtype)
        state = {k: torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for k in ("exp_avg", "exp_avg_sq")}
        # The fused kernel counts steps where the parameter is, the other one on the CPU.
        return state | {"step": torch.zeros((), device=parameter.device if self.fused else "cpu")}

    def _adamw(self, tensors: tuple[Tensor, ...], step: Tensor, rate: float) -> None:
        weights, gradient, first, second = ([x] for x in tensors)
        c = self.config
        with torch.no_grad():
            adamw(
                weights, gradient, first, second, [], [step],
                fused=self.fused, foreach=False, amsgrad=False, maximize=False,
                lr=rate, beta1=c.betas[0], beta2=c.betas[1], eps=c.adam_eps, weight_decay=c.weight_decay,
            )  # fmt: skip


def has_fused_kernel(parameters: list[nn.Parameter]) -> bool:
    """Whether PyTorch has AdamW as one kernel for these devices and formats: it says so when asked for it."""
    try:
        torch.optim.AdamW(parameters, fused=True)
    except RuntimeError:
        return False
    return True


class _Noise:
    """Stochastic rounding whose noise is a function of seed, step and parameter: a resumed run draws the same.

    A table is drawn for each step and read from a random place for each slice. The noise that a number meets is
    uniform and new at every step, which is all that an unbiased rounding takes.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn: tuple[int, Tensor] | None = None

    def rounding(self, name: str, count: int, device: torch.device) -> Round:
        """Rounds float32 tensors of at most `_SLICE` numbers in place to values that bfloat16 has."""
        table = self._table(count, device)
        generator = torch.Generator().manual_seed(derive(self._seed, "rounding", count, name))

        def rounded(x: Tensor) -> Tensor:
            start = int(torch.randint(_SLICE, (), generator=generator))
            # The upper half of a float32 is the bfloat16 below it in size; noise in the lower half carries into it.
            x.view(torch.int32).add_(table[start : start + x.numel()]).bitwise_and_(-(2**16))
            return x

        return rounded

    def _table(self, count: int, device: torch.device) -> Tensor:
        if self._drawn is None or self._drawn[0] != count:
            generator = torch.Generator().manual_seed(derive(self._seed, "rounding", count))
            table = torch.randint(2**16, (2 * _SLICE,), dtype=torch.int32, generator=generator)
            self._drawn = (count, table.to(device))
        return self._drawn[1]
