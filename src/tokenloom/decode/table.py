"""`TableLM`: a language model that is a table of probabilities, for exact tests of anything that decodes.

Its vocabulary is small and its law of the next token is given for every prefix, so that the law of whole strings can be
enumerated (`string_law`) and compared with the law of what a method returns (`tokenloom.draw.law_of`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokenloom.decode.session import ROOT

Rule = Callable[[tuple[int, ...]], Sequence[float]]


class TableLM:
    """Next-token probabilities `rule(prefix)` [V] for every prefix, the prompt included, float64."""

    def __init__(self, vocab: int, rule: Rule) -> None:
        self.vocab, self._rule = vocab, rule
        self._known: dict[tuple[int, ...], Tensor] = {}
        self.calls = 0

    @classmethod
    def random(cls, vocab: int, seed: int = 0, *, sharpness: float = 1.0) -> TableLM:
        """Laws drawn from a symmetric Dirichlet, each prefix its own; larger `sharpness`, more even laws."""

        def rule(prefix: tuple[int, ...]) -> Sequence[float]:
            key = hash((seed, *prefix)) & 0x7FFF_FFFF
            gamma = torch.distributions.Gamma(torch.tensor(sharpness, dtype=torch.float64), torch.ones(()))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(key)
                masses = gamma.sample((vocab,)).double() + 1e-3
            return [float(m) for m in masses / masses.sum()]

        return cls(vocab, rule)

    def probs(self, prefix: Sequence[int]) -> Tensor:
        """The law [V] of the token after `prefix`."""
        key = tuple(prefix)
        if key not in self._known:
            law = torch.tensor(list(self._rule(key)), dtype=torch.float64)
            if len(law) != self.vocab or not bool((law >= 0).all()) or abs(float(law.sum()) - 1) > 1e-9:
                raise ValueError(f"the law after {key} must have {self.vocab} entries >= 0 that sum to 1, got {law}")
            self._known[key] = law
        return self._known[key]

    def open_session(self, prompts: Sequence[Sequence[int]]) -> TableSession:
        """See `session.open_session`."""
        return TableSession(self, prompts)

    def string_law(self, prompt: Sequence[int], length: int, eos: int | None = None) -> dict[tuple[int, ...], float]:
        """The law of continuations of `prompt` of `length` tokens; those that end with `eos` may be shorter."""
        law: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(length):
            longer: dict[tuple[int, ...], float] = {}
            for string, mass in law.items():
                if eos is not None and string and string[-1] == eos:
                    longer[string] = longer.get(string, 0.0) + mass
                    continue
                probs = self.probs((*prompt, *string))
                for token in range(self.vocab):
                    if float(probs[token]) > 0:
                        longer[(*string, token)] = mass * float(probs[token])
            law = longer
        return law


def completed(
    law: dict[tuple[int, ...], float], model: TableLM, prompt: Sequence[int], length: int
) -> dict[tuple[int, ...], float]:
    """The law of strings of exactly `length`, when outcomes of `law` go on by the model's own law or are cut.

    So the law of one speculative round, which emits a varying number of tokens, becomes comparable with the model's.
    """
    total: dict[tuple[int, ...], float] = {}
    for string, mass in law.items():
        if len(string) > length:
            raise ValueError(f"{string} is longer than {length}")
        rest = model.string_law((*prompt, *string), length - len(string))
        for more, share in rest.items():
            whole = (*string, *more)
            total[whole] = total.get(whole, 0.0) + mass * share
    return total


def strings(vocab: int, length: int) -> list[tuple[int, ...]]:
    """Every string of `length` tokens."""
    return list(itertools.product(range(vocab), repeat=length))


class TableSession:
    """`session.Session` over a table; `model.calls` counts its forwards."""

    ragged = True

    def __init__(self, model: TableLM, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self.rows = [list(p) for p in prompts]
        self._tried: list[list[tuple[int, ...]]] = []

    def start(self) -> Tensor:
        """See `Session`."""
        return self._scores(self.rows)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Session`."""
        return self.extend([[int(t)] for t in tokens])

    def extend(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Session`."""
        for row, new in zip(self.rows, tokens, strict=True):
            row.extend(int(t) for t in new)
        return self._scores(self.rows)

    def try_nodes(self, tokens: Tensor, parents: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """See `Session`."""
        self._tried = []
        scores = []
        for row, nodes, above in zip(self.rows, tokens.tolist(), parents.tolist(), strict=True):
            paths: list[tuple[int, ...]] = []
            for token, parent in zip(nodes, above, strict=True):
                before = () if parent == ROOT else paths[parent]
                paths.append((*before, int(token)))
            self._tried.append(paths)
            scores.append(torch.stack([self._log(tuple(row) + path) for path in paths]))
        self._model.calls += 1
        return torch.stack(scores)

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """See `Session`."""
        for row, tried, path in zip(self.rows, self._tried, paths, strict=True):
            if path:
                row.extend(tried[path[-1]])

    def crop(self, lengths: Sequence[int]) -> None:
        """See `Session`."""
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]

    def branch(self, rows: Sequence[int]) -> None:
        """See `Session`."""
        self.rows = [list(self.rows[i]) for i in rows]

    def _scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self._model.calls += 1
        return torch.stack([self._log(tuple(row)) for row in rows])

    def _log(self, prefix: tuple[int, ...]) -> Tensor:
        return self._model.probs(prefix).log()
