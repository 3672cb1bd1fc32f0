"""Probes: small classifiers on hidden states.

    features = states(model, prompts)                   # [N, D], last layer, last token
    probe = Probe.fit(features, labels)                 # logistic; hidden=(64,) makes it an MLP
    probe(features)                                     # [N] probabilities, or [N, C] of classes

Letters: N texts, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.decode.minimize import Progress


class Probe:
    """Features [..., D] -> probabilities [...] of one thing, or [..., C] of classes that exclude each other.

    Features are standardized by what the probe was fitted on, and computed in float32 at least.
    """

    def __init__(
        self, size: int, *, hidden: Sequence[int] = (), classes: int = 1, mean: Any = None, scale: Any = None
    ) -> None:
        """A probe that knows nothing: its last layer is zero. `classes` 1 is one probability."""
        sizes = [size, *hidden, classes]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.classes, self.hidden = classes, tuple(hidden)
        self.mean = torch.zeros(size) if mean is None else mean
        self.scale = torch.ones(size) if scale is None else scale

    @classmethod
    def fit(
        cls,
        features: Tensor,
        targets: Tensor,
        *,
        hidden: Sequence[int] = (),
        classes: int = 1,
        l2: float = 1.0,
        balanced: bool = False,
        steps: int = 300,
        learning_rate: float = 1e-2,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Probe:
        """Fit to `features` [N, D] and `targets` [N]: probabilities or truth values, or class numbers if `classes` > 1.

        The loss is the sum of cross-entropies plus `l2` / 2 times the squared weights, as in logistic regression with
        C = 1 / l2; without hidden layers its minimum is found by L-BFGS. `balanced` weighs each class by N / (classes
        * its size).

        Raises:
            ValueError: when features and targets do not fit, or a target is out of range.
        """
        _check(features, targets, classes)
        wide = features.detach().to(torch.promote_types(features.dtype, torch.float32))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            probe = cls(wide.shape[1], hidden=hidden, classes=classes)
        probe.standardize(wide)
        probe.net.to(wide)
        weights = _balance(targets, classes) if balanced else torch.ones(len(wide))
        weights = weights.to(wide)

        def loss() -> Tensor:
            errors = weights * _errors(probe.logits(wide), targets, classes)
            penalty = sum((m.weight.square().sum() for m in probe.net if isinstance(m, nn.Linear)), wide.new_zeros(()))
            return (errors.sum() + l2 / 2 * penalty) / len(wide)

        _descend(probe, loss, steps, learning_rate, progress)
        return probe

    def standardize(self, features: Tensor) -> None:
        """Take mean and deviation from `features` [N, D]; what does not vary is left unscaled."""
        self.mean = features.mean(0)
        deviation = features.std(0, correction=0)
        self.scale = torch.where(deviation > 1e-12, deviation, 1.0)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return list(self.net.parameters())

    def logits(self, features: Tensor) -> Tensor:
        """[..., 1 or C] before the sigmoid or softmax.

        Raises:
            ValueError: for features of another size than those of the fit.
        """
        if features.shape[-1] != len(self.mean):
            raise ValueError(
                f"the probe was fitted on {len(self.mean)} features and got {features.shape[-1]}; it belongs to "
                "another model or layer"
            )
        weight = next(self.net.parameters())
        given = features.to(weight)
        found: Tensor = self.net((given - self.mean.to(weight)) / self.scale.to(weight))
        return found

    def __call__(self, features: Tensor) -> Tensor:
        """Probabilities [...] or [..., C]."""
        logits = self.logits(features)
        return logits.sigmoid()[..., 0] if self.classes == 1 else logits.softmax(-1)

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name; `from_tensors` is the way back."""
        shape = torch.tensor([self.classes, *self.hidden])
        state = {f"net.{k}": v.detach() for k, v in self.net.state_dict().items()}
        return {"shape": shape, "mean": self.mean, "scale": self.scale, **state}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Probe:
        """A probe from its tensors.

        Raises:
            ValueError: when they are not a probe's.
        """
        try:
            classes, *hidden = tensors["shape"].tolist()
            mean = tensors["mean"]
            probe = cls(len(mean), hidden=hidden, classes=classes, mean=mean, scale=tensors["scale"])
            probe.net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"these are not the tensors of a probe: {error}") from error
        probe.net.to(mean.dtype)
        return probe

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        save_tensors(self.tensors(), path)

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read a file of `save`.

        Raises:
            ValueError: when it is no probe.
        """
        return cls.from_tensors(load_tensors(path))


def save_tensors(tensors: dict[str, Tensor], path: str | Path) -> None:
    """Write a safetensors file, its folder made if missing."""
    from safetensors.torch import save_file

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, path)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: when it is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file: {error}") from error


def _descend(
    probe: Probe, loss: Callable[[], Tensor], steps: int, learning_rate: float, progress: Progress | None
) -> None:
    if not probe.hidden:
        # Convex: a few dozen iterations reach the minimum.
        newton = torch.optim.LBFGS(
            probe.parameters(),
            max_iter=steps,
            tolerance_grad=1e-9,
            tolerance_change=1e-15,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            newton.zero_grad()
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
            return value

        newton.step(closure)  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
        if progress is not None:
            progress(steps, steps, loss().item())
        return
    optimizer = torch.optim.Adam(probe.parameters(), lr=learning_rate)
    for step in range(steps):
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
        optimizer.step()
        if progress is not None:
            progress(step + 1, steps, value.item())


def _errors(logits: Tensor, targets: Tensor, classes: int) -> Tensor:
    if classes == 1:
        given = targets.to(logits)
        return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], given, reduction="none")
    return nn.functional.cross_entropy(logits, targets.to(logits.device, torch.int64), reduction="none")


def _balance(targets: Tensor, classes: int) -> Tensor:
    kinds = (targets >= 0.5).long() if classes == 1 else targets.long()
    sizes = torch.bincount(kinds, minlength=max(classes, 2))
    return (len(targets) / (len(sizes) * sizes.clamp(min=1).double()))[kinds]


def _check(features: Tensor, targets: Tensor, classes: int) -> None:
    if features.ndim != 2 or targets.shape != features.shape[:1] or len(features) == 0:
        raise ValueError(
            f"a probe is fitted on features [N, D] and targets [N], got {tuple(features.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("a probe needs features that are finite numbers")
    most = 1 if classes == 1 else classes - 1
    if bool((targets < 0).any()) or bool((targets > most).any()):
        raise ValueError(f"a probe's targets lie between 0 and {most}; for class numbers say classes=...")
