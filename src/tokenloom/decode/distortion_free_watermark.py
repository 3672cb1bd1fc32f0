"""The distortion-free watermark: a secret key, a loop and a shaper that write by it, and its detector.

    model.generate(**inputs, do_sample=True, custom_generate=decode.loop("distortion-free-watermark", key=42))
    detect(ids, WatermarkKey(42, vocabulary)).p_value

A text's first token uses a random element of the key; as long as a text is not longer than the key, its tokens follow
the model's law exactly, averaged over keys.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.decode.shapers import wide
from tokenloom.draw import Draw, RandomDraw
from tokenloom.methods.decoding.distortion_free_watermark import (
    block_statistic,
    edit_statistic,
    exp_choice,
    exp_costs,
    its_choice,
    its_costs,
    p_value,
)

Kind = Literal["exp", "its"]
_GAMMA = {"exp": 0.0, "its": 0.4}
_CHUNK = 1 << 24
_TEXTS = 1 << 14


class WatermarkKey:
    """`length` key elements for a vocabulary, made from a secret number; the same number gives the same key.

    Made with PyTorch's CPU generator, element by element, so that a large vocabulary takes no memory.
    """

    def __init__(self, secret: int, vocabulary: int, *, length: int = 256, kind: Kind = "exp") -> None:
        """Draw the seeds of the elements.

        Raises:
            ValueError: for an empty key or an unknown kind.
        """
        _check(length, kind)
        self.secret, self.vocabulary, self.length, self.kind = secret, vocabulary, length, kind
        self._seeds = [_seed(secret, str(j)) for j in range(length)]
        if kind == "its":
            generator = torch.Generator().manual_seed(_seed(secret, "order"))
            self._u = torch.rand(length, generator=generator, dtype=torch.float64)
            self._permutation = torch.randperm(vocabulary, generator=generator)
            self._place = torch.empty_like(self._permutation)
            self._place[self._permutation] = torch.arange(vocabulary)

    def choose(self, probs: Tensor, elements: Sequence[int]) -> Tensor:
        """Tokens [B] for laws [B, V] by the key elements at these positions (modulo the key's length)."""
        law = probs.detach().cpu()
        at = [e % self.length for e in elements]
        if self.kind == "its":
            return its_choice(law, self._u[at], self._permutation)
        return exp_choice(law, torch.stack([self._element(j) for j in at]))

    def costs(self, tokens: Sequence[int]) -> Tensor:
        """[1, m, n]: of each token under each key element."""
        ids = torch.tensor(list(tokens))
        if self.kind == "its":
            return its_costs(self._u[None].float(), self._place[ids][None] / self.vocabulary)
        return exp_costs(torch.stack([self._element(j)[ids] for j in range(self.length)], 1)).float()[None]

    def _element(self, j: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seeds[j])
        return torch.rand(self.vocabulary, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Detection:
    """The statistic of the key, lower is more watermark, and how often a random key is at least as low."""

    statistic: float
    p_value: float


# Unlike any number that people choose for a key, whose own draws would then be among the random ones.
_REFERENCE_SEED = 0x5DEECE66D


def detect(
    tokens: Sequence[int],
    key: WatermarkKey,
    *,
    edit: bool = True,
    gamma: float | None = None,
    block: int | None = None,
    resamples: int = 99,
    generator: torch.Generator | None = None,
) -> Detection:
    """Is the text `tokens` (without its prompt) written with `key`?

    edit: allow for deleted and inserted tokens, at `gamma` each (EXP 0, ITS 0.4 by default). block: length of the
    aligned piece, the whole text by default; shorter finds a watermarked passage in other text. resamples: random keys
    compared with; the p-value is at least 1 / (resamples + 1). generator: draws those keys; by default always the
    same ones, so that a text has one p-value.

    Raises:
        ValueError: for an empty text, a token outside the vocabulary, a block that is longer than the text, or no
            random keys.
    """
    if resamples < 1:
        raise ValueError(f"a p-value needs random keys to compare with, one at least; got resamples = {resamples}")
    if not tokens or not all(0 <= t < key.vocabulary for t in tokens):
        raise ValueError(f"a text to examine needs tokens, all of them below the key's vocabulary, {key.vocabulary}")
    penalty = _GAMMA[key.kind] if gamma is None else gamma

    def statistic(costs: Tensor) -> Tensor:
        if edit:
            return edit_statistic(costs, gamma=penalty, block=block)
        return block_statistic(costs, block=block)

    if generator is None:
        generator = torch.Generator().manual_seed(_REFERENCE_SEED)
    observed = float(statistic(key.costs(tokens))[0])
    chunk = max(1, _CHUNK // (len(tokens) * key.length))
    counts = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    reference = [statistic(random_costs(tokens, key, count, generator)) for count in counts]
    return Detection(observed, p_value(observed, torch.cat(reference)))


def random_costs(
    tokens: Sequence[int], key: WatermarkKey, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """[count, m, n]: costs under `count` random keys like `key`; only what the text's tokens meet is drawn."""
    distinct, ids = torch.unique(torch.tensor(list(tokens)), return_inverse=True)
    if key.kind == "exp":
        xi = torch.rand(count, len(distinct), key.length, generator=generator)
        return exp_costs(xi)[:, ids]
    u = torch.rand(count, key.length, generator=generator)
    places = torch.stack([torch.randperm(key.vocabulary, generator=generator)[: len(distinct)] for _ in range(count)])
    return its_costs(u, places[:, ids] / key.vocabulary)


@decoder("distortion-free-watermark", kind="loop")
class DistortionFreeWatermark(Loop):
    """Sampling whose every choice is made by a secret key; the law, averaged over keys, stays as it was.

    key: the secret number. length: elements of the key; texts should not be longer. kind: "exp" or "its".
    """

    def __init__(self, *, key: int = 0, length: int = 256, kind: Literal["exp", "its"] = "exp") -> None:
        _check(length, kind)
        self.key, self.length, self.kind = key, length, kind
        self.offsets: list[int] = []
        """First key element of each row of the last call."""

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`.

        Raises:
            ValueError: without sampling, which leaves nothing to choose.
        """
        if not run.sample:
            raise ValueError("distortion-free-watermark chooses among samples; call generate with do_sample=True")
        self.offsets = [run.draw.categorical(torch.ones(self.length)) for _ in range(len(run))]
        generated: list[list[int]] = [[] for _ in range(len(run))]
        live = list(range(len(run)))
        with run.session() as session:
            scores = session.start()
            key = WatermarkKey(self.key, scores.shape[-1], length=self.length, kind=self.kind)
            while True:
                laws = run.laws(live, [generated[r] for r in live], scores)
                chosen = key.choose(laws, [self.offsets[r] + len(generated[r]) for r in live]).tolist()
                running = run.append(live, generated, chosen)
                if not running:
                    return generated
                if len(running) < len(live):
                    session.branch(running)
                live = [live[i] for i in running]
                scores = session.step(torch.tensor([chosen[i] for i in running]))


@decoder("distortion-free-watermark", kind="shaper")
class WatermarkShaper(LogitsProcessor):
    """Leaves the one token that the key chooses: for engines that take processors but no loops.

    The law is that of the scores it is handed, after `temperature`; whatever comes behind it finds one token left.
    A row that continues a text seen before by one token goes on with that text's key elements, wherever it stands in
    the batch; any other begins at a random one, by `draw` (default: PyTorch's global state).
    """

    draw: Draw | None = None

    def __init__(
        self,
        *,
        key: int = 0,
        length: int = 256,
        kind: Literal["exp", "its"] = "exp",
        temperature: float = 1.0,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"distortion-free-watermark: temperature must be above 0, got {temperature}")
        _check(length, kind)
        self.key, self.length, self.kind, self.temperature = key, length, kind, temperature
        self._made: WatermarkKey | None = None
        self._offsets: OrderedDict[tuple[int, ...], list[int]] = OrderedDict()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._made is None or self._made.vocabulary != scores.shape[-1]:
            self._made = WatermarkKey(self.key, scores.shape[-1], length=self.length, kind=self.kind)
        law = (wide(scores) / self.temperature).softmax(-1)
        elements = [self._offset(tuple(ids)) + len(ids) for ids in input_ids.tolist()]
        chosen = self._made.choose(law, elements).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def _offset(self, ids: tuple[int, ...]) -> int:
        # Rows with the same text so far may swap their offsets: each of them would have written it.
        before = self._offsets.get(ids[:-1])
        offset = before.pop() if before else (self.draw or RandomDraw()).categorical(torch.ones(self.length))
        if before == []:
            del self._offsets[ids[:-1]]
        self._offsets.setdefault(ids, []).append(offset)
        while len(self._offsets) > _TEXTS:
            self._offsets.popitem(last=False)
        return offset


def generated_tokens(ids: Any, prompt_length: int, pad: int | None = None) -> list[int]:
    """The tokens behind a prompt in one row of `generate`'s result, padding at the end left out."""
    new = [int(t) for t in ids[prompt_length:]]
    while new and new[-1] == pad:
        new.pop()
    return new


def _seed(secret: int, use: str) -> int:
    # PyTorch's generator takes 32 bits of a seed; every digit of the secret shall matter.
    return int.from_bytes(hashlib.sha256(f"{secret} {use}".encode()).digest()[:4], "little")


def _check(length: int, kind: str) -> None:
    if length < 1 or kind not in _GAMMA:
        raise ValueError(f"a watermark key has at least one element and is 'exp' or 'its', got {length}, {kind!r}")
