"""Reward and value heads fitted to verified rollouts of the model itself, their held-out quality, and files of heads.

    judged = Judged(prompts, responses, rewards)                          # ids, and rewards in [0, 1]
    head, quality = fit_head("reward", policy, judged, heldout)           # or "value"
    save_head(head, "judge.safetensors", quality)
    load_head("judge.safetensors", policy.model)                          # what a method takes: rad's reward, ...

A "reward" head is RAD's: what the whole text so far is worth, fitted by `rad.fit`. A "value" head is RMOD's: the reward
that the response will have, fitted by `rmod.fit`. Both are linear maps of the last hidden state of the frozen model,
which reads every text once. Quality: the area under the ROC curve of the prediction at the last token (1/2 is chance)
for rewards above and below their middle, and the mean squared error of all predictions on the response beside that of
the training rewards' mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenloom.decode import rad, rmod
from tokenloom.decode.auxiliary import Headed
from tokenloom.decode.hidden_states import states_at
from tokenloom.decode.minimize import Progress
from tokenloom.decode.multi_token_heads import MultiTokenHeads
from tokenloom.decode.probe import Probe, load_tensors, save_tensors
from tokenloom.decode.rmod import ValueHeads
from tokenloom.rollout.forward import base_model

Kind = Literal["reward", "value"]
USES: dict[Kind, str] = {"reward": "rad:reward={}", "value": "rmod:values={}"}
"""A method that takes a file of each kind, as the command line names it."""


@dataclass(frozen=True)
class Judged:
    """Responses (ids, without the end token) to prompts, and their rewards [N] in [0, 1]."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    rewards: Tensor

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.responses) == len(self.rewards) or not len(self.rewards):
            raise ValueError("a head is fitted to responses, each with its prompt and its reward; their numbers differ")
        if bool(((self.rewards < 0) | (self.rewards > 1)).any()):
            raise ValueError("a head is fitted to rewards in [0, 1]; divide them by the largest one")

    def spoken(self) -> Judged:
        """Without empty responses."""
        kept = [i for i, response in enumerate(self.responses) if len(response)]
        return Judged([self.prompts[i] for i in kept], [self.responses[i] for i in kept], self.rewards[kept])


@dataclass(frozen=True)
class HeadQuality:
    """See the module; `positive` is the share of held-out rewards above 1/2. NaN for an area without both sides."""

    kind: str
    positive: float
    auroc: float
    mse: float
    constant_mse: float
    heldout: int
    training: int

    def line(self) -> str:
        """In one line."""
        return (
            f"{self.kind} head: AUROC {self.auroc:.3f}, squared error {self.mse:.3f} against {self.constant_mse:.3f} "
            f"of the mean ({self.heldout:,} held-out responses, {self.positive:.1%} of them good)"
        )


def fit_head(
    kind: Kind,
    policy: Any,
    training: Judged,
    heldout: Judged,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Headed | ValueHeads, HeadQuality]:
    """A head on the model of `policy` and its quality.

    Raises:
        ValueError: for an unknown kind, no responses, or rewards outside [0, 1].
    """
    if kind not in USES:
        raise ValueError(f"a head is of kind {' or '.join(USES)}, not {kind!r}")
    learned, unseen = training.spoken(), heldout.spoken()
    known, held = _states(policy, learned), _states(policy, unseen)
    head = (_reward if kind == "reward" else _value)(policy.model, learned, known, seed, progress)
    with torch.no_grad():
        read = head.head if isinstance(head, Headed) else head
        weight = next(read.parameters())
        found = [read(s.to(weight))[:, 0].float().cpu() for s in held]
    own = [f[len(p) :] for f, p in zip(found, unseen.prompts, strict=True)]
    rewards = unseen.rewards.float()
    each = torch.cat([r.expand(len(o)) for r, o in zip(rewards, own, strict=True)])
    weights = torch.tensor([len(r) for r in learned.responses]).float()
    mean = (learned.rewards.float() * weights).sum() / weights.sum()
    quality = HeadQuality(
        kind,
        positive=float((rewards > 0.5).float().mean()),
        auroc=auroc(torch.stack([o[-1] for o in own]), rewards > 0.5),
        mse=float((torch.cat(own) - each).square().mean()),
        constant_mse=float((mean - each).square().mean()),
        heldout=len(rewards),
        training=len(learned.rewards),
    )
    return head, quality


def auroc(scores: Tensor, positive: Tensor) -> float:
    """The chance that a positive's score [N] is above a negative's, equal ones counting half; NaN without either."""
    high, low = scores[positive].double(), scores[~positive].double()
    if not len(high) or not len(low):
        return float("nan")
    difference = high[:, None] - low
    return float(((difference > 0).double() + 0.5 * (difference == 0)).mean())


# -- files ------------------------------------------------------------------------------------------


def save_head(head: Headed | ValueHeads, path: str | Path, quality: HeadQuality) -> None:
    """Write the head alone, without the model under it, and beside it, with `.json` at the end, its quality."""
    if isinstance(head, Headed):
        save_tensors({f"head.{n}": p for n, p in head.head.state_dict().items()}, path)
    else:
        save_tensors(head.state_dict(), path)
    text = json.dumps(asdict(quality), indent=2) + "\n"
    Path(f"{path}.json").write_text(text, encoding="utf-8", newline="\n")


def quality_beside(path: str | Path) -> HeadQuality | None:
    """What `save_head` wrote beside a head, if it did."""
    found = Path(f"{path}.json")
    if not found.is_file():
        return None
    try:
        return HeadQuality(**json.loads(found.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        return None  # somebody else's file


def load_head(path: str | Path, model: Any) -> Any:
    """What a file holds, by the names of its tensors: a head laid on `model`, value heads, a probe, token heads, or the
    `vector` or `directions` that steer.

    Anything else comes back as its path, for methods that read their own files.

    Raises:
        ValueError: when it is no safetensors file, or its head is for a model of another hidden size.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}; `tokenloom fit-head` writes heads")
    tensors = load_tensors(path)
    names = set(tensors)
    size = int(base_model(model).config.get_text_config(decoder=True).hidden_size)
    if names in ({"head.weight"}, {"head.weight", "head.bias"}):
        weight = tensors["head.weight"]
        _check_size(path, weight.shape[1], size)
        linear = nn.Linear(size, len(weight), bias="head.bias" in names)
        linear.load_state_dict({n.removeprefix("head."): t for n, t in tensors.items()})
        under = next(base_model(model).parameters())
        return Headed(model, linear.requires_grad_(False).to(under))
    if names == {"linear.weight", "linear.bias"}:
        _check_size(path, tensors["linear.weight"].shape[1], size)
        return ValueHeads.load(path).requires_grad_(False)
    if {"shape", "mean", "scale"} < names:
        return Probe.from_tensors(tensors)
    if names in ({"vector"}, {"directions"}):
        [tensor] = tensors.values()
        _check_size(path, tensor.shape[-1], size)
        return tensor
    if names == {"weight", "bias"} and tensors["weight"].ndim == 3:
        _check_size(path, tensors["weight"].shape[1], size)
        return MultiTokenHeads.load(path)
    return str(path)


def _check_size(path: str | Path, found: int, size: int) -> None:
    if found != size:
        raise ValueError(f"{path} is for a model of hidden size {found}, and this one's is {size}; fit a head to it")


# -- fitting ----------------------------------------------------------------------------------------


class _Remembered(nn.Module):
    """Stands for a trunk that has read its texts before: ids to states [T, D]."""

    def __init__(self, config: Any, known: dict[tuple[int, ...], Tensor]) -> None:
        super().__init__()
        self.config, self._known = config, known

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> tuple[Tensor]:
        lengths = attention_mask.sum(1).tolist()
        rows = [self._known[tuple(ids[:n])] for ids, n in zip(input_ids.tolist(), lengths, strict=True)]
        return (nn.utils.rnn.pad_sequence(rows, batch_first=True),)


def _states(policy: Any, judged: Judged) -> list[Tensor]:
    """The last hidden states [T, D] of prompt and response, float32 on the CPU; equal texts are read once."""
    texts = [(*p, *r) for p, r in zip(judged.prompts, judged.responses, strict=True)]
    distinct = list(dict.fromkeys(texts))
    with policy.autocast():
        found = states_at(policy.model, distinct, [range(len(t)) for t in distinct], layers=[-1])
    known = dict(zip(distinct, found, strict=True))
    return [known[text][:, 0] for text in texts]


def _reward(model: Any, judged: Judged, states: list[Tensor], seed: int, progress: Progress | None) -> Headed:
    judge = rad.reward_model(model)
    texts = [[*p, *r] for p, r in zip(judged.prompts, judged.responses, strict=True)]
    known = {tuple(t): s for t, s in zip(texts, states, strict=True)}
    size = judge.head.in_features
    head = nn.Linear(int(size), 1)  # type: ignore[arg-type]  # of a module whose class is not known
    nn.init.zeros_(head.weight)
    # From the mean on, there is only to learn what tells the good from the bad.
    nn.init.constant_(head.bias, float(judged.rewards.float().mean()))
    rad.fit(
        Headed(_Remembered(SimpleNamespace(), known), head), texts, judged.rewards,
        head_only=True, epochs=20, batch=32, learning_rate=1e-3, seed=seed, progress=progress,
    )  # fmt: skip
    judge.head.load_state_dict(head.state_dict())
    judge.head.requires_grad_(False)
    return judge


def _value(model: Any, judged: Judged, states: list[Tensor], seed: int, progress: Progress | None) -> ValueHeads:
    spoken = [s[len(p) :] for s, p in zip(states, judged.prompts, strict=True)]
    mask = torch.arange(max(map(len, spoken))) < torch.tensor([len(s) for s in spoken])[:, None]
    steps = 500
    return rmod.fit(
        nn.utils.rnn.pad_sequence(spoken, batch_first=True), judged.rewards.float()[:, None], mask,
        steps=steps, seed=seed,
        progress=None if progress is None else (lambda done, loss: progress(done, steps, loss)),
    )  # fmt: skip
